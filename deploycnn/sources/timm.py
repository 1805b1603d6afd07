"""timm's models: ``source: {timm: resnet18.a1_in1k, weights: default}``. Needs the extra ``timm``."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from deploycnn.core import Context, Draft, Format, Json, Source
from deploycnn.errors import SourceError, nearest
from deploycnn.optional import installed, require

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Timm(Source):
    """A model of timm by its name, with or without the tag of its weights."""

    main: ClassVar[str] = "name"
    produces: ClassVar[Format] = "torch"

    name: Annotated[str, "Name of the model, as in timm.list_models()."]
    weights: Annotated[
        Literal["random", "default"] | Path,
        "random; default: timm's pretrained weights (downloaded); or a checkpoint file.",
    ] = "random"
    new_head: Annotated[
        bool, "Start the classifier anew where the checkpoint has other classes (default weights always do)."
    ] = False
    num_classes: Annotated[
        int | None, Ge(1), "Classes; null: the data's, or timm's default without data."
    ] = None
    input_size: Annotated[
        tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)]] | None,
        "Image height and width; null: the data's, or the model's own without data.",
    ] = None

    def extra_identity(self) -> Json:
        """Timm's version: it decides on the architecture and on the default weights."""
        return importlib.metadata.version("timm") if installed("timm") else None

    @classmethod
    def build(cls, options: Mapping[str, Any], num_classes: int | None) -> nn.Module:
        """The base architecture, with random weights.

        Args:
            options: ``name``, and ``in_channels`` (3 where absent).
            num_classes: timm's default where ``None``.

        Raises:
            RuntimeUnavailable: timm is not installed.
            SourceError: there is no such model, or it cannot be built so.
        """
        return cls._create(options, num_classes, pretrained=False)

    @classmethod
    def _create(cls, options: Mapping[str, Any], num_classes: int | None, *, pretrained: bool) -> nn.Module:
        timm = require("timm")
        name = options["name"]
        if not timm.is_model(name):
            close = nearest(name, timm.list_models()).partition("? Known")[0]
            hint = f"{close}?" if close.startswith("did you") else "timm.list_models() lists all"
            raise SourceError(f'timm: unknown model "{name}"; {hint}')
        classes = {} if num_classes is None else {"num_classes": num_classes}
        try:
            model: nn.Module = timm.create_model(
                name, pretrained=pretrained, in_chans=options.get("in_channels", 3), **classes
            )
        except OSError as error:
            reason = " ".join(str(error).split())[:160]
            raise SourceError(
                f"timm: {name}: cannot download the weights ({reason}); go online, or fetch the file "
                "elsewhere and give weights: PATH, or use weights: random"
            ) from error
        except (RuntimeError, ValueError, TypeError) as error:
            raise SourceError(
                f"timm: {name}: cannot be built: {' '.join(str(error).split())[:200]}"
            ) from error
        return model

    def run(self, ctx: Context) -> Draft:
        """Build the model, load its weights and write it."""
        from deploycnn.models import artifact, drafting, weights

        where = f"timm: {self.name}"
        num_classes = drafting.settle_num_classes(ctx, self.num_classes, None, where)
        channels = ctx.data.preprocessing.channel_count if ctx.data is not None else 3
        options = {"name": self.name, "in_channels": channels}
        pretrained = self.weights == "default"
        model = drafting.seeded(lambda: self._create(options, num_classes, pretrained=pretrained), ctx.seed)
        config: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
        size = config.get("input_size", (3, 224, 224))[1:]
        shape = drafting.settle_input_shape(ctx, self.input_size, size, channels, where)
        record: dict[str, Json] = {}
        if isinstance(self.weights, Path):
            record["weights"] = weights.load_weights(model, self.weights, new_head=self.new_head).to_json()
        elif pretrained:
            # timm itself leaves out a classifier of another size, and sums the first layer up for gray.
            anew = num_classes is not None and num_classes != config.get("num_classes")
            record["weights"] = {"origin": config.get("hf_hub_id") or config.get("url"), "new_head": anew}
            if anew:
                ctx.log.warning("%s: the classifier (%s) starts anew", where, config.get("classifier"))
        described = artifact.architecture("timm", options, num_classes)
        return drafting.torch_draft(ctx, model, described, shape, where=where, record=record)
