from __future__ import annotations

import gc
import json
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploycnn.errors import ArtifactError, RuntimeUnavailable
from deploycnn.gpu import nvml
from deploycnn.profiling.disturbance import CpuTimes, Disturbance, Meter, parse_cpu_times
from deploycnn.profiling.rows import TimingRow
from deploycnn.profiling.timing import OVERTIME, Candidate, TimingSettings, make_schedule, time_interleaved
from deploycnn.runtimes.base import Executed, Session
from tests.gpu.fakes import Nvml
from tests.profiling.fakes import FakeSession, World

IMAGES = np.zeros((1, 3, 2, 2), dtype=np.float32)


def candidate(world: World, name: str, latency_ns: Callable[[], int] | int, open_ns: int = 1000) -> Candidate:
    latency = latency_ns if callable(latency_ns) else lambda: latency_ns
    return Candidate(
        label=name,
        runtime="fake:cpu",
        batch_size=1,
        threads=1,
        images_NCHW=IMAGES,
        open=lambda: FakeSession(world, name, latency, open_ns),
    )


def quiet_meter() -> Meter:
    return Meter(read=lambda: None, load=lambda: None, clock=lambda: 0.0)


def timed(world: World, candidates: list[Candidate], **settings: float) -> list[TimingRow]:
    return time_interleaved(
        candidates, TimingSettings(**settings), clock=world.clock, meter=quiet_meter  # type: ignore[arg-type]
    )  # fmt: skip


def test_samples_are_the_runs_times_and_hold_no_warm_up() -> None:
    world = World()
    rows = timed(world, [candidate(world, "a", 1_000_000), candidate(world, "b", 2_000_000)], budget_s=1.0)
    # the first two runs after each switch take ten times as long: none of them may be among the samples
    assert set(rows[0].flat_ms) == {1.0}
    assert set(rows[1].flat_ms) == {2.0}
    assert rows[0].executed is not None
    assert rows[0].executed.provider == "fake"
    assert rows[0].group == rows[1].group


def test_every_round_opens_new_sessions_side_by_side_and_closes_them() -> None:
    world = World()
    rows = timed(world, [candidate(world, "a", 1_000_000), candidate(world, "b", 1_000_000)], rounds=7)
    assert len(rows[0].samples_ms) == 7
    assert world.open_sessions == 0
    # one more opening each: the probe
    for name in ("a", "b"):
        assert world.events.count(("open", name)) == world.events.count(("close", name)) == 8
    after_probes = world.events[world.events.index(("close", "b")) + 1 :]
    kinds = [kind for kind, _ in after_probes if kind != "switch"]
    assert kinds == ["open", "open", "close", "close"] * 7


def test_order_is_random_but_the_seed_decides() -> None:
    def order(seed: int) -> list[tuple[str, str]]:
        world = World()
        timed(world, [candidate(world, name, 1_000_000) for name in "abc"], budget_s=0.5, seed=seed)
        return world.events

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_all_candidates_have_the_same_rounds_and_blocks() -> None:
    world = World()
    rows = timed(world, [candidate(world, "fast", 20_000), candidate(world, "slow", 30_000_000)])
    shapes = {(len(row.samples_ms), tuple(len(blocks) for blocks in row.samples_ms)) for row in rows}
    assert len(shapes) == 1
    assert len(rows[0].samples_ms[0][0]) > len(rows[1].samples_ms[0][0])


def test_a_candidate_that_cannot_be_opened_says_why_and_stops_no_other() -> None:
    world = World()

    def broken() -> Session:
        raise RuntimeUnavailable("no such device")

    bad = Candidate(label="bad", runtime="x", batch_size=1, threads=1, images_NCHW=IMAGES, open=broken)
    rows = timed(world, [bad, candidate(world, "good", 1_000_000)], budget_s=0.5)
    assert (rows[0].measured, rows[0].why, rows[0].executed) == (False, "no such device", None)
    assert rows[1].measured


def test_a_candidate_that_fails_later_leaves_no_samples() -> None:
    world = World()
    calls = 0

    def latency() -> int:
        nonlocal calls
        calls += 1
        if calls > 500:
            raise ArtifactError("out of memory")
        return 1_000_000

    rows = timed(world, [candidate(world, "late", latency), candidate(world, "good", 1_000_000)])
    assert (rows[0].measured, rows[0].why) == (False, "out of memory")
    assert len(rows[1].samples_ms) == 20
    assert world.open_sessions == 0


def test_our_own_bugs_are_not_excused() -> None:
    world = World()

    def latency() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        timed(world, [candidate(world, "bug", latency)])
    assert world.open_sessions == 0


