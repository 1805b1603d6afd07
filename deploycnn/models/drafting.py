"""What all torch sources have in common: settle the shapes, build, write the artifact, state the facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploycnn.core import MAIN_FILE, Artifact, Context, Draft, Facts, Json, TensorSpec
from deploycnn.errors import PassRequirementError, SourceError
from deploycnn.models.artifact import save_model, set_architecture
from deploycnn.models.macs import count_params, run_counted

#: Names of the input and output of every model of our own.
INPUT_NAME, OUTPUT_NAME = "images", "logits"


def settle_num_classes(ctx: Context, asked: int | None, default: int | None, where: str) -> int | None:
    """Classes of the model: the data's, else the source's field, else the source's default.

    Raises:
        SourceError: data and field disagree.
    """
    if ctx.num_classes is not None and asked not in (None, ctx.num_classes):
        raise SourceError(
            f"{where}: num_classes is {asked}, but the data have {ctx.num_classes} classes; leave it out"
        )
    return ctx.num_classes or asked or default


def settle_input_shape(
    ctx: Context, asked: Sequence[int] | None, default: Sequence[int], channels: int, where: str
) -> tuple[int, int, int]:
    """Shape (C, H, W) of one image: the data's, else the source's field, else the source's default.

    Args:
        ctx: Context with or without data.
        asked: (H, W) of the source's ``input_size`` field.
        default: (H, W) that the model was made for.
        channels: Input channels where there are no data.
        where: Names the source in messages.

    Raises:
        SourceError: data and field disagree.
    """
    if ctx.data is None:
        height, width = asked or default
        return channels, height, width
    shape = ctx.data.preprocessing.input_shape
    if asked is not None and tuple(asked) != shape[1:]:
        raise SourceError(
            f"{where}: input_size is {list(asked)}, but preprocessing.size is {list(shape[1:])}; leave it out"
        )
    return shape


def image_shape(source: Artifact, ctx: Context, where: str) -> tuple[int, int, int]:
    """Shape (C, H, W) of one image for a pass that runs ``source``: the data's, else the artifact's own.

    Raises:
        PassRequirementError: it takes any size, and there are no data to say one; ``where`` names the pass.
    """
    if ctx.data is not None:
        return ctx.data.preprocessing.input_shape
    channels, height, width = source.inputs[0].shape[1:]
    if channels is None or height is None or width is None:
        raise PassRequirementError(
            f"{where}: the image size is not known (input {source.inputs[0].shape}); name data in the recipe"
        )
    return channels, height, width


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Call ``build`` with PyTorch's generator seeded, and leave the generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def torch_draft(
    ctx: Context,
    model: nn.Module,
    architecture: Mapping[str, Json],
    input_shape: tuple[int, int, int],
    *,
    where: str,
    record: Mapping[str, Any] | None = None,
) -> Draft:
    """Write ``model`` to ``ctx.output`` and describe it.

    Args:
        ctx: Context of the source.
        model: Takes (N, C, H, W) and returns logits (N, K).
        architecture: See :func:`deploycnn.models.artifact.architecture`.
        input_shape: (C, H, W).
        where: Names the source in messages.
        record: For ``Facts.record``.

    Raises:
        SourceError: the model does not take such images, or does not return one tensor of logits.
    """
    num_classes = ctx.num_classes or architecture["num_classes"]
    outputs, macs = check_forward(model, input_shape, num_classes, where)
    set_architecture(model, architecture)
    save_model(model, ctx.output, architecture)
    data = ctx.data
    return Draft(
        format="torch",
        inputs=(TensorSpec(name=INPUT_NAME, dtype="float32", shape=(None, *input_shape)),),
        outputs=(TensorSpec(name=OUTPUT_NAME, dtype="float32", shape=(None, outputs)),),
        facts=Facts(
            params=count_params(model),
            macs=macs,
            size_bytes=(ctx.output / MAIN_FILE["torch"]).stat().st_size,
            preprocessing=data.preprocessing.to_json() if data is not None else None,
            classes=data.dataset.classes if data is not None else (),
            record=dict(record or {}),
        ),
    )


def check_forward(
    model: nn.Module, input_shape: tuple[int, int, int], num_classes: int | None, where: str
) -> tuple[int, int]:
    """Run one image through ``model`` and return its number of outputs and its MACs.

    Raises:
        SourceError: it fails, returns something else than one (1, K) tensor, or K is not ``num_classes``.
    """
    shape = "x".join(map(str, input_shape))
    try:
        logits, macs = run_counted(model, input_shape)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise SourceError(
            f"{where}: cannot process a {shape} image (channels x height x width): "
            f"{' '.join(str(error).split())[:200]}; change preprocessing.size, channels or the model"
        ) from error
    if not isinstance(logits, Tensor):
        raise SourceError(f"{where}: returns {type(logits).__name__}; it should return one tensor of logits")
    if logits.ndim != 2 or logits.shape[0] != 1:
        raise SourceError(
            f"{where}: returns shape {list(logits.shape)} for one image; logits are (1, classes)"
        )
    if num_classes is not None and logits.shape[1] != num_classes:
        raise SourceError(
            f"{where}: returns {logits.shape[1]} logits, but there are {num_classes} classes; "
            "let the model take num_classes"
        )
    return int(logits.shape[1]), macs
