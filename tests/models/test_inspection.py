import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from deploycnn.errors import ArtifactError, SourceError
from deploycnn.models import zoo
from deploycnn.models.artifact import save_model
from deploycnn.models.inspection import inspect_model
from deploycnn.models.macs import count_macs, count_params
from tests.models import onnx_graphs
from tests.models.pruned import build
from tests.models.shared import SHARED, needs_shared


def test_lenet_row_by_row():
    """Shapes, parameters and MACs as in LeCun et al. 1998, with three input channels."""
    table = inspect_model(zoo.build("lenet5"), (3, 32, 32))
    rows = {row.name: row for row in table.rows}
    conv = rows["features.3"]
    assert (conv.kind, conv.input_shape, conv.output_shape) == ("Conv2d", (1, 6, 14, 14), (1, 16, 10, 10))
    assert (conv.params, conv.macs) == (6 * 16 * 25 + 16, 10 * 10 * 16 * 6 * 25)
    assert conv.receptive_field == (14, 14)
    assert conv.activation_bytes == 16 * 10 * 10 * 4
    assert rows["classifier.4"].receptive_field == (32, 32)
    assert table.input_shape == (3, 32, 32)
    assert table.peak_activation_bytes == (6 * 28 * 28 + 6 * 28 * 28) * 4
    assert table.activation_bytes == sum(row.activation_bytes for row in table.rows)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenet_v3_large",
        "densenet121",
        "googlenet",
        "shufflenet_v2_x1_0",
        "convnext_tiny",
        "vit_b_16",
    ],
)
def test_rows_add_up_to_the_totals(name):
    with torch.device("meta"):
        model = build("torchvision", {"name": name}, 1000)
    table = inspect_model(model, (3, 224, 224))
    assert sum(row.params for row in table.rows) == table.params == count_params(model)
    assert sum(row.macs for row in table.rows) == table.macs == count_macs(model, (3, 224, 224))
    if name != "vit_b_16":
        assert all(row.receptive_field is not None for row in table.rows)


class Odd(nn.Module):
    """Data-dependent control flow and functions, which no tracer follows."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.weight = nn.Parameter(torch.rand(5, 4))

    def forward(self, x):
        for _ in range(2 if float(x.sum()) == 0 else 3):
            x = functional.relu(self.conv(x)[:, :3])
        return x.mean((2, 3)) @ self.weight[:, :3].t()


def test_any_python_code_and_repeated_layers():
    table = inspect_model(Odd(), (3, 8, 8))
    convs = [row for row in table.rows if row.name == "conv"]
    assert [row.params for row in convs] == [3 * 4 * 9 + 4, 0]
    assert convs[-1].receptive_field == (5, 5)
    assert table.params == 112 + 20
    assert table.rows[-1].macs == 15
    assert table.macs == 2 * 8 * 8 * 4 * 27 + 15


def test_stored_models(tmp_path):
    save_model(build("zoo", {"name": "lenet5"}, 10), tmp_path)
    expected = inspect_model(zoo.build("lenet5"), (3, 32, 32))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert inspect_model(path, (3, 32, 32)).rows == expected.rows
    with pytest.raises(SourceError, match="image's shape"):
        inspect_model(tmp_path)
    (tmp_path / "manifest.json").write_text('{"inputs": [{"shape": [null, 3, 32, 32]}]}')
    assert inspect_model(tmp_path).rows == expected.rows


def test_other_files(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"")
    with pytest.raises(SourceError, match="use a recipe"):
        inspect_model(tmp_path / "w.pt")
    (tmp_path / "m.onnx").write_bytes(b"text")
    with pytest.raises(ArtifactError, match=r"m\.onnx"):
        inspect_model(tmp_path / "m.onnx")


@pytest.mark.parametrize("form", ["fp32", "fp16", "qdq", "qlinear"])
def test_onnx_row_by_row(tmp_path, form):
    path = tmp_path / "m.onnx"
    path.write_bytes(getattr(onnx_graphs, form)().SerializeToString())
    table = inspect_model(path)
    rows = {row.name: row for row in table.rows}
    assert rows["conv"].params == 8 * 27 + 8
    assert rows["conv"].output_shape == (1, 8, 8, 8)
    assert rows["conv"].receptive_field == (3, 3)
    assert rows["fc"].macs == 40
    assert rows["fc"].receptive_field == (10, 10)
    assert (table.params, table.macs, table.input_shape) == (onnx_graphs.PARAMS, onnx_graphs.MACS, (3, 8, 8))
    assert "flatten" not in rows


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_and_onnx_agree(tmp_path):
    """Parameters may differ: the exporter folds batch norms."""
    model = nn.Sequential(zoo.build("resnet20").layer2, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    path = tmp_path / "m.onnx"
    axes = ({0: torch.export.Dim("N")},)
    example = (torch.zeros(2, 16, 16, 16),)
    torch.onnx.export(
        model, example, path, dynamo=True, dynamic_shapes=axes, external_data=False, verbose=False
    )
    ours, theirs = inspect_model(model, (16, 16, 16)), inspect_model(path)
    assert theirs.macs == ours.macs
    assert theirs.rows[-1].receptive_field == ours.rows[-1].receptive_field
    convs = [row.receptive_field for row in ours.rows if row.kind == "Conv2d"]
    assert [row.receptive_field for row in theirs.rows if row.kind == "Conv"] == convs


@needs_shared
def test_a_real_third_party_file():
    table = inspect_model(SHARED / "data" / "onnx" / "ultraface-slim-320.onnx")
    convs = [row for row in table.rows if row.kind == "Conv"]
    assert len(convs) == 42
    assert all(row.receptive_field is not None for row in convs)
    assert sum(row.params for row in table.rows) == table.params


def test_folders_and_missing_files(tmp_path):
    (tmp_path / "run/variants/int8").mkdir(parents=True)
    with pytest.raises(SourceError, match=r"a run directory; name one of its variants: .*variants/int8"):
        inspect_model(tmp_path / "run")
    onnx.save(onnx_graphs.fp32(), tmp_path / "run/variants/int8/model.onnx")
    assert inspect_model(tmp_path / "run/variants/int8").name == "int8"
    with pytest.raises(SourceError, match="nothing: no such file"):
        inspect_model(tmp_path / "nothing")