def test_equal_labels_are_refused() -> None:
    world = World()
    with pytest.raises(ValueError, match="unique"):
        timed(world, [candidate(world, "a", 1), candidate(world, "a", 1)])


def test_a_machine_that_slows_down_ends_the_rounds_early_but_not_too_early() -> None:
    world = World()
    calls = 0

    def latency() -> int:  # the probe sees 1 ms; then everything takes 20 times as long
        nonlocal calls
        calls += 1
        return 1_000_000 if calls < 20 else 20_000_000

    rows = timed(world, [candidate(world, "a", latency)], budget_s=2.0)
    assert 6 <= len(rows[0].samples_ms) < 20
    assert world.now_ns < 1e9 * (OVERTIME * 2.0 + 20 * 2.0 / 20 * 10 + 2)


def test_garbage_collection_is_off_while_timing_and_on_after() -> None:
    world = World()
    seen = set()

    def latency() -> int:
        seen.add(gc.isenabled())
        return 1_000_000

    timed(world, [candidate(world, "a", latency)], budget_s=0.2)
    assert False in seen
    assert gc.isenabled()


def test_progress_grows_to_its_total() -> None:
    world = World()
    told: list[tuple[float, float]] = []
    time_interleaved(
        [candidate(world, "a", 1_000_000)],
        TimingSettings(budget_s=0.5),
        lambda done, total, _="": told.append((done, total)),
        clock=world.clock,
        meter=quiet_meter,
    )
    done = [value for value, _ in told]
    assert done == sorted(done)
    assert told[-1][0] == told[-1][1]


@given(
    latencies=st.lists(st.floats(1e-6, 10), min_size=1, max_size=8),
    opens=st.floats(0, 20),
    budget=st.floats(0.1, 60),
)
def test_a_schedule_keeps_its_limits_and_its_budget(
    latencies: list[float], opens: float, budget: float
) -> None:
    settings = TimingSettings(budget_s=budget)
    schedule = make_schedule(latencies, [opens] * len(latencies), settings)
    assert settings.min_rounds <= schedule.rounds <= settings.rounds
    assert 1 <= schedule.blocks <= settings.blocks
    for runs, warmup, latency in zip(schedule.runs, schedule.warmup, latencies, strict=True):
        assert settings.min_runs <= runs <= settings.max_runs
        assert warmup >= settings.warmup_runs
        assert warmup * latency >= settings.warmup_s * 0.999
    spent = schedule.rounds * sum(
        opens + schedule.blocks * (runs + warmup) * latency
        for runs, warmup, latency in zip(schedule.runs, schedule.warmup, latencies, strict=True)
    )
    least = make_schedule(latencies, [opens] * len(latencies), TimingSettings(budget_s=1e-9))
    minimum = least.rounds * sum(
        opens + (settings.min_runs + warmup) * latency
        for warmup, latency in zip(least.warmup, latencies, strict=True)
    )
    # beyond the budget goes only what the minimum counts of slow models take
    assert spent <= (budget * len(latencies) + minimum) * 1.001


def test_a_usual_model_gets_the_rounds_and_blocks_that_the_statistics_want() -> None:
    schedule = make_schedule([0.0008, 0.0008], [0.03, 0.03], TimingSettings())
    assert (schedule.rounds, schedule.blocks) == (20, 3)
    assert schedule.warmup == (25, 25)
    assert schedule.runs[0] > 50


@pytest.mark.parametrize(
    "bad",
    [{"rounds": 2}, {"min_rounds": 1}, {"blocks": 0}, {"min_runs": 0}, {"max_runs": 1}, {"budget_s": 0.0},
     {"warmup_s": -1.0}, {"warmup_runs": 0}],
)  # fmt: skip
def test_settings_that_give_no_interval_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        TimingSettings(**bad)  # type: ignore[arg-type]


def test_a_row_survives_its_json() -> None:
    world = World()
    row = timed(world, [candidate(world, "a", 1_234_567)], budget_s=0.2)[0]
    assert TimingRow.from_json(json.loads(json.dumps(row.to_json()))) == row


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: value.pop("group"),
        lambda value: value.update(schema_version=99),
        lambda value: value.update(samples_ms=[[[1.0, float("nan")]]]),
        lambda value: value.update(samples_ms=[[[-1.0]]]),
        lambda value: value.update(samples_ms=7),
        lambda value: value["executed"].update(color="red"),
    ],
)
def test_a_damaged_row_is_named(damage: Callable[[dict[str, object]], object]) -> None:
    world = World()
    value = timed(world, [candidate(world, "a", 1_000_000)], budget_s=0.2)[0].to_json()
    damage(value)
    with pytest.raises(ArtifactError, match=r"^row 3: "):
        TimingRow.from_json(value, "row 3")


