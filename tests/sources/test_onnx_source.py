import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploycnn.core import TensorSpec
from deploycnn.errors import PreprocessingError, SourceError
from deploycnn.sources.onnx import Onnx
from tests.models import onnx_graphs
from tests.models.shared import SHARED, needs_shared
from tests.sources.contexts import context, data_of


def stored(folder, model, name="model.onnx"):
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def test_copied_byte_for_byte_and_described(tmp_path):
    path = stored(tmp_path, onnx_graphs.fp32())
    ctx = context(tmp_path / "run", data=data_of(classes=5, size=8))
    draft = Onnx(path=path).run(ctx)
    assert (ctx.output / "model.onnx").read_bytes() == path.read_bytes()
    assert draft.inputs == (TensorSpec(name="images", dtype="float32", shape=(None, 3, 8, 8)),)
    assert (draft.facts.params, draft.facts.macs) == (onnx_graphs.PARAMS, onnx_graphs.MACS)
    assert draft.facts.size_bytes == path.stat().st_size
    assert draft.facts.preprocessing == ctx.data.preprocessing.to_json()
    assert draft.facts.record["opset"] == 17


@pytest.mark.parametrize(("form", "precision"), [("fp16", "fp16"), ("qdq", "int8")])
def test_precision_is_told(tmp_path, form, precision):
    path = stored(tmp_path, getattr(onnx_graphs, form)())
    assert Onnx(path=path).run(context(tmp_path / "run")).facts.precision == precision


@pytest.mark.parametrize("opset", [9, 13, 17])
def test_old_operator_sets(tmp_path, opset):
    path = stored(tmp_path, onnx_graphs.fp32(opset=opset))
    assert Onnx(path=path).run(context(tmp_path / "run")).facts.record["opset"] == opset


def test_too_old_an_operator_set(tmp_path):
    path = stored(tmp_path, onnx_graphs.fp32(opset=8))
    with pytest.raises(SourceError, match="opset 8 is older than 9; convert it"):
        Onnx(path=path).run(context(tmp_path / "run"))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path, fraction):
    content = onnx_graphs.fp32().SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(content[: int(len(content) * fraction)])
    ctx = context(tmp_path / "run")
    with pytest.raises(SourceError, match="truncated") as caught:
        Onnx(path=path).run(ctx)
    assert "\n" not in str(caught.value)
    assert not list(ctx.output.iterdir())


