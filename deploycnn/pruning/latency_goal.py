"""Prune to a share of the dense model's latency on a target: predict, solve, measure, correct."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from deploycnn.core import Json, Table
from deploycnn.errors import PassRequirementError
from deploycnn.latency.layers import Layer
from deploycnn.latency.model import LatencyTable
from deploycnn.pruning.allocation import Ladder, pinned
from deploycnn.pruning.choices import WITHIN, Choice, Choices, best
from deploycnn.pruning.dropping import Block, Dropping
from deploycnn.pruning.groups import ChannelGroup
from deploycnn.pruning.latency_problem import cut, draw, layer_rows, posed_problem

if TYPE_CHECKING:
    from onnx import ModelProto

    from deploycnn.latency.measure import Bench, Kept

#: Races of what was chosen, after which the model is corrected or believed.
RACES = 8
#: Races of one choice before it is believed: the nearest of several single races is near by chance as well.
ENOUGH = 2
#: A single race may be this far from the next one. What is no farther off is raced again, not corrected: a correction
#: by noise leads away from the goal, and each one takes a choice and its races.
NOISE = 0.06


@dataclass(slots=True, kw_only=True)
class _Try:
    """A choice, and what was measured of it.

    Attributes:
        choice: Widths and blocks.
        races: With the dense model; none where only a table knows the target.
        graph: As it would be deployed, once it is raced.
    """

    choice: Choice
    races: list[Kept] = field(default_factory=list)
    graph: ModelProto | None = None

    @property
    def ratio(self) -> float:
        """Mean of the races."""
        return float(np.exp(np.mean([np.log(race.measured_ratio) for race in self.races])))

    def off(self, asked: float) -> float:
        """By how much what was measured differs from what was asked for, as a share of that; 0 where not measured."""
        return abs(self.ratio / asked - 1) if self.races else 0.0

    def wrong(self, asked: float) -> bool:
        """It was measured to miss what was asked for, as far as its races can tell."""
        return self.off(asked) > (WITHIN if len(self.races) >= ENOUGH else NOISE)

    def to_json(self) -> Json:
        """As plain values."""
        found: dict[str, Json] = {
            "predicted_ratio": self.choice.predicted,
            "predicted_ms": self.choice.solution.cost,
            "loss": self.choice.solution.loss,
            "bound": self.choice.solution.bound,
        }
        if self.choice.judged is not None:
            found |= {"dropped_blocks": list(self.choice.dropped), "training_loss": self.choice.judged}
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
    _tables: list[Table] = field(default_factory=list)

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
        found = pinned(found)
        choices = Choices(
            model=model,
            groups=groups,
            found=found,
            posed=posed_problem(model, self.layers, groups, found, table, self.blocks),
            dense_ms=table.dense_ms,
            dropping=self.dropping,
            tell=self.tell,
        )
        tries: list[_Try] = []
        for race in range(RACES if self.bench is not None else 1):
            wrong = not tries or tries[-1].wrong(self.ratio)
            if wrong and (not self._next_try(tries, choices) or len(tries[-1].races) >= ENOUGH):
                break  # nothing else, or the same again, and known to be off
            if self.bench is None:
                break
            self.tell(race, RACES, "measuring the pruned model on the target")
            now = tries[-1]
            if now.graph is None:
                now.graph = self.bench.export(cut(model, groups, found, now.choice.steps, now.choice.dropped))
            now.races.append(self.bench.ratio(now.graph, again=len(now.races)))
            if len(now.races) >= ENOUGH and now.off(self.ratio) <= WITHIN:
                break
        kept = self._kept(tries)
        self.record = {
            "asked_ratio": self.ratio,
            "met": not self._too_slow(kept) if kept.races else None,
            "words": self._words(kept, len(tries), table),
            "runtime": table.runtime,
            "precision": table.precision,
            "batch_size": table.batch_size,
            "threads": table.threads,
            "step": table.step,
            **kept.to_json(),
            "tried": [item.to_json() for item in tries],
            "table": {
                "error": asdict(table.error) if table.error else None,
                "environment": table.environment,
                "untimed": list(table.untimed),
            },
            "layers": layer_rows(
                model, self.layers, groups, found, kept.choice.solution, table, self._gone(kept.choice)
            ),
        }
        if self.dropping is not None:
            self.record |= {"dropped_blocks": list(kept.choice.dropped), "why_no_block": self.dropping.why}
            self._tables = [self.dropping.table(kept.choice.dropped), choices.table(kept.choice)]
        return list(kept.choice.steps), kept.choice.dropped

    def _gone(self, choice: Choice) -> frozenset[str]:
        """Layers in blocks that are dropped."""
        return frozenset[str]().union(
            *(block.layers for block in self.blocks if block.name in choice.dropped)
        )

    def _too_slow(self, item: _Try) -> bool:
        return bool(item.races) and item.ratio > self.ratio * (1 + WITHIN)

    def _kept(self, tries: Sequence[_Try]) -> _Try:
        """The last, where it is fast enough for good: what was nearer was too slow, or loses more. Else the nearest."""
        last = tries[-1]
        if not last.races or (len(last.races) >= ENOUGH and not self._too_slow(last)):
            return last
        # What was raced once may be as near by chance.
        return min(tries, key=lambda item: item.off(self.ratio) + WITHIN / max(1, len(item.races)))

    def _words(self, kept: _Try, tries: int, table: LatencyTable) -> str:
        """The outcome in a sentence."""
        threads = f"{table.threads} thread{'' if table.threads == 1 else 's'}"
        where = f"in {table.runtime}, {table.precision}, batch {table.batch_size}, {threads}"
        if table.untimed:
            more = f" and {len(table.untimed) - 3} more" if len(table.untimed) > 3 else ""
            where += f" (which tells no time of {', '.join(table.untimed[:3])}{more} alone)"
        if not kept.races:
            return (
                f"{kept.choice.predicted:.3f} of the dense latency predicted {where} ({self.ratio:g} asked for); not "
                "measured: the table is of another machine"
            )
        told = f"{kept.ratio:.3f} of the dense latency measured {where} ({self.ratio:g} asked for)"
        earlier = kept.to_json()["earlier"]
        if earlier:
            told += f"; raced on {earlier}, and kept on this machine"
        if kept.off(self.ratio) <= WITHIN:
            return told
        if not self._too_slow(kept):
            return f"{told}: faster than asked for, as nothing that is fast enough loses less"
        choices = "the only choice" if tries == 1 else f"the nearest of {tries} choices"
        return f"{told}: slower by more than {WITHIN:.0%}, {choices}"

    def _next_try(self, tries: list[_Try], choices: Choices) -> bool:
        """Choose by a prediction corrected by all races so far; a choice that comes again moves to the end.

        What was measured to be too slow is chosen again only if nothing else is offered.

        Returns:
            Whether there was anything to choose: what was raced is near the goal, and may be all that there is.

        Raises:
            PassRequirementError: the goal is out of reach by the first prediction.
        """
        errors = [
            np.log(race.measured_ratio / item.choice.predicted) for item in tries for race in item.races
        ]
        scale = float(np.exp(np.mean(errors))) if errors else 1.0
        offers = choices.within(self.ratio / scale)
        if offers is None and tries:
            return False
        if offers is None:
            raise PassRequirementError(self._out_of_reach(choices, scale))
        slow = {item.choice.solution.levels for item in tries if self._too_slow(item)}
        choice = best([offer for offer in offers if offer.solution.levels not in slow] or offers)
        same = [item for item in tries if item.choice.solution.levels == choice.solution.levels]
        if same:
            tries.remove(same[0])
        for item in tries:
            item.graph = None  # it may be large
        tries.append(same[0] if same else _Try(choice=choice))
        return True

    def _out_of_reach(self, choices: Choices, scale: float) -> str:
        mend = "raise it or max_ratio, or lower round_to"
        if self.dropping is None:
            mend += ", or let blocks go as well (drop_blocks: true)"
        elif self.dropping.why:
            mend += f"; no block can go, as {self.dropping.why}"
        return (
            f"prune.latency_ratio: {self.ratio:g} is out of reach, the fastest reachable is "
            f"{choices.least() * scale:.3f} of the dense latency ({choices.fixed() * scale:.3f} of it is spent where "
            f"no width changes); {mend}"
        )

    def tables(self) -> list[Json]:
        """For the report."""
        return [
            *(table.to_json() for table in self._tables if table.rows),
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
