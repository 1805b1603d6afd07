"""What a value of an ONNX graph is while the graph is imported: a run-time tensor or a constant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx

Array = npt.NDArray[Any]
Change = Callable[[Array], Array]


def same(array: Array) -> Array:
    """The array itself."""
    return array


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A value that does not depend on the input.

    Attributes:
        array: Its content.
        origin: The tensor of the ONNX graph that it comes from, into which a trained one is written.
        undo: Turns a trained array of this shape into the origin's layout.
        layout: What was done to the origin to get here. Readers of one origin in one layout share a parameter.
    """

    array: Array
    origin: str
    undo: Change = same
    layout: tuple[str, ...] = ()

    def changed(self, step: str, change: Change, undo: Change) -> Constant:
        """The constant after ``change``, called ``step``, which ``undo`` reverts."""
        before = self.undo
        return replace(
            self,
            array=change(self.array),
            undo=lambda array: before(undo(array)),
            layout=(*self.layout, step),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """Parameters of a QuantizeLinear or DequantizeLinear node.

    Attributes:
        scale: Shape () or (channels,) or blocked, float32.
        zero_point: Same shape, int32.
        scale_origin: The ONNX tensor that holds the scale.
        zero_origin: The ONNX tensor that holds the zero point; empty where there is none.
        dtype: Of the integers.
        axis: Of the channels; ``None`` for one scale.
        block_size: See :class:`~deploycnn.graph.bridge.fake_quant.FakeQuantize`.
    """

    scale: Array
    zero_point: Array
    scale_origin: str
    zero_origin: str
    dtype: str
    axis: int | None
    block_size: int = 0

    @property
    def key(self) -> tuple[object, ...]:
        """What quantizers have in common that round alike."""
        return (self.scale_origin, self.zero_origin, self.dtype, self.axis, self.block_size)

    def equals(self, other: Rounding) -> bool:
        """Whether both round alike, wherever their parameters are stored."""
        return (
            (self.dtype, self.axis, self.block_size) == (other.dtype, other.axis, other.block_size)
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedConstant:
    """A constant that reaches its reader through integers.

    Attributes:
        master: Its float32 value, from which the integers are rounded in every forward pass.
        origin: The ONNX tensor that it is written into.
        stored_as_integers: Whether that tensor holds integers.
        rounding: Scale, zero point and type.
        undo: Turns a trained master of this shape into the origin's layout.
        layout: As of :class:`Constant`.
        given: Whether the caller gave the master, so that the stored integers may not be its roundings.
    """

    master: Array
    origin: str
    stored_as_integers: bool
    rounding: Rounding
    undo: Change = same
    layout: tuple[str, ...] = ()
    given: bool = False

    @property
    def array(self) -> Array:
        """The master: layers look at its shape."""
        return self.master

    def changed(self, step: str, change: Change, undo: Change, axis: int | None) -> RoundedConstant:
        """The constant after ``change``, which ``undo`` reverts and which moves the channels to ``axis``."""
        before = self.undo
        return replace(
            self,
            master=change(self.master),
            undo=lambda array: before(undo(array)),
            layout=(*self.layout, step),
            rounding=replace(self.rounding, axis=axis),
        )


@dataclass(frozen=True, slots=True)
class Broken:
    """The output of a node that the bridge lacks; its readers are skipped."""


Value = fx.Node | Constant | RoundedConstant | Broken

#: Integer types that QuantizeLinear writes -> (smallest, largest).
INTEGER_RANGES = {
    "uint8": (0, 255),
    "int8": (-128, 127),
    "uint16": (0, 65535),
    "int16": (-32768, 32767),
    "uint4": (0, 15),
    "int4": (-8, 7),
    "uint2": (0, 3),
    "int2": (-2, 1),
    "int32": (-(2**31), 2**31 - 1),
}
