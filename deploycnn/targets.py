"""Deployment targets: which runtimes stand for them, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deploycnn.errors import PassRequirementError, RecipeError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A place to deploy to.

    Attributes:
        name: As written in recipes.
        runtimes: Runtime specs (``name`` or ``name:mode``) that may serve it; the first is the reference, and
            where there are several the faster one is named by measurement.
        device: "cpu" or "cuda".
        engines: Whether models are deployed as engines, which `build_engine` makes.
    """

    name: str
    runtimes: tuple[str, ...]
    device: str
    engines: bool = False


TARGETS = {
    target.name: target
    for target in (
        Target(name="cpu", runtimes=("onnxruntime:cpu", "openvino:f32"), device="cpu"),
        Target(name="onnxruntime-cpu", runtimes=("onnxruntime:cpu",), device="cpu"),
        Target(name="openvino", runtimes=("openvino:f32",), device="cpu"),
        Target(name="onnxruntime-cuda", runtimes=("onnxruntime:cuda",), device="cuda"),
        Target(name="tensorrt", runtimes=("tensorrt:trt", "onnxruntime:cuda"), device="cuda", engines=True),
        Target(
            name="tensorrt-rtx", runtimes=("tensorrt:rtx", "onnxruntime:cuda"), device="cuda", engines=True
        ),
    )
}


#: What models are deployed in.
Precision = Literal["fp32", "int8", "fp16", "int8_fp16"]


def check_half(precision: str, target: str, where: str) -> None:
    """Refuse FP16 on a CPU, which casts it back.

    Args:
        precision: A ``Precision``.
        target: Name of the target.
        where: Option that says so, for the message.

    Raises:
        PassRequirementError: FP16 on a CPU.
    """
    if precision.endswith("fp16") and get(target).device == "cpu":
        raise PassRequirementError(
            f"{where}: {precision} is for GPUs, and the target {target} is a CPU, where FP16 is cast back; "
            f"use {'int8' if precision.startswith('int8') else 'fp32'}"
        )


def get(name: str) -> Target:
    """The target called ``name``.

    Raises:
        RecipeError: there is none; names the nearest.
    """
    if name not in TARGETS:
        raise RecipeError(f'target: unknown target "{name}"; {nearest(name, TARGETS)}')
    return TARGETS[name]
