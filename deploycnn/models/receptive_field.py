"""Receptive fields through branching networks.

After Araujo, Norris and Sim, "Computing Receptive Fields of Convolutional Neural Networks" (Distill, 2019).

Along one image axis, position ``i`` of a feature map sees the input pixels from ``first + i * stride`` to
``last + i * stride``. Every layer maps these three numbers; where branches meet, the union is taken. Pixels
beyond the image's edge count, so a field may be larger than the image. A stride of 0 means that all positions
see the same pixels, as after global pooling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Span:
    """What the positions of a feature map see along one axis of the image."""

    first: Fraction = Fraction(0)
    last: Fraction = Fraction(0)
    stride: Fraction = Fraction(1)

    @property
    def size(self) -> int:
        """Pixels seen by one position."""
        return math.floor(self.last - self.first) + 1

    def window(self, kernel: int, stride: int | Fraction = 1, padding: int = 0, dilation: int = 1) -> Span:
        """After a convolution or pooling: output ``i`` covers inputs from ``i * stride - padding`` on."""
        reach = dilation * (kernel - 1) - padding
        return Span(self.first - padding * self.stride, self.last + reach * self.stride, self.stride * stride)

    def transposed(self, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> Span:
        """After a transposed convolution: output ``i`` sees inputs (i + padding - dilation * t) / stride.

        Bounds over all tap positions ``t``; between them, outputs may see one pixel less.
        """
        lowest = Fraction(padding - dilation * (kernel - 1), stride)
        return Span(
            self.first + math.ceil(lowest) * self.stride,
            self.last + Fraction(padding, stride) * self.stride,
            self.stride / stride,
        )

    def adaptive(self, given: int, wanted: int) -> Span:
        """After adaptive pooling from ``given`` to ``wanted`` positions."""
        if wanted == 1:
            return self.collapsed(given)
        widest = max(-(-(i + 1) * given // wanted) - i * given // wanted for i in range(wanted))
        return self.window(widest, Fraction(given, wanted))

    def resized(self, given: int, wanted: int, *, blends: bool) -> Span:
        """After interpolation; ``blends`` where neighbours are mixed, as by bilinear resizing."""
        reach = self.stride if blends else Fraction(0)
        return Span(self.first - reach, self.last + reach, self.stride * Fraction(given, wanted))

    def sliced(self, start: int, step: int) -> Span:
        """After taking every ``step``-th position from ``start`` on; a negative start is padding."""
        return Span(self.first + start * self.stride, self.last + start * self.stride, self.stride * step)

    def collapsed(self, positions: int) -> Span:
        """After everything was reduced to, or flattened into, one vector."""
        return Span(self.first, self.last + (positions - 1) * self.stride, Fraction(0))

    def union(self, other: Span, positions: int) -> Span | None:
        """Where two branches of ``positions`` positions meet; ``None`` where their strides do not fit."""
        one, two = self, other
        if one.stride != two.stride:
            if one.stride and two.stride:
                return None
            one, two = one.collapsed(positions), two.collapsed(positions)
        return Span(min(one.first, two.first), max(one.last, two.last), one.stride)


@dataclass(frozen=True, slots=True)
class Field:
    """Receptive field of a tensor.

    Attributes:
        spans: Along image height and width.
        axes: Which axes of the tensor are height and width; ``None`` once they are flattened or pooled away.
    """

    spans: tuple[Span, Span] = (Span(), Span())
    axes: tuple[int, int] | None = (2, 3)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.spans[0].size, self.spans[1].size

    def positions(self, shape: Sequence[int]) -> tuple[int, int]:
        """Height and width of the tensor itself."""
        return (shape[self.axes[0]], shape[self.axes[1]]) if self.axes else (1, 1)

    def collapsed(self, shape: Sequence[int], *, keep_axes: bool = False) -> Field:
        """After a reduction over, or flattening of, height and width of a tensor of ``shape``."""
        height, width = self.positions(shape)
        spans = self.spans[0].collapsed(height), self.spans[1].collapsed(width)
        return Field(spans, self.axes if keep_axes else None)


def union(fields: Sequence[tuple[Field, Sequence[int]]], shape: Sequence[int]) -> Field | None:
    """Field of a tensor of ``shape`` that every one of ``fields`` (each with its tensor's shape) flows into.

    An input whose height and width are 1 is broadcast: all positions see the same. ``None`` where the
    branches do not fit.
    """
    result: Field | None = None
    for given, given_shape in fields:
        field = given
        axes = next((other.axes for other, _ in fields if other.axes), None)
        if field.axes is None:
            field = Field(field.spans, axes)
        elif field.axes != axes:
            return None
        if axes is None:
            result = field if result is None else _merge(result, field, (1, 1))
            continue
        here = given_shape[axes[0]] if given.axes else 1, given_shape[axes[1]] if given.axes else 1
        there = shape[axes[0]], shape[axes[1]]
        spans = [
            span.collapsed(1) if own == 1 != whole else span
            for span, own, whole in zip(field.spans, here, there, strict=True)
        ]
        field = Field((spans[0], spans[1]), axes)
        result = field if result is None else _merge(result, field, there)
        if result is None:
            return None
    return result


def _merge(one: Field, two: Field, positions: tuple[int, int]) -> Field | None:
    height = one.spans[0].union(two.spans[0], positions[0])
    width = one.spans[1].union(two.spans[1], positions[1])
    return Field((height, width), one.axes) if height is not None and width is not None else None
