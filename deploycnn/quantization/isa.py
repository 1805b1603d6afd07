"""Which 8-bit arithmetic this CPU has."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

#: Flags of x86 CPUs whose 8-bit dot product accumulates into 32 bits. Without one, U8S8 products are added in
#: pairs into 16 bits and saturate.
DOT_PRODUCT_FLAGS = ("amx_int8", "avx512_vnni", "avx_vnni")


@dataclass(frozen=True, slots=True, kw_only=True)
class Isa:
    """A CPU's 8-bit arithmetic.

    Attributes:
        name: "amx_int8", "avx512_vnni", "avx_vnni", "x86 without VNNI", "x86 (flags unknown)", or the machine
            type.
        saturates: Whether 8-bit weights may saturate with uint8 activations, so that 7-bit weights are
            needed.
    """

    name: str
    saturates: bool

    @property
    def x86(self) -> bool:
        """Whether it is an x86 CPU, whose 8-bit multiply-add takes unsigned activations and signed weights."""
        return self.name in DOT_PRODUCT_FLAGS or self.name.startswith("x86")


def detect_isa(cpuinfo: Path = Path("/proc/cpuinfo"), machine: str | None = None) -> Isa:
    """This machine's (or a described one's) 8-bit arithmetic; x86 of unknown flags is taken to saturate."""
    machine = (machine or platform.machine()).lower()
    if machine not in {"x86_64", "amd64", "i386", "i686"}:
        return Isa(name=machine or "unknown", saturates=False)
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return Isa(name="x86 (flags unknown)", saturates=True)
    flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
    for flag in DOT_PRODUCT_FLAGS:
        if flag in flags:
            return Isa(name=flag, saturates=False)
    return Isa(name="x86 without VNNI" if flags else "x86 (flags unknown)", saturates=True)
