"""What a quantized graph is, before it is built: plain data shared by placement, ranges, recovery and insertion.

A quantizer goes ``place`` (rule pack -> ``Plan``), ``calibrate`` (``Plan`` -> a range for each value), recovery
(other weights, other ranges) and ``build`` (``Plan`` + ranges -> a Q/DQ ``ModelProto``). Everything that one step
leaves for the next is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

#: Weights of so many bits or fewer are packed two to a byte.
FEW_BITS = 4

#: How a value's range is chosen from what calibration saw (see ``ranges.choose_range``).
Calibrator = Literal["minmax", "moving_average", "percentile", "entropy", "mse"]

Dtype = Literal["uint8", "int8", "int4", "uint4"]

#: (low, high) of a value in real units; low <= 0 <= high.
Range = tuple[float, float]
Ranges = Mapping[str, Range]


#: The smallest normal float32.
_TINY = np.finfo(np.float32).tiny


def precision_name(weight_bits: int, *, weights_only: bool) -> str:
    """Name of a graph's or layer's precision: int8 or w4a8, or w8 or w4 where activations stay float.

    7-bit weights count as 8-bit ones: they are stored and computed with as such.
    """
    few = weight_bits <= FEW_BITS
    if weights_only:
        return "w4" if few else "w8"
    return "w4a8" if few else "int8"


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberFormat:
    """How real numbers become integers: ``q = clip(round(x / scale) + zero_point, qmin, qmax)``.

    Attributes:
        dtype: Storage type.
        symmetric: The zero point is the middle of the range (0 for signed types); otherwise it is free.
        reduced: One bit fewer is used, for CPUs whose 8-bit multiply-add saturates.
    """

    dtype: Dtype = "uint8"
    symmetric: bool = False
    reduced: bool = False

    @property
    def bits(self) -> int:
        """Bits in use."""
        return (4 if self.dtype.endswith("4") else 8) - self.reduced

    @property
    def qmin(self) -> int:
        """Smallest integer; symmetric signed formats leave out the most negative one."""
        if self.dtype.startswith("u"):
            return 0
        return -(1 << (self.bits - 1)) + self.symmetric

    @property
    def qmax(self) -> int:
        """Largest integer."""
        return (1 << self.bits if self.dtype.startswith("u") else 1 << (self.bits - 1)) - 1

    def scale_and_zero_point(self, bounds: Range) -> tuple[np.float32, int]:
        """Scale and zero point of a range; the range is widened to hold zero, which is exact."""
        low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
        qmin, qmax = self.qmin, self.qmax
        if self.symmetric:
            middle = (qmax + qmin + 1) // 2 if self.dtype.startswith("u") else 0
            return _scale(max(-low, high), qmax - middle), middle
        scale = _scale(high - low, qmax - qmin)
        # Python's round is half to even too, and a search for a range calls this thousands of times.
        return scale, min(max(round(qmin - low / float(scale)), qmin), qmax)


def _scale(width: float, steps: int) -> np.float32:
    """Of a step; 1 for a range without width. Float32 must divide by it without overflow."""
    return max(np.float32(width / steps), _TINY) if width > 0 else np.float32(1.0)


def is_balanced(bounds: Range) -> bool:
    """Whether the ends are so alike that a symmetric format has steps at most a third wider than a free one."""
    low, high = -bounds[0], bounds[1]
    return min(low, high) > 0 and 2 * min(low, high) >= max(low, high)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationPlan:
    """One value that is rounded to integers on its way to some or all of its readers.

    Attributes:
        value: Name of the float value in the graph.
        readers: Names of the nodes that read it through Q/DQ; ``None`` for all of them.
        tied: Values with the same group share one scale and zero point; ``None`` for a scale of its own.
        fixed: A range that follows from the operator (a sigmoid's), not from calibration.
    """

    value: str
    readers: frozenset[str] | None = None
    tied: str | None = None
    fixed: Range | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPlan:
    """A constant that is stored as integers.

    Attributes:
        initializer: Its name.
        node: Name of the node that reads it.
        axis: Output-channel axis that each have a scale; ``None`` for one scale in all.
        number: Its number format.
    """

    initializer: str
    node: str
    axis: int | None
    number: NumberFormat = field(default=NumberFormat(dtype="int8", symmetric=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which values and constants of a graph are integers, for one target.

    Attributes:
        target: Name of the rule pack that it was made by.
        activation: Number format of activations.
        signed: Another one for activations that are negative about as far as positive; ``None``: there is none.
        activations: In graph order, each value at most once.
        weights: In graph order.
        integer_bias: Whether biases become int32 (scale: input scale x weight scale), as CPU kernels want it.
        quantized_nodes: Names of the nodes that compute between DQ and Q, in graph order.
        on_integers: Operators that stand between Q and DQ instead, where that computes the same.
        convolves_selections: Whether shortcuts without weights become convolutions (``selections.py``).
        convolves_pools: Whether average pools do (``pools.py``).
        guards_float: Whether float layers between Q/DQ get a guard (``guards.py``).
        kept_float: Convolutions and matrix products left in float -> why.
    """

    target: str
    activation: NumberFormat
    signed: NumberFormat | None = None
    activations: tuple[ActivationPlan, ...]
    weights: tuple[WeightPlan, ...]
    integer_bias: bool
    quantized_nodes: tuple[str, ...]
    on_integers: frozenset[str] = frozenset()
    convolves_selections: bool = False
    convolves_pools: bool = False
    guards_float: bool = False
    kept_float: Mapping[str, str]

    def number(self, bounds: Range) -> NumberFormat:
        """The number format of an activation with such a range."""
        return self.activation if self.signed is None or not is_balanced(bounds) else self.signed


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerWeight:
    """A constant as integers: ``real = integers * scale`` along ``axis``.

    Attributes:
        integers: In the shape of the constant; int8 also for 4-bit numbers.
        scale: Shape () or (channels,), float32.
        axis: As in ``WeightPlan``.
    """

    integers: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]
    axis: int | None
