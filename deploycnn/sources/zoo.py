"""The project's own models: ``source: {zoo: resnet56, weights: resnet56.th}``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge

from deploycnn.core import Context, Draft, Format, Source

if TYPE_CHECKING:
    from torch import nn

DEFAULT_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Zoo(Source):
    """One of the project's own small-image models.

    lenet5; resnet20, resnet32, resnet44, resnet56, resnet110 (each also with a trailing b: projection shortcuts);
    resnet8x2, resnet14x2, resnet20x2 (twice as wide); vgg16_bn; mobilenet_v2, mobilenet_v2_x0_5,
    mobilenet_v2_x0_5_s16; efficientnet.
    """

    main: ClassVar[str] = "name"
    produces: ClassVar[Format] = "torch"

    name: Annotated[str, "Name of the model."]
    weights: Annotated[Path | None, "Checkpoint to start from; null: random weights."] = None
    new_head: Annotated[bool, "Start the classifier anew where the checkpoint has other classes."] = False
    num_classes: Annotated[int | None, Ge(1), "Classes; null: the data's, or 10 without data."] = None
    input_size: Annotated[
        tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)]] | None,
        "Image height and width; null: the data's, or 32x32 without data.",
    ] = None

    @classmethod
    def build(cls, options: Mapping[str, Any], num_classes: int | None) -> nn.Module:
        """The base architecture, with random weights.

        Args:
            options: ``name``, and ``in_channels`` (3 where absent).
            num_classes: 10 where ``None``.

        Raises:
            SourceError: there is no such model.
        """
        from deploycnn.models import zoo

        channels = options.get("in_channels", 3)
        return zoo.build(options["name"], num_classes=num_classes or DEFAULT_CLASSES, in_channels=channels)

    def run(self, ctx: Context) -> Draft:
        """Build the model, load its weights and write it."""
        from deploycnn.models import artifact, drafting, weights, zoo

        where = f"zoo: {self.name}"
        num_classes = drafting.settle_num_classes(ctx, self.num_classes, DEFAULT_CLASSES, where)
        shape = drafting.settle_input_shape(ctx, self.input_size, zoo.INPUT_SIZE, 3, where)
        options = {"name": self.name, "in_channels": shape[0]}
        model = drafting.seeded(lambda: self.build(options, num_classes), ctx.seed)
        record = {}
        if self.weights is not None:
            record["weights"] = weights.load_weights(model, self.weights, new_head=self.new_head).to_json()
        described = artifact.architecture("zoo", options, num_classes)
        return drafting.torch_draft(ctx, model, described, shape, where=where, record=record)
