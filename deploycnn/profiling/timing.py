"""Time models side by side, in interleaved blocks over sessions that are opened anew several times.

Why not one loop per model: a machine drifts (clocks, heat, other guests), so models timed one after the other
are timed on different machines. And why not alternate single runs: thread pools that still spin after a run
disturb the next one. So::

    for each round:                    sessions of all candidates are opened anew, in random order
        for each block:                candidates in random order
            warm-up runs, discarded    the previous candidate's threads go to sleep, caches fill
            timed runs                 kept, one by one
        sessions are closed

A session, once opened, may be some percent faster or slower than the next one of the same file (memory
layout). More runs do not average that away, more sessions do: rounds are the sample size, and blocks of one
round are paired (``statistics.compare``).
"""

from __future__ import annotations

import functools
import gc
import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from deploycnn.core import ProgressFn, no_progress
from deploycnn.errors import DeployCNNError
from deploycnn.gpu import nvml
from deploycnn.profiling.disturbance import Meter
from deploycnn.profiling.rows import TimingRow

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from deploycnn.gpu.nvml import Watch
    from deploycnn.runtimes.base import Executed, Session


#: Multiple of the budget after which no further round is begun, when others slow the machine down. Stopping
#: then favours no candidate: it depends on the clock, not on who is ahead.
OVERTIME = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingSettings:
    """How long and how to time.

    Attributes:
        budget_s: Seconds for each candidate, opening its sessions included. The minimum counts come first: a
            model so slow that they do not fit takes longer.
        rounds: How often sessions are opened anew, at most; 3 or more.
        min_rounds: How often at least, where ``rounds`` allows so many.
        blocks: Blocks of runs in a round, at most.
        min_runs: Timed runs in a block, at least.
        max_runs: Timed runs in a block, at most.
        warmup_runs: Runs discarded after every switch of candidate, at least.
        warmup_s: Time that they last, at least: the previous candidate's threads spin on for milliseconds.
        seed: Of the random orders.
    """

    budget_s: float = 6.0
    rounds: int = 20
    min_rounds: int = 6
    blocks: int = 3
    min_runs: int = 3
    max_runs: int = 200
    warmup_runs: int = 2
    warmup_s: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that give no interval."""
        if self.rounds < 3 or self.min_rounds < 3:
            raise ValueError(f"rounds and min_rounds must be 3 or more, got {self.rounds}, {self.min_rounds}")
        if not 1 <= self.min_runs <= self.max_runs or self.blocks < 1 or self.warmup_runs < 1:
            raise ValueError("min_runs, blocks and warmup_runs must be 1 or more, and max_runs >= min_runs")
        if not (self.budget_s > 0 and self.warmup_s >= 0):
            raise ValueError(
                f"budget_s must be above 0 and warmup_s not below, got {self.budget_s}, {self.warmup_s}"
            )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something to time.

    Attributes:
        label: Unique among the candidates that are timed together.
        runtime: ``name:mode``, for the record.
        batch_size: Images in one run.
        threads: Threads that the session is asked to use.
        images_NCHW: float32, ``batch_size`` preprocessed images; every run sees these.
        open: Opens a new session.
    """

    label: str
    runtime: str
    batch_size: int
    threads: int
    images_NCHW: npt.NDArray[np.float32]  # noqa: N815 - the house style for shapes
    open: Callable[[], Session]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Counts, the same in all rounds; ``runs`` and ``warmup`` per candidate and block."""

    rounds: int
    blocks: int
    runs: tuple[int, ...]
    warmup: tuple[int, ...]


@dataclass(slots=True)
class _Live:
    candidate: Candidate
    executed: Executed | None = None
    latency_s: float = 0.0
    open_s: float = 0.0
    samples_ms: list[list[list[float]]] = field(default_factory=list)
    why: str = ""


def make_schedule(
    latencies_s: Sequence[float], opens_s: Sequence[float], settings: TimingSettings
) -> Schedule:
    """Share the time out.

    As many rounds as fit (each a session of every candidate and one block with at least twice as much timing
    as warm-up); what is left then goes into more blocks per round, then into longer blocks.

    Args:
        latencies_s: Seconds per run, by candidate.
        opens_s: Seconds to open a session, by candidate.
        settings: Budget and limits.
    """
    count = len(latencies_s)
    warmup = [max(settings.warmup_runs, math.ceil(settings.warmup_s / latency)) for latency in latencies_s]
    warmups_s = [runs * latency for runs, latency in zip(warmup, latencies_s, strict=True)]
    needs_s = sum(
        warm + max(settings.min_runs * latency, min(2 * warm, settings.max_runs * latency))
        for warm, latency in zip(warmups_s, latencies_s, strict=True)
    )
    total_s = settings.budget_s * count
    rounds = int(total_s / (needs_s + sum(opens_s)))
    rounds = min(settings.rounds, max(settings.min_rounds, rounds))  # where they clash, `rounds` wins
    round_s = total_s / rounds - sum(opens_s)
    blocks = min(settings.blocks, max(1, int(round_s / needs_s)))
    share_s = round_s / blocks / count
    runs = [
        min(settings.max_runs, max(settings.min_runs, int((share_s - warm) / latency)))
        for warm, latency in zip(warmups_s, latencies_s, strict=True)
    ]
    return Schedule(rounds=rounds, blocks=blocks, runs=tuple(runs), warmup=tuple(warmup))


def time_interleaved(
    candidates: Sequence[Candidate],
    settings: TimingSettings | None = None,
    progress: ProgressFn = no_progress,
    *,
    clock: Callable[[], int] = time.perf_counter_ns,
    meter: Callable[[], Meter] = Meter,
    gpu: Callable[[], Watch | None] = nvml.watch,
) -> list[TimingRow]:
    """Time all candidates side by side.

    A candidate that cannot be opened or run gives a row without samples that says why, and does not stop the
    others. Rows of one call share ``group``: only these may be compared with one another.

    Args:
        candidates: Unique labels. They should want the same threads and batch size to be worth comparing.
        settings: Defaults suit models from 0.05 ms up.
        progress: Called about once per block.
        clock: Nanoseconds.
        meter: Makes the meter of disturbances.
        gpu: Finds what tells of the GPU; asked only where something runs on it.

    Returns:
        A row for each candidate, in their order.
    """
    settings = settings or TimingSettings()
    labels = [candidate.label for candidate in candidates]
    if len(set(labels)) != len(labels):
        raise ValueError(f"labels must be unique, got {labels}")
    lives = [_Live(candidate) for candidate in candidates]
    progress(0, 1, "opening models")
    for live in lives:
        with _excused(live):
            _probe(live, clock)
    running = [live for live in lives if not live.why]
    warmup: dict[str, int] = {}
    watch = meter()
    if any(live.executed is not None and live.executed.device == "cuda" for live in running):
        watch.watch_gpu(gpu())
    if running:
        schedule = make_schedule(
            [live.latency_s for live in running], [live.open_s for live in running], settings
        )
        warmup = {live.candidate.label: runs for live, runs in zip(running, schedule.warmup, strict=True)}
        counts = {live.candidate.label: runs for live, runs in zip(running, schedule.runs, strict=True)}
        random = Random(settings.seed)  # noqa: S311 - an order, not a secret
        deadline = clock() + OVERTIME * settings.budget_s * len(running) * 1e9
        for number in range(schedule.rounds):
            if number >= settings.min_rounds and clock() > deadline:
                break
            report = functools.partial(_report, progress, watch, len(running), schedule, number)
            _round(running, schedule, (warmup, counts), random, clock, report)
    disturbance = watch.stop()
    group = uuid.uuid4().hex[:12]
    return [
        TimingRow(
            label=live.candidate.label,
            runtime=live.candidate.runtime,
            batch_size=live.candidate.batch_size,
            threads=live.candidate.threads,
            executed=live.executed,
            samples_ms=() if live.why else _frozen(live.samples_ms),
            warmup_runs=warmup.get(live.candidate.label, 0),
            group=group,
            disturbance=disturbance,
            why=live.why,
        )
        for live in lives
    ]


def _report(
    progress: ProgressFn, watch: Meter, models: int, schedule: Schedule, number: int, block: int
) -> None:
    watch.sample()
    total = schedule.rounds * schedule.blocks
    progress(number * schedule.blocks + block, total, f"timing {models} models side by side")


def _round(
    running: Sequence[_Live],
    schedule: Schedule,
    counts: tuple[dict[str, int], dict[str, int]],
    random: Random,
    clock: Callable[[], int],
    report: Callable[[int], None],
) -> None:
    """Open everything anew, time ``schedule.blocks`` blocks, close everything."""
    warmup, runs = counts
    order = [live for live in running if not live.why]
    random.shuffle(order)
    with ExitStack() as stack:
        calls = {}
        for live in order:
            with _excused(live):
                session = live.candidate.open()
                stack.callback(session.close)
                calls[live.candidate.label] = session.bind(live.candidate.images_NCHW)
                live.samples_ms.append([])
        for block in range(schedule.blocks):
            random.shuffle(order)
            for live in order:
                label = live.candidate.label
                if live.why:
                    continue
                with _excused(live):
                    for _ in range(warmup[label]):
                        calls[label]()
                    live.samples_ms[-1].append(_timed(calls[label], runs[label], clock))
            report(block + 1)
        calls.clear()


def _timed(call: Callable[[], float | None], runs: int, clock: Callable[[], int]) -> list[float]:
    """Milliseconds of each run: what the device measured where the call tells, else what ``clock`` says.

    Meanwhile no garbage is collected: that is Python's time, not the model's.
    """
    samples = [0.0] * runs
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(runs):
            start = clock()
            measured_ms = call()
            stop = clock()
            samples[index] = (stop - start) / 1e6 if measured_ms is None else measured_ms
    finally:
        if collecting:
            gc.enable()
    return samples


def _probe(live: _Live, clock: Callable[[], int]) -> None:
    """Open one session to learn what it costs: to open, and to run (the best of a few, at least 0.1 us)."""
    start = clock()
    session = live.candidate.open()
    try:
        call = session.bind(live.candidate.images_NCHW)
        call()
        live.open_s = (clock() - start) / 1e9
        # three runs tell enough of a slow model; a fast one needs more to leave its first, slow runs behind
        best = min(_timed(call, 3, clock))
        if best < 20:
            best = min(best, *_timed(call, 10, clock))
        live.latency_s = max(best / 1e3, 1e-7)
        live.executed = session.executed
    finally:
        session.close()


@contextmanager
def _excused(live: _Live) -> Iterator[None]:
    """Note an error that the user can mend on the candidate, and go on without it."""
    try:
        yield
    except DeployCNNError as error:
        live.why = str(error)


def _frozen(samples: list[list[list[float]]]) -> tuple[tuple[tuple[float, ...], ...], ...]:
    return tuple(tuple(tuple(block) for block in blocks) for blocks in samples)
