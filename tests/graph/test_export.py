from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from deploycnn.errors import ArtifactError, ParityError, PassRequirementError
from deploycnn.graph.export import export_onnx
from deploycnn.graph.metadata import CLASSES, PREPROCESSING, get_metadata
from deploycnn.graph.model import load_onnx, opset_of, save_onnx, shape_of, tensor_specs
from deploycnn.graph.parity import Evaluate, Parity, Tolerance, evaluator, measure_parity
from tests.graph.nets import Residual, Shuffle, images, operators, randomized

SHAPE = (3, 12, 12)


def by_pytorch(model: nn.Module) -> Evaluate:
    def run(x: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            return [model(torch.from_numpy(x)).numpy()]

    return run


def parity(model: nn.Module, graph: onnx.ModelProto, **changes: object) -> Parity:
    arguments: dict[str, object] = {
        "batch_sizes": (1, 5),
        "tolerance": Tolerance(absolute=1e-4, relative=1e-4),
        "source": "random images",
        "against": "pytorch",
    }
    return measure_parity(by_pytorch(model), evaluator(graph), images(11, SHAPE), **(arguments | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomized(Residual())


@pytest.fixture(scope="module")
def exported(model: nn.Module) -> onnx.ModelProto:
    return export_onnx(model, SHAPE, opset=18)


@pytest.mark.parametrize("opset", [17, 18, 20])
@pytest.mark.parametrize("make", [Residual, Shuffle])
def test_exported_graphs_compute_the_same_at_any_batch_size(make: type[nn.Module], opset: int) -> None:
    model = randomized(make())
    graph = export_onnx(model, SHAPE, opset=opset)
    assert opset_of(graph) == opset
    result = parity(model, graph, batch_sizes=(1, 4, 11))
    result.check("the graph")
    assert result.max_abs_error < 1e-5
    assert result.top1_agreement == 1.0
    (images_in,), (logits,) = graph.graph.input, graph.graph.output
    assert (images_in.name, logits.name) == ("images", "logits")
    assert images_in.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert shape_of(logits) is not None
    assert shape_of(logits)[0] is None


def test_the_graph_is_folded_clean_and_readable(exported: onnx.ModelProto) -> None:
    graph = exported
    assert operators(graph) == [
        "Conv", "Relu", "Conv", "Add", "Relu", "MaxPool", "GlobalAveragePool", "Reshape", "Gemm",
    ]  # fmt: skip
    names = [node.name for node in graph.graph.node]
    assert names[0] == "stem/Conv"
    assert names[2] == "conv/Conv"
    assert names[-1] == "head/Gemm"
    weights = {tensor.name for tensor in graph.graph.initializer}
    assert {"stem.weight", "stem.bias", "conv.weight", "conv.bias", "head.weight", "head.bias"} <= weights
    assert all(
        name in weights or "_output_" in name or name == "images"
        for node in graph.graph.node
        for name in node.input
    )


def test_nodes_that_the_exporter_puts_in_are_named_after_the_module_that_reads_them() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Conv2d(2, 4, 1)
            self.right = nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            left, right = torch.split(x, [2, 6], 1)
            return self.left(left) + self.right(right)

    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(Halves(), nn.ReLU()), nn.Flatten())
    names = [node.name for node in export_onnx(model.eval(), (3, 4, 4), opset=18).graph.node]
    assert "1.0/Split" in names
    assert "1.0.right/Conv" in names


def test_nothing_of_this_machine_gets_into_the_file_and_bytes_repeat(
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = randomized(Residual())
    first = export_onnx(model, SHAPE, opset=18, classes=["a", "b"]).SerializeToString(deterministic=True)
    second = export_onnx(model, SHAPE, opset=18, classes=["a", "b"]).SerializeToString(deterministic=True)
    assert first == second
    for trace in (b"pkg.torch", b"site-packages", b".py", b"/tmp", b"/home"):
        assert trace not in first
    assert capfd.readouterr().out == ""


def test_preprocessing_and_classes_travel_in_the_file() -> None:
    graph = export_onnx(
        randomized(Residual()), SHAPE, opset=18, preprocessing={"size": [12, 12]}, classes=["cat", "dog"]
    )
    metadata = get_metadata(graph)
    assert json.loads(metadata[PREPROCESSING]) == {"size": [12, 12]}
    assert json.loads(metadata[CLASSES]) == ["cat", "dog"]


def test_training_mode_is_restored_and_not_exported() -> None:
    model = randomized(Residual()).train()
    graph = export_onnx(model, SHAPE, opset=18)
    assert model.training
    assert "Dropout" not in operators(graph)
    parity(model.eval(), graph).check("the graph")


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean([2, 3]) if x.sum() > 0 else x.amax([2, 3])


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean([2, 3]).reshape(2, 3)


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (DataDependent(), "cannot be exported to ONNX"),
        (FixedBatch(), "batch"),
        (TwoOutputs(), "TwoOutputs returns tuple"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(model: nn.Module, reason: str) -> None:
    with pytest.raises(PassRequirementError, match=reason) as caught:
        export_onnx(model, SHAPE, opset=18)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_perturbed_weight_is_found_and_the_figures_are_named(model, exported) -> None:
    graph = onnx.ModelProto.FromString(exported.SerializeToString())
    tensor = next(t for t in graph.graph.initializer if t.name == "conv.weight")
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[3] += 0.05
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    result = parity(model, graph)
    assert result.worst_ratio > 1
    with pytest.raises(ParityError, match=rf"by {result.max_abs_error:.3g} .*batch sizes \[1, 5\]"):
        result.check("the graph")


def test_nan_and_wrong_shapes_fail_parity() -> None:
    x = images(4, SHAPE)
    right = [np.ones((1, 3), np.float32)]
    arguments = {
        "batch_sizes": (1,),
        "tolerance": Tolerance(absolute=1.0, relative=1.0),
        "source": "random images",
        "against": "pytorch",
    }
    for wrong in (np.full((1, 3), np.nan, np.float32), np.ones((1, 4), np.float32)):
        result = measure_parity(lambda _: right, lambda _, wrong=wrong: [wrong], x, **arguments)  # type: ignore[arg-type]
        with pytest.raises(ParityError):
            result.check("the graph")


def test_errors_are_measured_against_the_images_largest_output() -> None:
    expected = np.float32([[100.0, 0.0], [1.0, 0.0]])
    found = np.float32([[100.0, 0.5], [1.0, 0.02]])
    result = measure_parity(
        lambda _: [expected],
        lambda _: [found],
        images(2, SHAPE),
        batch_sizes=(2,),
        tolerance=Tolerance(absolute=0.0, relative=0.02),
        source="random images",
        against="pytorch",
    )
    assert result.max_abs_error == pytest.approx(0.5)
    assert result.max_rel_error == pytest.approx(0.02, rel=1e-5)
    assert result.worst_ratio == pytest.approx(1.0, rel=1e-5)


def test_outputs_that_vanish_are_held_to_their_own_size() -> None:
    expected = np.float32([[1e-7, 2e-7], [2e-7, 1e-7]])
    arguments = {
        "batch_sizes": (1, 2),
        "tolerance": Tolerance(absolute=1e-4, relative=1e-4),
        "source": "random images",
        "against": "pytorch",
    }
    x = images(2, SHAPE)

    def each(values):
        return lambda batch: [
            values if len(batch) == 2 else values[int(np.array_equal(batch[0], x[1])) :][:1]
        ]

    same = measure_parity(each(expected), each(expected), x, **arguments)  # type: ignore[arg-type]
    same.check("the graph")
    wrong = measure_parity(each(expected), each(expected * 1.5), x, **arguments)  # type: ignore[arg-type]
    assert wrong.max_abs_error < 1e-4
    with pytest.raises(ParityError):
        wrong.check("the graph")


def test_parity_says_where_outputs_hardly_depend_on_the_image() -> None:
    x = images(4, SHAPE)
    arguments = {"batch_sizes": (4,), "tolerance": None, "source": "random images", "against": "pytorch"}
    varied = np.float32([[0, 1], [0, 2], [0, 3], [0, 6]])  # the mean is 3: the farthest lies 3 from it
    result = measure_parity(lambda _: [varied], lambda _: [varied + 0.03], x, **arguments)  # type: ignore[arg-type]
    assert result.max_spread_error == pytest.approx(0.01, rel=1e-4)
    assert result.informative
    constant = np.ones((4, 2), np.float32)
    result = measure_parity(lambda _: [constant], lambda _: [constant], x, **arguments)  # type: ignore[arg-type]
    assert result.max_spread_error is None
    assert not result.informative
    nearly = constant + np.float32([[0], [0], [0], [1e-6]])
    result = measure_parity(lambda _: [nearly], lambda _: [constant], x, **arguments)  # type: ignore[arg-type]
    assert not result.informative


LAX: dict[str, Any] = {
    "batch_sizes": (2,),
    "tolerance": None,
    "source": "random images",
    "against": "pytorch",
}


def test_parity_of_outputs_that_are_no_rows_of_scores() -> None:
    x = images(4, SHAPE)
    scalar = measure_parity(lambda _: [np.float32(2)], lambda _: [np.float32(2.5)], x, **LAX)
    assert (scalar.max_abs_error, scalar.max_rel_error) == (0.5, 0.25)

    def found(batch):
        """As many columns as are found: two in the first batch, three in the second."""
        return [np.ones((2, 2 + int(np.array_equal(batch[0], x[2]))), np.float32)]

    varying = measure_parity(found, lambda batch: [found(batch)[0] + np.float32(0.5)], x, **LAX)
    assert varying.max_abs_error == 0.5
    assert varying.max_spread_error is None
    nothing = measure_parity(
        lambda _: [np.zeros((0, 4), np.float32)], lambda _: [np.zeros((0, 4), np.float32)], x, **LAX
    )
    assert nothing.max_abs_error == 0.0


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_errors_that_are_not_finite_have_no_number_in_the_record(wrong: float) -> None:
    odd = np.float32([[1, wrong], [0, 1]])
    result = measure_parity(lambda _: [odd], lambda _: [odd], images(4, SHAPE), **LAX)
    record = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert record["max_abs_error"] is None
    assert not record["informative"]


def test_a_fixed_batch_gives_all_rows_that_its_images_make() -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["x", "shape"], ["rows"]),
            helper.make_node("ReduceMax", ["x"], ["most"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 2, 2])],
        [
            helper.make_tensor_value_info("rows", TensorProto.FLOAT, [6, 4]),
            helper.make_tensor_value_info("most", TensorProto.FLOAT, None),
        ],
        [numpy_helper.from_array(np.array([-1, 4]), "shape")],
    )
    graph.node[1].attribute.append(helper.make_attribute("keepdims", 0))
    run = evaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8))
    x = np.random.default_rng(0).standard_normal((5, 3, 2, 2)).astype(np.float32)
    rows, most = run(x)
    np.testing.assert_array_equal(rows, x.reshape(-1, 4))
    np.testing.assert_array_equal(most, [x[:2].max(), x[2:4].max(), x[4].max()])


