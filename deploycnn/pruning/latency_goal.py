"""Prune to a share of the dense model's latency on a target: predict, solve, measure, correct."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from deploycnn.core import Json, Table
from deploycnn.errors import PassRequirementError
from deploycnn.latency.layers import Layer
from deploycnn.latency.model import LatencyTable
from deploycnn.pruning.allocation import Ladder, pinned
from deploycnn.pruning.dropping import NEARER, RATES, Block, Dropping
from deploycnn.pruning.elimination import Problem
from deploycnn.pruning.groups import ChannelGroup
from deploycnn.pruning.latency_problem import cut, draw, layer_rows, posed_problem
from deploycnn.pruning.solver import Solution, cheapest, solve

if TYPE_CHECKING:
    from onnx import ModelProto

    from deploycnn.latency.measure import Bench, Kept

#: The goal counts as met when the measured share differs by no more than this share of it.
WITHIN = 0.02
#: Races of what was chosen, after which the model is corrected or believed.
RACES = 8
#: Races of one choice before it is believed: the nearest of several single races is near by chance as well.
ENOUGH = 2


@dataclass(slots=True, kw_only=True)
class _Try:
    """Widths and blocks, and what is known of their latency.

    Attributes:
        steps: Of each ladder.
        dropped: Blocks that are gone.
        solution: Of the solver.
        predicted: Share of the dense latency.
        races: With the dense model; none where only a table knows the target.
        graph: As it would be deployed, once it is raced.
    """

    steps: list[int]
    dropped: tuple[str, ...]
    solution: Solution
    predicted: float
    races: list[Kept] = field(default_factory=list)
    graph: ModelProto | None = None

    @property
    def ratio(self) -> float:
        """Mean of the races."""
        return float(np.exp(np.mean([np.log(race.measured_ratio) for race in self.races])))

    def off(self, asked: float) -> float:
        """By how much what was measured differs from what was asked for, as a share of that; 0 where not measured."""
        return abs(self.ratio / asked - 1) if self.races else 0.0

    def to_json(self) -> Json:
        """As plain values."""
        found: dict[str, Json] = {
            "predicted_ratio": self.predicted,
            "predicted_ms": self.solution.cost,
            "loss": self.solution.loss,
            "bound": self.solution.bound,
        }
        if self.races:
            dense_ms = float(np.mean([race.dense_ms for race in self.races]))
            found |= {
                "measured_ratio": self.ratio,
                "dense_ms": dense_ms,
                "measured_ms": self.ratio * dense_ms,
                "races": [race.measured_ratio for race in self.races],
                "earlier": next((race.earlier for race in self.races if race.earlier), ""),
            }
        return found


@dataclass(slots=True, kw_only=True)
class LatencyGoal:
    """A share of the dense latency to keep, and what knows latencies.

    Attributes:
        ratio: Of the dense latency, in (0, 1).
        layers: Of the model, with their kinds.
        bench: Measures on the target; ``None`` where only a table is there.
        table: Measured before, or ``None``: the bench measures one when it is needed.
        dropping: Blocks that may go beside channels; ``None``: none may.
        seed: Of random width configurations.
        tell: Told what is being done.
    """

    ratio: float
    layers: Sequence[Layer]
    bench: Bench | None
    table: LatencyTable | None = None
    dropping: Dropping | None = None
    seed: int = 0
    tell: Callable[[float, float, str], None] = lambda _done, _total, _message: None
    record: dict[str, Json] = field(default_factory=dict)

    def step(self) -> int:
        """The hardware's step."""
        return self.table.step if self.table is not None else self._bench().step()

    def _bench(self) -> Bench:
        if self.bench is None:
            raise TypeError("a goal without a table needs a bench")
        return self.bench

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Those that may go."""
        return self.dropping.blocks if self.dropping is not None else ()

    def choose(
        self, model: nn.Module, groups: Sequence[ChannelGroup], found: Sequence[Ladder]
    ) -> tuple[list[int], tuple[str, ...]]:
        """The step of each ladder, and the names of blocks to drop.

        Raises:
            PassRequirementError: the goal is out of reach; says what the fastest is.
        """
        table = self.table = self.table or self._bench().table(
            lambda generator: draw(groups, found, generator), seed=self.seed
        )
        dense_ms = posed_problem(model, self.layers, groups, found, table).cost([0] * len(found))
        found = pinned(found)
        posed = posed_problem(model, self.layers, groups, found, table, self.blocks)
        if self.dropping is not None:
            posed = self._exchanged(model, groups, found, posed, dense_ms, self.dropping)
        tries: list[_Try] = []
        for race in range(RACES if self.bench is not None else 1):
            if not tries or tries[-1].off(self.ratio) > WITHIN:
                self._next_try(tries, posed, dense_ms, found)
                if len(tries[-1].races) >= ENOUGH:
                    break  # the same again, and known to be off
            if self.bench is None:
                break
            self.tell(race, RACES, "measuring the pruned model on the target")
            now = tries[-1]
            if now.graph is None:
                now.graph = self.bench.export(cut(model, groups, found, now.steps, now.dropped))
            now.races.append(self.bench.ratio(now.graph, again=len(now.races)))
            if len(now.races) >= ENOUGH and now.off(self.ratio) <= WITHIN:
                break
        # What was raced once may be as near by chance.
        best = min(tries, key=lambda item: item.off(self.ratio) + WITHIN / max(1, len(item.races)))
        self.record = {
            "asked_ratio": self.ratio,
            "met": best.off(self.ratio) <= WITHIN if best.races else None,
            "words": self._words(best, len(tries), table),
            "runtime": table.runtime,
            "precision": table.precision,
            "batch_size": table.batch_size,
            "threads": table.threads,
            "step": table.step,
            **best.to_json(),
            "tried": [item.to_json() for item in tries],
            "table": {
                "error": asdict(table.error) if table.error else None,
                "environment": table.environment,
            },
            "layers": layer_rows(model, self.layers, groups, found, best.solution, table, self._gone(best)),
        }
        if self.dropping is not None:
            self.record |= {"dropped_blocks": list(best.dropped), "exchange": self.dropping.tried}
        return best.steps, best.dropped

    def _gone(self, now: _Try) -> frozenset[str]:
        """Layers in blocks that are dropped."""
        return frozenset[str]().union(*(block.layers for block in self.blocks if block.name in now.dropped))

    def _exchanged(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        found: Sequence[Ladder],
        posed: Problem,
        dense_ms: float,
        dropping: Dropping,
    ) -> Problem:
        """``posed``, with channels at the rate of exchange for blocks at which the training loss comes out least."""
        channels = posed.losses[: len(found)]
        unit = dropping.rate(channels)
        judged: dict[float, tuple[float, Problem]] = {}
        known: dict[tuple[int, ...], float] = {}

        def attempt(rate: float) -> None:
            self.tell(len(judged), len(RATES) + 2 * len(NEARER), "blocks against channels")
            scaled = replace(posed, losses=(*(rate * loss for loss in channels), *posed.losses[len(found) :]))
            levels = self._solve(scaled, dense_ms, 1.0).levels
            if levels not in known:
                steps, dropped = self._meant(found, levels)
                known[levels] = dropping.judge(cut(model, groups, found, steps, dropped))
                lost = sum(step * ladder.atoms.shape[1] for ladder, step in zip(found, steps, strict=True))
                dropping.note(rate, len(dropped), lost, known[levels])
            judged[rate] = (known[levels], scaled)

        for rate in RATES:
            attempt(unit * rate)
        for factor in NEARER:
            best = min(judged, key=lambda rate: judged[rate][0])
            attempt(best * factor)
            attempt(best / factor)
        return min(judged.values(), key=lambda item: item[0])[1]

    def _meant(self, found: Sequence[Ladder], levels: Sequence[int]) -> tuple[list[int], tuple[str, ...]]:
        """Steps of ladders and names of blocks at the solver's levels."""
        steps = [ladder.steps[level] for ladder, level in zip(found, levels, strict=False)]
        return steps, self.dropping.names(levels) if self.dropping is not None else ()

    def _words(self, best: _Try, rounds: int, table: LatencyTable) -> str:
        """The outcome in a sentence."""
        where = f"in {table.runtime}, {table.precision}, batch {table.batch_size}, {table.threads} threads"
        if not best.races:
            return (
                f"{best.predicted:.3f} of the dense latency predicted {where} ({self.ratio:g} asked for); not "
                "measured: the table is of another machine"
            )
        told = f"{best.ratio:.3f} of the dense latency measured {where} ({self.ratio:g} asked for)"
        earlier = best.to_json()["earlier"]
        if earlier:
            told += f"; raced on {earlier}, and kept on this machine"
        if best.off(self.ratio) <= WITHIN:
            return told
        return f"{told}: off by more than {WITHIN:.0%}, the nearest of {rounds} choices of widths"

    def _next_try(self, tries: list[_Try], posed: Problem, dense_ms: float, found: Sequence[Ladder]) -> None:
        """Choose by a prediction corrected by all races so far; a choice that comes again moves to the end."""
        errors = [np.log(race.measured_ratio / item.predicted) for item in tries for race in item.races]
        solution = self._solve(posed, dense_ms, float(np.exp(np.mean(errors))) if errors else 1.0)
        steps, dropped = self._meant(found, solution.levels)
        same = [item for item in tries if (item.steps, item.dropped) == (steps, dropped)]
        if same:
            tries.remove(same[0])
        for item in tries:
            item.graph = None  # it may be large
        new = _Try(steps=steps, dropped=dropped, solution=solution, predicted=solution.cost / dense_ms)
        tries.append(same[0] if same else new)

    def _solve(self, posed: Problem, dense_ms: float, scale: float) -> Solution:
        solution = solve(posed, self.ratio * dense_ms / scale)
        if solution is None:
            least = posed.cost(cheapest(posed)) * scale / dense_ms
            fixed = max(0.0, posed.fixed) * scale / dense_ms
            mend = "raise it or max_ratio, or lower round_to"
            if self.dropping is None:
                mend += ", or let blocks go as well (drop_blocks: true)"
            raise PassRequirementError(
                f"prune.latency_ratio: {self.ratio:g} is out of reach, the fastest reachable is {least:.3f} of the "
                f"dense latency ({fixed:.3f} of it is spent where no width changes); {mend}"
            )
        return solution

    def tables(self) -> list[Json]:
        """For the report."""
        blocks = self.dropping.tables(self.record["dropped_blocks"]) if self.dropping is not None else []
        return [
            *(table.to_json() for table in blocks),
            Table(
                title="Widths and predicted latency of each layer",
                columns=(
                    "layer",
                    "in before",
                    "in after",
                    "out before",
                    "out after",
                    "ms before",
                    "ms after",
                ),
                rows=tuple(
                    (
                        row["layer"],
                        *row["in"],
                        *row["out"],
                        *(round(ms, 5) for ms in row["ms"]),
                    )
                    for row in self.record["layers"]
                ),
            ).to_json(),
        ]
