"""Train a model on the recipe's images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar

from deploycnn.core import Artifact, Context, Draft, Format, Pass
from deploycnn.training.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class Train(TrainingSettings, Pass):
    """Train or fine-tune on the training split; val picks the epoch, test is never read.

    Killed and started again, it continues after the last finished epoch and ends with the same weights.
    """

    consumes: ClassVar[Format] = "torch"
    produces: ClassVar[Format] = "torch"
    version: ClassVar[int] = 3
    needs_data: ClassVar[bool] = True

    skip_trained: Annotated[
        bool, "Keep a model whose source loaded weights as it is: only score it on val."
    ] = False

    def run(self, source: Artifact, ctx: Context) -> Draft:
        """Train ``source``; the history of all epochs is recorded under "training".

        Raises:
            TrainingError: the loss became infinite or not a number.
            PreprocessingError: the model was made for images prepared otherwise.
            PassRequirementError: the model does not fit the data's classes.
        """
        from deploycnn.training import artifact
        from deploycnn.training.losses import CrossEntropy

        settings = self
        if self.skip_trained and _came_with_weights(source):
            ctx.log.info("the model came with weights, so it is not trained")
            settings = dataclasses.replace(self, epochs=0, reestimate_bn=False)
        loss = CrossEntropy(label_smoothing=self.label_smoothing)
        return artifact.train(source, settings, ctx, loss=loss, where="train")


def _came_with_weights(source: Artifact) -> bool:
    """Whether a source loaded weights for all layers, as it then records (see ``models.weights.Loaded``)."""
    weights = source.facts.record.get("weights")
    return weights is not None and not weights.get("new_head")