def test_parity_without_onnxruntime_uses_the_reference_evaluator(model, exported, monkeypatch) -> None:
    monkeypatch.setattr("deploycnn.graph.parity.installed", lambda _: False)
    result = parity(model, exported)
    assert result.evaluator == "onnx.reference"
    assert result.max_abs_error < 1e-5


def test_files_that_are_no_models_are_refused(exported: onnx.ModelProto, tmp_path) -> None:
    path = tmp_path / "model.onnx"
    assert save_onnx(exported, path) == path.stat().st_size
    assert tensor_specs(load_onnx(path).graph.input)[0].shape == (None, 3, 12, 12)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"this is no model"):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="not an ONNX model"):
            load_onnx(path)
    with pytest.raises(ArtifactError, match="no such file"):
        load_onnx(tmp_path / "missing.onnx")


def test_graphs_without_an_operator_set_or_in_a_circle_are_refused(
    exported: onnx.ModelProto, tmp_path
) -> None:
    path = tmp_path / "model.onnx"
    graph = onnx.ModelProto.FromString(exported.SerializeToString())
    del graph.opset_import[:]
    save_onnx(graph, path)
    with pytest.raises(ArtifactError, match="no operator set"):
        load_onnx(path)
    graph = onnx.ModelProto.FromString(exported.SerializeToString())
    first, last = graph.graph.node[0], graph.graph.node[-1]
    first.input[0] = last.output[0]
    save_onnx(graph, path)
    with pytest.raises(ArtifactError, match="not valid ONNX: .* is made of .*; export it again"):
        load_onnx(path)


