"""Arithmetic of the forward and backward pass, as the device allows."""

from __future__ import annotations

from typing import Literal

import torch

from deploycnn.errors import RuntimeUnavailable

Precision = Literal["fp32", "bf16", "fp16"]

#: For autocast; float32 stands for no autocast at all.
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choices(requested: Literal["auto", "fp32", "bf16", "fp16"], device: str) -> tuple[Precision, ...]:
    """What to compute in; more than one where only timing tells which is faster.

    "auto" is bf16 on GPUs that have it and fp16 on others. On CPUs with bf16 arithmetic the net decides: on
    Sapphire Rapids training of CIFAR ResNets took 0.45 to 0.55 of the time, that of MobileNetV2 1.4 times as long.

    Raises:
        RuntimeUnavailable: the device has no arithmetic of that kind.
    """
    if device == "cpu":
        return _cpu_choices(requested)
    if requested == "auto":
        return ("bf16",) if torch.cuda.is_bf16_supported(including_emulation=False) else ("fp16",)
    if requested == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise RuntimeUnavailable("precision: this GPU has no bf16 arithmetic; choose fp16, fp32 or auto")
    return (requested,)


def _cpu_choices(requested: Literal["auto", "fp32", "bf16", "fp16"]) -> tuple[Precision, ...]:
    if requested == "fp16":
        raise RuntimeUnavailable("precision: fp16 needs a GPU, this trains on the CPU; choose auto or fp32")
    if requested == "bf16" and not cpu_has_bf16():
        raise RuntimeUnavailable(
            "precision: this CPU has no bf16 arithmetic (AVX512-BF16 or AMX) that torch "
            f"{torch.__version__} can detect, and emulating it is slow; choose auto or fp32"
        )
    if requested == "auto":
        return ("fp32", "bf16") if cpu_has_bf16() else ("fp32",)
    return (requested,)


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively. False where torch is too old (before 2.10) to tell."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
