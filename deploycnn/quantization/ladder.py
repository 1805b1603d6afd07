"""The repair ladder: cheap remedies first, dearer ones only while the budget is not met, each one's worth logged.

A rung changes a candidate (other ranges, equalized weights, corrected biases, learned rounding, layers in float,
trained weights). It is kept where the judged graph meets the budget or is better than the best so far, and undone
where it is not, so that a remedy that harms one model does not stay in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from deploycnn.core import Json
from deploycnn.errors import PassRequirementError
from deploycnn.quantization.judge import Judgement

if TYPE_CHECKING:
    from onnx import ModelProto

#: Whatever the rungs change; the ladder only hands it on.
Candidate = TypeVar("Candidate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung(Generic[Candidate]):
    """A remedy.

    Attributes:
        name: As it stands in the report.
        apply: From the best candidate so far to a new one.
        below_db: Left out where the best candidate so far has this signal-to-noise ratio.

    ``apply`` raises ``PassRequirementError`` where the remedy does not suit the model; the rung is then
    logged as not applicable, with the reason.
    """

    name: str
    apply: Callable[[Candidate], Candidate]
    below_db: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What a rung did.

    Attributes:
        rung: Its name.
        judgement: Of the graph with it; ``None`` where it could not be applied.
        kept: Whether it stayed.
        why: Why it did not.
        seconds: What it cost, judging included.
    """

    rung: str
    judgement: Judgement | None
    kept: bool
    why: str
    seconds: float

    def to_json(self) -> Json:
        """A row of the record."""
        figures = self.judgement.to_json() if self.judgement is not None else {}
        return {"rung": self.rung, "kept": self.kept, "why": self.why, "seconds": self.seconds, **figures}


@dataclass(frozen=True, slots=True, kw_only=True)
class Climb(Generic[Candidate]):
    """The end of a climb: the best candidate, its graph and judgement, and what was tried on the way."""

    candidate: Candidate
    model: ModelProto
    judgement: Judgement
    met: bool
    tried: tuple[Tried, ...]


def climb(
    start: Candidate,
    rungs: Sequence[Rung[Candidate]],
    build: Callable[[Candidate], ModelProto],
    judge: Callable[[ModelProto], Judgement],
    *,
    max_top1_drop: float | None,
    first: str,
    tell: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Climb[Candidate]:
    """Climb until the drop of top-1 is within the budget or the rungs are used up; all of them without a budget.

    Args:
        start: The first candidate.
        rungs: In the order in which they are tried.
        build: From a candidate to its graph.
        judge: Compares a graph with its float twin.
        max_top1_drop: The budget, a fraction of 1; ``None``: what makes the outputs less noisy stays.
        first: What the first candidate is called in the log.
        tell: Told what is being tried.
        clock: Seconds.
    """
    tell(first)
    started = clock()
    best = start
    model = build(best)
    judgement = judge(model)
    tried = [Tried(rung=first, judgement=judgement, kept=True, why="", seconds=clock() - started)]
    for rung in rungs:
        if _met(judgement, max_top1_drop):
            break
        if judgement.sqnr_db >= rung.below_db:
            continue
        tell(rung.name)
        started = clock()
        found, why = None, ""
        try:
            candidate = rung.apply(best)
        except PassRequirementError as error:
            why = str(error)
        else:
            graph = build(candidate)
            found = judge(graph)
            if _better(found, judgement, max_top1_drop):
                best, model, judgement = candidate, graph, found
            else:
                why = "not better than without it"
        tried.append(Tried(rung=rung.name, judgement=found, kept=not why, why=why, seconds=clock() - started))
    return Climb(
        candidate=best,
        model=model,
        judgement=judgement,
        met=_met(judgement, max_top1_drop),
        tried=tuple(tried),
    )


def _met(judgement: Judgement, max_top1_drop: float | None) -> bool:
    return max_top1_drop is not None and judgement.within(max_top1_drop)


def _better(new: Judgement, old: Judgement, max_top1_drop: float | None) -> bool:
    """Less noise in the outputs; with a budget, unless it drops top-1 further than the noise of counting explains.

    What meets the budget is better than what has not. SQNR ranks finely where top-1 cannot; but the images' classes are
    what counts, so a candidate that loses more than two standard errors of a paired difference is not better whatever
    its noise. Being right more often than the float model is luck on these images, and no merit.
    """
    if _met(new, max_top1_drop):
        return True
    if max_top1_drop is None or new.top1_drop is None or old.top1_drop is None:
        return new.sqnr_db > old.sqnr_db
    changed = max(1.0 - (new.agreement or 0.0), 1.0 - (old.agreement or 0.0), 1.0 / new.images)
    tolerated = 2.0 * (changed / new.images) ** 0.5
    difference = max(new.top1_drop, 0.0) - max(old.top1_drop, 0.0)
    if abs(difference) > tolerated:
        return difference < 0
    return new.sqnr_db > old.sqnr_db
