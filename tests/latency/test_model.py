"""Tables: fits, errors, files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from deploycnn.core import Speed
from deploycnn.errors import ArtifactError
from deploycnn.latency import steps
from deploycnn.latency.model import Kind, LatencyTable, Sample, fit
from deploycnn.latency.reading import load_table
from deploycnn.latency.steps import step_of


def table(noise: float = 0.0) -> LatencyTable:
    random = np.random.default_rng(0)
    samples = []
    for config in range(30):
        for kind, scale in (("a", 1.0), ("b", 3.0)):
            w, v = (int(width) for width in random.integers(1, 9, 2) * 8)
            ms = (
                scale
                * (0.01 + 0.001 * w + 0.002 * v + 0.0001 * w * v)
                * float(1 + noise * random.standard_normal())
            )
            samples.append(Sample(kind=kind, width_in=w, width_out=v, ms=ms, config=config))
    return LatencyTable(
        environment={"cpu": "test"},
        runtime="onnxruntime:cpu",
        precision="fp32",
        batch_size=1,
        threads=1,
        step=8,
        layers={"conv1": "a", "conv2": "b"},
        overhead_ms=0.0,
        samples=tuple(samples),
    ).judged()


def test_a_bilinear_cost_is_found_exactly() -> None:
    found = table()
    widths = np.array([8.0, 24.0, 40.0])
    assert found.cost("a", widths, widths[::-1].copy()) == pytest.approx(
        0.01 + 0.001 * widths + 0.002 * widths[::-1] + 0.0001 * widths * widths[::-1], rel=1e-3
    )
    assert found.error is not None
    assert found.error.p95 < 1e-3


def test_the_stated_error_grows_with_the_noise() -> None:
    error = table(0.1).error
    assert error is not None
    assert 0.01 < error.median < 0.15


def test_a_step_that_no_product_describes_is_followed() -> None:
    widths = np.array([(w, 16) for w in range(8, 65, 8)] * 4, dtype=np.float64)
    ms = np.where(widths[:, 0] <= 32, 1.0, 2.0)
    found = fit(widths, ms)
    assert float(found([16.0], [16.0])[0]) == pytest.approx(1.0, rel=0.1)
    assert float(found([56.0], [16.0])[0]) == pytest.approx(2.0, rel=0.1)


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    before = table(0.05)
    before.save(tmp_path / "t.json")
    after = load_table(tmp_path / "t.json")
    assert after.layers == before.layers
    assert after.error == before.error
    assert after.cost("b", [24.0], [32.0]) == pytest.approx(before.cost("b", [24.0], [32.0]), rel=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a latency table"),
        ("[]", "not a latency table"),
        ('{"schema_version": 99}', "schema version 99"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ArtifactError, match=message):
        load_table(tmp_path / "t.json")


def test_a_table_without_a_key_is_refused(tmp_path: Path) -> None:
    table().save(tmp_path / "t.json")
    value = json.loads((tmp_path / "t.json").read_text())
    del value["tables"]
    (tmp_path / "t.json").write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match="tables"):
        load_table(tmp_path / "t.json")


def test_a_table_without_the_dense_model_is_refused(tmp_path: Path) -> None:
    found = table()
    replace(found, samples=tuple(s for s in found.samples if s.config)).save(tmp_path / "t.json")
    with pytest.raises(ArtifactError, match="dense model"):
        load_table(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("tables", "a", 3, 2), float("inf"), "milliseconds"),
        (("tables", "b", 7, 2), float("nan"), "milliseconds"),
        (("tables", "a", 0, 2), -5.0, "milliseconds"),
        (("tables", "a", 2, 0), 0, "widths should be at least 1"),
        (("tables", "a", 2, 1), -3, "widths should be at least 1"),
        (("step",), 0, "step should be at least 1"),
        (("threads",), -1, "threads should be at least 1"),
        (("error", "p95"), float("nan"), "error should be finite"),
        (("error", "median"), "x", "could not convert"),
    ],
)
def test_numbers_that_cannot_be_are_named(
    tmp_path: Path, place: tuple[str | int, ...], value: object, message: str
) -> None:
    content = table(0.05).to_json()
    held = content
    for part in place[:-1]:
        held = held[part]
    held[place[-1]] = value
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=message):
        load_table(tmp_path / "t.json")


def test_a_table_of_the_dense_model_alone_is_refused(tmp_path: Path) -> None:
    found = table()
    replace(found, samples=tuple(s for s in found.samples if not s.config)).save(tmp_path / "t.json")
    with pytest.raises(ArtifactError, match="other widths"):
        load_table(tmp_path / "t.json")


def test_the_dense_model_is_the_first_configuration() -> None:
    found = table()
    first, second = found.samples[:2]
    assert (first.config, second.config) == (0, 0)
    assert found.dense_ms == pytest.approx(first.ms + second.ms)


def test_an_unknown_layer_is_named() -> None:
    with pytest.raises(ArtifactError, match='no layer "c"'):
        table().cost("c", [8.0], [8.0])


def test_a_layer_of_the_model_without_a_time_of_its_own_costs_nothing_and_is_told() -> None:
    found = replace(table(), layers={"conv1": "a", "conv2": "b", "conv3": "c"})
    assert found.untimed == ("conv3",)
    np.testing.assert_array_equal(found.cost("c", [8.0, 4.0], [8.0, 4.0]), [0.0, 0.0])


@pytest.mark.parametrize("block", [1, 4, 8, 16])
def test_the_step_of_a_kernel_with_blocks_is_its_block(block: int) -> None:
    assert step_of({width: float(-(-width // block) * block) for width in range(8, 41)}) == block


def test_one_disturbed_width_among_few_does_not_halve_the_step() -> None:
    """Above a step of 4, only 12, 20, 28 and 36 tell of 8."""
    times = {width: float(-(-width // 8) * 8) for width in range(8, 41)}
    assert step_of({**times, 20: 0.9 * times[20]}) == 8
    assert step_of({**times, 20: 0.9 * times[20], 28: 0.9 * times[28]}) == 4


def test_a_slow_path_off_the_block_does_not_make_the_step_larger() -> None:
    assert step_of({width: width * (1.0 if width % 8 == 0 else 1.8) for width in range(8, 41)}) == 8


def test_a_kernel_that_does_well_just_above_a_multiple_has_its_step_all_the_same() -> None:
    """Measured: 3x3 convolutions of onnxruntime in FP32 on AVX512, microseconds."""
    widths = [
        150,
        173,
        188,
        208,
        233,
        304,
        329,
        354,
        210,
        514,
        555,
        591,
        632,
        675,
        731,
        775,
        621,
        875,
        918,
        963,
        619,
    ]
    widths += [1080, 1118, 1211, 615, 1313, 1361, 1412, 1277, 1545, 1593, 1686, 1290]
    assert step_of(dict(zip(range(8, 41), map(float, widths), strict=True))) == 16


class Blocks:
    """A stopwatch of a machine that works on 8 channels at once, 10 GMAC/s, and takes 5 us for each node."""

    runtime = "onnxruntime:cpu"

    def __init__(self, macs_per_ms: float = 1e7, channels: int = 8) -> None:
        self.macs_per_ms, self.channels = macs_per_ms, channels

    def race(
        self, models: dict[str, Path], *, batch_size: int, threads: int, budget_s: float
    ) -> dict[str, Speed]:
        del batch_size, threads, budget_s
        ms = {name: self._ms(onnx.load(str(path)).graph) for name, path in models.items()}
        first = next(iter(ms.values()))
        return {
            name: Speed(median_ms=value, ratio=first / value, low=0.0, high=0.0) for name, value in ms.items()
        }

    def _ms(self, graph: onnx.GraphProto) -> float:
        pixels = np.prod([axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim[2:]])
        weights = [tensor.dims for tensor in graph.initializer if len(tensor.dims) == 4]
        macs = sum(
            pixels
            * -(-outer // self.channels)
            * -(-inner // self.channels)
            * self.channels**2
            * height
            * width
            for outer, inner, height, width in weights
        )
        return float(macs / self.macs_per_ms + 0.005 * len(graph.node))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("side", [2, 4, 32])
def test_small_maps_do_not_hide_the_step(kernel: int, side: int) -> None:
    """Where nodes cost more than channels, any rounding would seem to be free."""
    kind = Kind(
        op="conv",
        kernel=(kernel, kernel),
        stride=(1, 1),
        groups="1",
        inputs=(side, side),
        outputs=(side, side),
        tail=(),
        widest=(240, 240),
    )
    assert steps.find([kind], Blocks(), batch_size=1, threads=1) == 8


@pytest.mark.parametrize(("macs_per_ms", "channels", "step"), [(1e9, 16, 16), (1e10, 4, 4), (1e20, 16, 8)])
def test_a_machine_too_fast_for_small_maps_is_asked_with_large_ones(
    macs_per_ms: float, channels: int, step: int
) -> None:
    """On one that is too fast for all of them no step is told, and not the largest that seems free."""
    sides = {"inputs": (8, 8), "outputs": (8, 8)}
    kind = Kind(op="conv", kernel=(3, 3), stride=(1, 1), groups="1", tail=(), widest=(64, 64), **sides)
    assert steps.find([kind], Blocks(macs_per_ms, channels), batch_size=1, threads=1) == step