@pytest.mark.parametrize(
    "content", [b"", b"hello, I am a text file\n", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04"]
)
def test_other_files(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(SourceError, match="not an? (valid )?ONNX model"):
        Onnx(path=path).run(context(tmp_path / "run"))


def test_external_data_beside_the_model_is_put_inside(tmp_path):
    path = onnx_graphs.with_external_data(tmp_path)
    assert (tmp_path / "weights.bin").stat().st_size > 0
    ctx = context(tmp_path / "run")
    draft = Onnx(path=path).run(ctx)
    assert [file.name for file in ctx.output.iterdir()] == ["model.onnx"]
    copied = onnx.load(ctx.output / "model.onnx", load_external_data=False)
    expected = onnx_graphs.fp32()
    for ours, theirs in zip(copied.graph.initializer, expected.graph.initializer, strict=True):
        assert ours.data_location == TensorProto.DEFAULT
        assert np.array_equal(numpy_helper.to_array(ours), numpy_helper.to_array(theirs))
    assert draft.facts.params == onnx_graphs.PARAMS


def test_identity_covers_external_data(tmp_path):
    source = Onnx(path=onnx_graphs.with_external_data(tmp_path))
    before = source.extra_identity()
    content = bytearray((tmp_path / "weights.bin").read_bytes())
    content[0] ^= 1
    (tmp_path / "weights.bin").write_bytes(content)
    assert source.extra_identity() != before
    assert Onnx(path=stored(tmp_path, onnx_graphs.fp32(), "b.onnx")).extra_identity() == []


def relocate(path, location):
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("kind", ["parent", "there and back", "absolute", "symlink", "constant"])
def test_external_data_outside_the_folder_is_refused(tmp_path, kind):
    folder = tmp_path / "model"
    folder.mkdir()
    path = onnx_graphs.with_external_data(folder)
    secret = tmp_path / "secret.bin"
    secret.write_bytes((folder / "weights.bin").read_bytes())
    if kind == "symlink":
        (folder / "weights.bin").unlink()
        (folder / "weights.bin").symlink_to(secret)
    elif kind == "constant":
        model = onnx_graphs.fp32()
        held = onnx.TensorProto(
            name="hidden", dims=[2], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL
        )
        held.external_data.add(key="location", value="../secret.bin")
        model.graph.node.append(helper.make_node("Constant", [], ["hidden"], value=held))
        path = stored(folder, model)
    else:
        places = {"parent": "../secret.bin", "there and back": "../model/weights.bin"}
        relocate(path, places.get(kind, str(secret)))
    ctx = context(tmp_path / "run")
    with pytest.raises(SourceError, match="lie outside the model's folder .*refused"):
        Onnx(path=path).run(ctx)
    assert not list(ctx.output.iterdir())


def test_missing_and_truncated_external_data(tmp_path):
    path = onnx_graphs.with_external_data(tmp_path)
    data = tmp_path / "weights.bin"
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(SourceError, match="truncated, fetch it again"):
        Onnx(path=path).run(context(tmp_path / "a"))
    data.unlink()
    with pytest.raises(SourceError, match="are missing"):
        Onnx(path=path).run(context(tmp_path / "b"))


def test_initializers_among_the_inputs_are_no_inputs(tmp_path):
    model = onnx_graphs.fp32()
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    draft = Onnx(path=stored(tmp_path, model)).run(context(tmp_path / "run"))
    assert [spec.name for spec in draft.inputs] == ["images"]


def test_fixed_batch_is_told(tmp_path):
    draft = Onnx(path=stored(tmp_path, onnx_graphs.fp32(batch=2))).run(context(tmp_path / "run"))
    assert draft.inputs[0].shape == (2, 3, 8, 8)
    assert draft.facts.macs == onnx_graphs.MACS


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (data_of(classes=5, size=16), "takes .x3x8x8 .*but preprocessing gives 3x16x16"),
        (data_of(classes=5, size=8, channels="gray"), "preprocessing gives 1x8x8"),
        (data_of(classes=4, size=8), "gives 5 logits, but the data have 4 classes"),
    ],
)
def test_a_graph_that_does_not_fit_the_data(tmp_path, data, message):
    path = stored(tmp_path, onnx_graphs.fp32())
    with pytest.raises(SourceError, match=message):
        Onnx(path=path).run(context(tmp_path / "run", data=data))


def test_preprocessing_that_travels_with_the_file_is_checked(tmp_path):
    model, data = onnx_graphs.fp32(), data_of(classes=5, size=8)
    model.metadata_props.add(key="deploycnn.preprocessing", value=json.dumps(data.preprocessing.to_json()))
    model.metadata_props.add(key="deploycnn.classes", value=json.dumps(list(data.dataset.classes)))
    path = stored(tmp_path, model)
    alone = Onnx(path=path).run(context(tmp_path / "a"))
    assert alone.facts.preprocessing == data.preprocessing.to_json()
    assert alone.facts.classes == data.dataset.classes
    Onnx(path=path).run(context(tmp_path / "b", data=data))
    with pytest.raises(PreprocessingError):
        Onnx(path=path).run(context(tmp_path / "c", data=data_of(classes=5, size=8, channels="bgr")))


def test_two_inputs_are_one_too_many(tmp_path):
    model = onnx_graphs.fp32()
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))
    with pytest.raises(SourceError, match="one input, the images; its inputs are: images, mask"):
        Onnx(path=stored(tmp_path, model)).run(context(tmp_path / "run"))


@needs_shared
def test_a_real_third_party_file(tmp_path):
    path = SHARED / "data" / "onnx" / "ultraface-slim-320.onnx"
    ctx = context(tmp_path)
    draft = Onnx(path=path).run(ctx)
    assert draft.inputs == (TensorSpec(name="input", dtype="float32", shape=(1, 3, 240, 320)),)
    assert (ctx.output / "model.onnx").read_bytes() == path.read_bytes()
    assert draft.facts.record["opset"] == 9
