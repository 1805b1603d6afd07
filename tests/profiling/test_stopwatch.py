"""The stopwatch that passes get: races in order, and nodes by the names of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from deploycnn.core import Stopwatch
from deploycnn.errors import ArtifactError, RuntimeUnavailable
from deploycnn.profiling import child
from deploycnn.profiling.nodes import Makers, node_medians
from deploycnn.profiling.stopwatch import RuntimeStopwatch


def save(path: Path, layers: int = 2, size: int | str = 16) -> Path:
    value = helper.make_tensor_value_info
    weight = helper.make_tensor("w", TensorProto.FLOAT, (3, 3, 1, 1), [0.5] * 9)
    names = ["x", *(f"v{index}" for index in range(layers))]
    nodes = []
    for index in range(layers):
        # The pool keeps the runtime from making one node of all.
        nodes.append(
            helper.make_node(
                "Conv", [names[index], "w"], [f"c{index}"], name=f"conv{index}", kernel_shape=[1, 1]
            )
        )
        nodes.append(
            helper.make_node(
                "MaxPool", [f"c{index}"], [names[index + 1]], name=f"pool{index}", kernel_shape=[1, 1]
            )
        )
    shape = ["batch", 3, size, size]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, shape)],
        [value(names[-1], TensorProto.FLOAT, None)],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


@pytest.mark.parametrize("runtime", ["onnxruntime:cpu", "openvino:f32"])
def test_nodes_go_by_their_names(runtime: str, tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx")
    times = RuntimeStopwatch(runtime=runtime).layer_ms(path, batch_size=2, threads=1)
    assert all(value > 0 for value in times.values())
    convolutions = [name for name in times if name.startswith("conv")]
    assert convolutions == ["conv0", "conv1"]


def test_a_race_compares_with_the_first(tmp_path: Path) -> None:
    watch: Stopwatch = RuntimeStopwatch(runtime="onnxruntime:cpu")
    paths = {"one": save(tmp_path / "one.onnx"), "many": save(tmp_path / "many.onnx", layers=40)}
    speeds = watch.race(paths, batch_size=2, threads=1, budget_s=0.2)
    assert list(speeds) == ["one", "many"]
    assert (speeds["one"].ratio, speeds["one"].low, speeds["one"].high) == (1.0, 1.0, 1.0)
    assert speeds["many"].low <= speeds["many"].ratio <= speeds["many"].high
    assert speeds["many"].ratio != 1.0


def test_open_image_sizes_take_the_stated_one(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", size="side")
    with pytest.raises(ArtifactError, match="leaves the image size open"):
        RuntimeStopwatch(runtime="onnxruntime:cpu").layer_ms(path, batch_size=1, threads=1)
    watch = RuntimeStopwatch(runtime="onnxruntime:cpu", image_shape=(3, 8, 8))
    assert "conv0" in watch.layer_ms(path, batch_size=1, threads=1)


def test_a_runtime_without_an_account_of_nodes_gives_none(tmp_path: Path) -> None:
    watch = RuntimeStopwatch(runtime="onnxruntime:tensorrt")
    assert watch.layer_ms(save(tmp_path / "m.onnx"), batch_size=1, threads=1) == {}


def test_nodes_on_a_gpu_are_timed_where_the_driver_waits_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "m.onnx")
    asked: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def ask(module: str, request: dict[str, Any], where: str, **options: Any) -> dict[str, Any]:
        asked.append((module, request, options))
        # What the child does, on the provider that is here.
        found: dict[str, Any] = child.ask(module, json.loads(json.dumps(request | {"mode": "cpu"})), where)
        return found

    monkeypatch.setattr("deploycnn.profiling.nodes.ask", ask)
    times = RuntimeStopwatch(runtime="onnxruntime:cuda").layer_ms(path, batch_size=2, threads=1)
    assert [name for name in times if name.startswith("conv")] == ["conv0", "conv1"]
    [(_, request, options)] = asked
    assert (request["mode"], request["shape"]) == ("cuda", (2, 3, 16, 16))
    assert options["environ"] == {"CUDA_LAUNCH_BLOCKING": "1"}


def test_without_the_provider_nothing_is_timed_elsewhere(tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the provider")
    with pytest.raises(RuntimeUnavailable, match="has no CUDAExecutionProvider"):
        RuntimeStopwatch(runtime="onnxruntime:cuda").layer_ms(
            save(tmp_path / "m.onnx"), batch_size=1, threads=1
        )


def test_what_cannot_be_timed_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    graph = helper.make_graph(
        [helper.make_node("NoSuchOperator", ["x"], ["y"], name="n")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(broken)
    )
    watch = RuntimeStopwatch(runtime="onnxruntime:cpu")
    with pytest.raises(RuntimeUnavailable, match="bad cannot be timed"):
        watch.race({"bad": broken}, batch_size=1, threads=1, budget_s=0.1)


def test_medians_by_place_without_warming_up() -> None:
    def run(*microseconds: int) -> list[dict[str, object]]:
        names = ("a_nchwc", "Reorder", "b_token_12", "Reorder", "b")
        return [
            {"cat": "Node", "name": f"{name}_kernel_time", "dur": time}
            for name, time in zip(names, microseconds, strict=True)
        ]

    events = [
        *run(90, 90, 90, 90, 90),
        *run(1, 20, 300, 4000, 5),
        *run(3, 20, 300, 4000, 5),
        *run(2, 20, 300, 4000, 5),
    ]
    events.insert(3, {"cat": "Session", "name": "c_kernel_time", "dur": 7})
    events.insert(5, {"cat": "Node", "name": "d_fence_before", "dur": 7})
    found = node_medians(events, Makers({"a": "conv", "sum": "b"}, {}), runs=4, warmup=1)
    expected = {"conv": 0.002, "Reorder": 0.02, "b": 0.305, "Reorder#3": 4.0}
    assert found == pytest.approx(expected)
    assert list(found) == list(expected)