def test_cpu_times_are_read_as_proc_5_says() -> None:
    times = parse_cpu_times("cpu  400 40 200 3200 80 20 20 40 0 0\ncpu0 1 1", own_s=0.5, ticks_per_s=4)
    assert times == CpuTimes(total_s=1000.0, busy_s=170.0, steal_s=10.0, own_s=0.5)
    assert parse_cpu_times("intr 5", 0.0, 100) is None


def test_other_programs_and_the_hypervisor_are_told_apart_from_us() -> None:
    before = CpuTimes(total_s=100, busy_s=10, steal_s=1, own_s=3)
    after = CpuTimes(total_s=120, busy_s=22, steal_s=2, own_s=9)
    meter = Meter(read=iter([before, after]).__next__, load=lambda: 0.5, clock=iter([5.0, 15.0]).__next__)
    assert meter.stop() == Disturbance(other_ratio=0.3, steal_ratio=0.05, load_before=0.5, wall_s=10.0)


@pytest.mark.parametrize(
    ("other", "steal", "words"),
    [
        (0.05, 0.01, None),
        (None, None, None),
        (0.25, 0.0, "other programs used 25% of the CPUs' time meanwhile"),
        (0.0, 0.04, "the hypervisor took 4% of the CPUs' time away meanwhile"),
    ],
)
def test_only_what_matters_is_warned_of(other: float | None, steal: float | None, words: str | None) -> None:
    assert Disturbance(other_ratio=other, steal_ratio=steal, load_before=None, wall_s=1.0).words == words


class DeviceSession(FakeSession):
    """Says what the device measured: half of what the host's clock sees."""

    def __init__(self, world: World, name: str, latency_ns: Callable[[], int]) -> None:
        super().__init__(world, name, latency_ns)
        self.executed = Executed(
            provider="fake", precision="f16", threads=1, device="cuda", clock="cuda events", transfers=False
        )

    def bind(self, images_NCHW: npt.NDArray[np.float32]) -> Callable[[], float]:
        call = super().bind(images_NCHW)

        def measured() -> float:
            before = self.world.now_ns
            call()
            return (self.world.now_ns - before) / 2e6

        return measured


def test_what_the_device_measured_counts_and_its_gpu_is_watched() -> None:
    world, fake = World(), Nvml(step=1)
    on_gpu = Candidate(
        label="g", runtime="fake:gpu", batch_size=1, threads=1, images_NCHW=IMAGES,
        open=lambda: DeviceSession(world, "g", lambda: 1_000_000),
    )  # fmt: skip
    rows = time_interleaved(
        [on_gpu, candidate(world, "c", 1_000_000)],
        TimingSettings(rounds=4, blocks=2),
        clock=world.clock,
        meter=quiet_meter,
        gpu=lambda: nvml.watch(nvml=fake),
    )
    assert set(rows[0].flat_ms) == {0.5}
    assert set(rows[1].flat_ms) == {1.0}
    found = rows[0].disturbance
    assert found is not None
    assert found.gpu is not None
    # one reading when the watch begins, one after each block, one at the end
    blocks = sum(map(len, rows[0].samples_ms))
    assert found.gpu.sm_clock_mhz == (1980 - blocks - 1, 1980)
    again = TimingRow.from_json(json.loads(json.dumps(rows[0].to_json())))
    assert again == rows[0]
    assert again.executed is not None
    assert (again.executed.clock, again.executed.transfers) == ("cuda events", False)


def test_no_gpu_is_asked_where_nothing_runs_on_one() -> None:
    world = World()

    def gpu() -> None:
        raise AssertionError("NVML was asked")

    rows = time_interleaved(
        [candidate(world, "c", 1_000_000)],
        TimingSettings(rounds=3),
        clock=world.clock,
        meter=quiet_meter,
        gpu=gpu,
    )
    assert rows[0].disturbance is not None
    assert rows[0].disturbance.gpu is None


def test_rows_of_before_gpus_were_watched_are_read() -> None:
    world = World()
    row = timed(world, [candidate(world, "a", 1_000_000)])[0]
    value = json.loads(json.dumps(row.to_json()))
    del value["disturbance"]["gpu"]
    for key in ("device", "clock", "transfers"):
        del value["executed"][key]
    assert TimingRow.from_json(value) == row


def test_a_gpu_held_down_is_said() -> None:
    fake = Nvml(reasons=Nvml().nvmlClocksEventReasonHwSlowdown)
    meter = quiet_meter()
    meter.watch_gpu(nvml.watch(nvml=fake))
    assert meter.stop().words == "the GPU's clocks were held down (hardware slowdown) meanwhile"
