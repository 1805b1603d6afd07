"""Axes and label placement for the report's plots: plain geometry in SVG user units (y grows downwards)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

#: Above this ratio of largest to smallest, a linear axis squeezes the fast end together.
LOG_FROM = 4.0
#: Width of an average character of 12 px text, and the height of its line.
CHAR_WIDTH, LINE_HEIGHT = 6.7, 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A position on an axis and what is written there."""

    at: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Maps ``low..high`` to ``start..end`` (``end`` may be smaller than ``start``: a vertical axis)."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[Tick, ...] = ()

    def place(self, value: float) -> float:
        """Where ``value`` lies; values outside are held at the ends."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def plain_number(value: float) -> str:
    """A tick's value without zeros that say nothing."""
    return f"{value:.6g}"


def axis(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    label: Callable[[float], str] = plain_number,
    margin: float = 0.06,
    log: bool | None = None,
    ticks: int = 6,
) -> Axis:
    """An axis around ``values`` with a margin, and about ``ticks`` ticks at round numbers.

    Args:
        values: What must fit; at least one.
        start: Where the low end lies.
        end: Where the high end lies.
        label: Writes a tick's value.
        margin: Share of the range left free at either end.
        log: Force the kind; ``None`` takes a logarithmic axis for positive values that span more than
            :data:`LOG_FROM`.
        ticks: About how many.
    """
    known = list(values)
    low, high = min(known), max(known)
    if log is None:
        log = low > 0 and high / low > LOG_FROM
    if log:
        room = (high / low) ** margin if high > low else 1.2
        low, high = low / room, high * room
        marks = _log_ticks(low, high, ticks)
    else:
        room = (high - low) * margin if high > low else abs(high) * 0.1 or 0.5
        low, high = low - room, high + room
        marks = _linear_ticks(low, high, ticks)
    bare = Axis(low=low, high=high, start=start, end=end, log=log)
    placed = tuple(Tick(at=bare.place(mark), text=label(mark)) for mark in marks)
    return Axis(low=low, high=high, start=start, end=end, log=log, ticks=placed)


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((power * factor for factor in (1, 2, 2.5, 5) if power * factor >= raw), power * 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    found: list[float] = []
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [10.0**power * factor for power in powers for factor in factors]
        found = [mark for mark in found if low <= mark <= high]
        if len(found) >= min(count, 4):
            break
    return found[:: max(1, math.ceil(len(found) / (count * 1.5)))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle that a label should not cover, or the label itself."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Shared area."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return width * height if width > 0 and height > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """Text centred at ``x, y``, with a leader from ``from_x, from_y`` where it had to go far."""

    x: float
    y: float
    text: str
    from_x: float
    from_y: float
    leader: bool


def _around(x: float, y: float, width: float) -> Box:
    half = LINE_HEIGHT / 2
    return Box(left=x - width / 2, right=x + width / 2, top=y - half, bottom=y + half)


def place_labels(
    anchors: Sequence[tuple[float, float, str]], obstacles: Sequence[Box], frame: Box
) -> list[Label]:
    """Put a label beside each anchor so that it covers no other label and as few obstacles as possible.

    Greedy: anchors in the given order, each takes the candidate (eight directions, growing distance) with the
    least cost. A few dozen labels at most, so nothing cleverer is needed.
    """
    taken: list[Box] = []
    labels = []
    for x, y, text in anchors:
        width = CHAR_WIDTH * len(text) + 4
        best: tuple[float, float, float, float, Box] | None = None
        for distance in (9.0, 18.0, 32.0, 50.0, 72.0):
            for dx, dy in ((1, -1), (-1, -1), (1, 1), (-1, 1), (0, -1), (0, 1), (1, 0), (-1, 0)):
                cx = x + dx * (distance + width / 2)
                cy = y + dy * (distance + LINE_HEIGHT / 2 - (3 if dx else 0))
                box = _around(cx, cy, width)
                area = width * LINE_HEIGHT
                cost = distance / 10
                cost += 100 * sum(box.overlap(other) for other in taken) / area
                cost += 20 * sum(box.overlap(other) for other in obstacles) / area
                cost += 200 * (1 - box.overlap(frame) / area)
                if best is None or cost < best[0]:
                    best = (cost, cx, cy, distance, box)
        assert best is not None  # noqa: S101 - for the type checker: the loops above are never empty
        _, cx, cy, distance, box = best
        taken.append(box)
        labels.append(
            Label(x=round(cx, 1), y=round(cy, 1), text=text, from_x=x, from_y=y, leader=distance > 18)
        )
    return labels
