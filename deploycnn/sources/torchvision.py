"""torchvision's classification models: ``source: {torchvision: resnet18, weights: default}``."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from deploycnn.core import Context, Draft, Format, Json, Source
from deploycnn.errors import SourceError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

DEFAULT_CLASSES = 1000

#: Models that train with auxiliary classifiers, and the prefixes of these in checkpoints. They are built
#: without, so that training and inference alike return one tensor.
AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


@dataclass(frozen=True, kw_only=True)
class Torchvision(Source):
    """A classification model of torchvision, such as resnet50 or mobilenet_v3_large."""

    main: ClassVar[str] = "name"
    produces: ClassVar[Format] = "torch"

    name: Annotated[str, "Name of the model, as in torchvision.models."]
    weights: Annotated[
        Literal["random", "default"] | Path,
        "random; default: torchvision's best ImageNet weights (downloaded); or a checkpoint file.",
    ] = "random"
    new_head: Annotated[
        bool, "Start the classifier anew where the checkpoint has other classes (default weights always do)."
    ] = False
    num_classes: Annotated[int | None, Ge(1), "Classes; null: the data's, or 1000 without data."] = None
    input_size: Annotated[
        tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)]] | None,
        "Image height and width; null: the data's, or the model's own without data.",
    ] = None

    def extra_identity(self) -> Json:
        """Torchvision's version: it decides on the architecture and on the default weights."""
        return importlib.metadata.version("torchvision")

    @classmethod
    def build(cls, options: Mapping[str, Any], num_classes: int | None) -> nn.Module:
        """The base architecture, with random weights and without auxiliary classifiers.

        Args:
            options: ``name``.
            num_classes: 1000 where ``None``.

        Raises:
            SourceError: there is no such classification model.
        """
        from torchvision import models

        name = options["name"]
        known = models.list_models(module=models)
        if name not in known:
            raise SourceError(f'torchvision: unknown classification model "{name}"; {nearest(name, known)}')
        more = {"aux_logits": False, "init_weights": True} if name in AUXILIARY else {}
        model: nn.Module = models.get_model(
            name, weights=None, num_classes=num_classes or DEFAULT_CLASSES, **more
        )
        return model

    def run(self, ctx: Context) -> Draft:
        """Build the model, load its weights and write it."""
        from deploycnn.models import artifact, drafting, weights

        where = f"torchvision: {self.name}"
        num_classes = drafting.settle_num_classes(ctx, self.num_classes, DEFAULT_CLASSES, where)
        options = {"name": self.name}
        model = drafting.seeded(lambda: self.build(options, num_classes), ctx.seed)
        shape = drafting.settle_input_shape(ctx, self.input_size, self._own_size(), 3, where)
        if shape[0] != 3:
            raise SourceError(f"{where}: takes 3 channels, not {shape[0]}; set preprocessing.channels: rgb")
        record: dict[str, Json] = {}
        ignore = AUXILIARY.get(self.name, ())
        if isinstance(self.weights, Path):
            loaded = weights.load_weights(model, self.weights, new_head=self.new_head, ignore=ignore)
            record["weights"] = loaded.to_json()
        elif self.weights == "default":
            state, origin = self._download()
            loaded = weights.fit_weights(model, state, where=origin, new_head=True, ignore=ignore)
            record["weights"] = {"origin": origin, **loaded.to_json()}
            if self.name in AUXILIARY:
                # These weights come from TensorFlow; the model itself turns ImageNet's scale into theirs.
                model.transform_input = True  # type: ignore[assignment]
            if loaded.new_head:
                ctx.log.warning("%s: the classifier (%s) starts anew", where, ", ".join(loaded.new_head))
        described = artifact.architecture("torchvision", options, num_classes)
        return drafting.torch_draft(ctx, model, described, shape, where=where, record=record)

    def _own_size(self) -> tuple[int, int]:
        """Height and width that the default weights were made for; for transformers, that of random ones."""
        from torchvision import models

        if self.name.startswith("vit_"):
            return 224, 224
        size = models.get_model_weights(self.name).DEFAULT.transforms().crop_size[0]
        return size, size

    def _download(self) -> tuple[Mapping[str, Tensor], str]:
        """Torchvision's default weights, from its cache or the network, and their name."""
        import pickle

        import torch
        from torchvision import models

        entry = models.get_model_weights(self.name).DEFAULT
        try:
            state = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except OSError as error:
            raise SourceError(
                f"torchvision: {self.name}: cannot download {entry.url} ({error}); go online, or fetch the "
                "file elsewhere and give weights: PATH, or use weights: random"
            ) from error
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise SourceError(
                f"torchvision: {self.name}: the download of {entry.url} is damaged; delete it from "
                f"{torch.hub.get_dir()}/checkpoints and try again"
            ) from error
        return state, str(entry)
