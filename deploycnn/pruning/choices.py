"""What the solver offers within a share of the latency: widths, and blocks beside them at several rates of exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from deploycnn.core import Table
from deploycnn.pruning.allocation import Ladder
from deploycnn.pruning.dropping import Dropping
from deploycnn.pruning.elimination import Problem
from deploycnn.pruning.groups import ChannelGroup
from deploycnn.pruning.latency_problem import cut
from deploycnn.pruning.solver import Solution, cheapest, solve

#: Rates that are tried, as multiples of that at which all blocks and all channels lose the same.
RATES = tuple(2.0**power for power in range(-6, 7))
#: Then those on both sides of the best so far.
NEARER = (2**0.5, 2**0.25)
#: Training losses that differ by less than this share are equal: the judge sees a few hundred images.
EQUAL = 0.05
#: Latencies that differ by no more than this share are equal: predicted ones, and a measured one and the goal.
WITHIN = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Widths and blocks.

    Attributes:
        steps: Of each ladder.
        dropped: Blocks that go.
        solution: Of the solver.
        predicted: Share of the dense latency.
        channels: That go, of all ladders.
        judged: Training loss before training; ``None`` where no block may go: then there is nothing to judge.
    """

    steps: tuple[int, ...]
    dropped: tuple[str, ...]
    solution: Solution
    predicted: float
    channels: int
    judged: float | None = None


@dataclass(slots=True, kw_only=True)
class Choices:
    """The solver's problem, and what it has offered so far.

    Attributes:
        model: Dense.
        groups: Prunable groups.
        found: Ladders, those whose ratio the recipe names with one step.
        posed: Variables: ladders, then blocks.
        dense_ms: Latency of the dense model, as the table's own measurement has it.
        dropping: Blocks that may go beside channels; ``None``: not asked for.
        tell: Told what is being done.
    """

    model: nn.Module
    groups: Sequence[ChannelGroup]
    found: Sequence[Ladder]
    posed: Problem
    dense_ms: float
    dropping: Dropping | None
    tell: Callable[[float, float, str], None]
    _judged: dict[tuple[int, ...], Choice] = field(default_factory=dict)

    def within(self, ratio: float) -> list[Choice] | None:
        """Choices predicted to take at most ``ratio`` of the dense latency; ``None`` where nothing is so fast.

        Blocks and channels are ranked in different units, and what channels are worth in the rise of the loss is not
        known before they are cut. So there is a choice for each of several rates of exchange, and each is judged.
        """
        dropping = self.dropping
        if dropping is None or not dropping.blocks:
            solution = solve(self.posed, ratio * self.dense_ms)
            return None if solution is None else [self._meant(solution)]
        unit = dropping.rate(self.posed.losses[: len(self.found)])
        offered: dict[float, Choice] = {}

        def attempt(rate: float) -> bool:
            solution = solve(self._at(rate), ratio * self.dense_ms)
            if solution is not None:
                offered[rate] = self._judge(solution, dropping)
                self.tell(len(offered), len(RATES) + 2 * len(NEARER), "blocks against channels")
            return solution is not None

        for rate in RATES:
            if not attempt(unit * rate):
                return None  # what can be reached does not depend on what it is worth
        for factor in NEARER:
            middle = min(offered, key=lambda rate: offered[rate].judged or 0.0)
            attempt(middle * factor)
            attempt(middle / factor)
        return list({choice.solution.levels: choice for choice in offered.values()}.values())

    def least(self) -> float:
        """The least share of the dense latency that can be reached, as predicted."""
        return self.posed.cost(cheapest(self.posed)) / self.dense_ms

    def fixed(self) -> float:
        """The share that no choice changes."""
        return max(0.0, self.posed.fixed) / self.dense_ms

    def _at(self, rate: float) -> Problem:
        count = len(self.found)
        channels = (rate * loss for loss in self.posed.losses[:count])
        return replace(self.posed, losses=(*channels, *self.posed.losses[count:]))

    def _meant(self, solution: Solution) -> Choice:
        """What levels mean for the model."""
        steps = tuple(ladder.steps[level] for ladder, level in zip(self.found, solution.levels, strict=False))
        return Choice(
            steps=steps,
            dropped=self.dropping.names(solution.levels) if self.dropping is not None else (),
            solution=solution,
            predicted=solution.cost / self.dense_ms,
            channels=sum(
                step * ladder.atoms.shape[1] for ladder, step in zip(self.found, steps, strict=True)
            ),
        )

    def _judge(self, solution: Solution, dropping: Dropping) -> Choice:
        known = self._judged.get(solution.levels)
        if known is None:
            choice = self._meant(solution)
            pruned = cut(self.model, self.groups, self.found, choice.steps, choice.dropped)
            known = self._judged[solution.levels] = replace(choice, judged=dropping.judge(pruned))
        return known

    def table(self, kept: Choice) -> Table:
        """All that was judged, for the report."""
        rows = sorted(self._judged.values(), key=lambda choice: (len(choice.dropped), choice.channels))
        return Table(
            title="Blocks against channels: what the solver offered",
            columns=(
                "blocks dropped",
                "channels removed",
                "latency predicted, share of dense",
                "training loss before recovery",
                "kept",
            ),
            rows=tuple(
                (len(row.dropped), row.channels, row.predicted, row.judged, row is kept) for row in rows
            ),
        )


def best(offers: Sequence[Choice]) -> Choice:
    """The one of least training loss; where some are equal to it as far as can be told, the best of the largest."""
    if len(offers) == 1:
        return offers[0]
    losses = [choice.judged for choice in offers if choice.judged is not None]
    limit = min(losses) * (1 + EQUAL)
    equal = [(loss, choice) for loss, choice in zip(losses, offers, strict=True) if loss <= limit]
    largest = max(choice.predicted for _, choice in equal)
    large = [pair for pair in equal if pair[1].predicted >= largest * (1 - WITHIN)]
    return min(large, key=lambda pair: pair[0])[1]
