"""Values that share one scale, and the plan of a rounded value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from onnx import numpy_helper

from deploycnn.quantization.disjoint import DisjointSets
from deploycnn.quantization.structure import FIXED_RANGES, Structure
from deploycnn.quantization.types import ActivationPlan, Range


class Ties:
    """Groups of values with one scale, called after a member.

    A group knows what values its members can take and what they must not exceed: where a ReLU or clip has
    become the range of a member, the group's range must end where the clip does.
    """

    def __init__(self, possible: Mapping[str, Range], limits: Mapping[str, Range]) -> None:
        """Start with every value by itself.

        Args:
            possible: What a value can be at most, by value (``Structure.possible``).
            limits: Bounds of the clips that became the range of a value, by value.
        """
        self._sets = DisjointSets()
        self._possible = dict(possible)
        self._limit = dict(limits)

    def find(self, value: str) -> str:
        """The group of a value."""
        return self._sets.find(value)

    def tie(self, first: str, second: str) -> None:
        """Make two groups one, called as the first's."""
        left, right = self.find(first), self.find(second)
        if left == right:
            return
        self._sets.join(left, right)
        self._possible[left] = _hull(self._possible[left], self._possible[right])
        limits = [self._limit[group] for group in (left, right) if group in self._limit]
        if limits:
            self._limit[left] = max(low for low, _ in limits), min(high for _, high in limits)

    def join(self, joined: str, parts: Iterable[str]) -> None:
        """Tie what a Concat joins to what it makes, as much of it as agrees.

        Parts of which a clip became the range go together only with values that stay within its bounds. The
        larger party is tied; the runtime rescales the rest.
        """
        groups = list(dict.fromkeys(self.find(part) for part in parts))
        party = [group for group in groups if group not in self._limit]
        whole = self._possible[self.find(joined)]
        for limit in dict.fromkeys(self._limit[group] for group in groups if group in self._limit):
            alike = [
                group
                for group in groups
                if _within(self._possible[group], limit) and self._limit.get(group, limit) == limit
            ]
            if _within(whole, limit) and len(alike) > len(party):
                party = alike
        for group in party:
            self.tie(joined, group)

    def groups(self, members: Collection[str]) -> dict[str, str | None]:
        """The group of each of ``members``; ``None`` where no other of them is in it."""
        found = {member: self.find(member) for member in members}
        sizes = Counter(found.values())
        return {member: group if sizes[group] > 1 else None for member, group in found.items()}


def _hull(first: Range, second: Range) -> Range:
    return min(first[0], second[0]), max(first[1], second[1])


def _within(inner: Range, outer: Range) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def plan_activation(
    value: str, readers: Iterable[str] | None, graph: Structure, tied: str | None
) -> ActivationPlan:
    """``readers`` becomes ``None`` where it is all of them, graph outputs included."""
    names = frozenset(readers) if readers is not None else None
    if names is not None and value not in graph.outputs:
        names = names if {node.name for node in graph.read_by.get(value, ())} - names else None
    maker = graph.made_by.get(value)
    fixed = FIXED_RANGES.get(maker.op_type) if maker is not None else None
    if value in graph.constants:
        array = numpy_helper.to_array(graph.constants[value])
        fixed = float(min(np.min(array), 0.0)), float(max(np.max(array), 0.0))
    return ActivationPlan(
        value=value,
        readers=names,
        tied=tied,
        fixed=fixed,
    )
