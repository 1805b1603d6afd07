"""The images that a pass of pruning runs a model on."""

from __future__ import annotations

from deploycnn.core import Artifact, Context
from deploycnn.errors import PassRequirementError


def input_shape(source: Artifact, ctx: Context, where: str) -> tuple[int, int, int]:
    """(C, H, W) of a torch artifact's input.

    Raises:
        PassRequirementError: it takes any size, and there are no data to say one; ``where`` names the pass.
    """
    channels, height, width = (source.inputs[0].shape[1:] + (None,) * 3)[:3]
    if ctx.data is not None and None in (channels, height, width):
        return ctx.data.preprocessing.input_shape
    if channels is None or height is None or width is None:
        raise PassRequirementError(
            f"{where}: the model takes images of any size ({source.inputs[0].shape}); "
            "add `data` to the recipe, whose preprocessing says which"
        )
    return channels, height, width
