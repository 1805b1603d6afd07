"""Sessions that take simulated time, so that the timing is tested without waiting and without noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from deploycnn.profiling.rows import TimingRow
from deploycnn.runtimes.base import Executed, Session


@dataclass
class World:
    """A clock in nanoseconds that sessions advance, and a record of what happened in it."""

    now_ns: int = 0
    events: list[tuple[str, str]] = field(default_factory=list)
    open_sessions: int = 0
    last: Session | None = None

    def clock(self) -> int:
        return self.now_ns


class FakeSession(Session):
    """Takes ``latency_ns()`` per run; the first runs after another session ran take ten times as long."""

    def __init__(self, world: World, name: str, latency_ns: Callable[[], int], open_ns: int = 0) -> None:
        self.executed = Executed(provider="fake", precision="f32", threads=1)
        self.world, self.name, self.latency_ns = world, name, latency_ns
        self.since_switch = 0
        world.now_ns += open_ns
        world.open_sessions += 1
        world.events.append(("open", name))

    def run(self, images_NCHW: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        return [images_NCHW.reshape(len(images_NCHW), -1)]

    def bind(self, images_NCHW: npt.NDArray[np.float32]) -> Callable[[], None]:
        def call() -> None:
            if self.world.last is not self:
                self.world.last, self.since_switch = self, 0
                self.world.events.append(("switch", self.name))
            cold = 10 if self.since_switch < 2 else 1
            self.since_switch += 1
            self.world.now_ns += cold * self.latency_ns()

        return call

    def close(self) -> None:
        self.world.open_sessions -= 1
        self.world.events.append(("close", self.name))


def row_of(label: str, log_ms: npt.NDArray[np.float64], group: str = "g") -> TimingRow:
    """A row whose samples are ``exp(log_ms)``, shape (rounds, blocks, runs)."""
    samples = tuple(
        tuple(tuple(float(run) for run in block) for block in blocks) for blocks in np.exp(log_ms)
    )
    return TimingRow(
        label=label,
        runtime="fake:cpu",
        executed=Executed(provider="fake", precision="f32", threads=1),
        batch_size=4,
        threads=1,
        samples_ms=samples,
        warmup_runs=2,
        group=group,
    )