def test_branches_may_name_their_results_as_the_node_that_holds_them(tmp_path) -> None:
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    result = helper.make_tensor_value_info("y", kind, [1])
    branch = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "branch", [], [result])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    inputs = [
        helper.make_tensor_value_info("x", kind, [1]),
        helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []),
    ]
    save_onnx(helper.make_model(helper.make_graph([node], "g", inputs, [result])), tmp_path / "model.onnx")
    assert load_onnx(tmp_path / "model.onnx").graph.node[0].op_type == "If"


def test_external_data_outside_the_folder_is_refused(exported: onnx.ModelProto, tmp_path) -> None:
    graph = onnx.ModelProto.FromString(exported.SerializeToString())
    (tmp_path / "secret").write_bytes(b"\0" * 10_000)
    folder = tmp_path / "model"
    folder.mkdir()
    tensor = graph.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(ArtifactError, match="external data cannot be read"):
        load_onnx(folder / "model.onnx")


class ReadsWhatWasChanged(nn.Module):
    """The addend is the tensor that the in-place activation has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.act = nn.Hardtanh(-0.3, 0.4, inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.conv(x)
        activated = self.act(features)
        return self.head((features + 2 * activated).mean((2, 3)))


def test_in_place_activations_are_exported_as_the_model_computes() -> None:
    model = randomized(ReadsWhatWasChanged())
    parity(model, export_onnx(model, SHAPE, opset=18), batch_sizes=(1, 4)).check("the graph")
    assert model.act.inplace is True


def test_in_place_activations_make_new_tensors_for_the_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomized(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU6(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
        )
    )
    seen: list[bool] = []
    real = torch.onnx.export

    def export(given: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(model[1].inplace)
        return real(given, *args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", export)
    parity(model, export_onnx(model, SHAPE, opset=18), batch_sizes=(1, 4)).check("the graph")
    assert seen == [False]
    assert model[1].inplace is True
