"""Layer information in each dialect.

``rtx-1.7-lenet5-int8.json`` is what TensorRT-RTX 1.7.1.116 logged when it built LeNet-5 here. No TensorRT 10 or 11
engine can be built without a GPU: their two samples were written from NVIDIA's documentation ("Engine Inspector" of
10.16 and "Migrating IEngineInspector Usage from TensorRT 10.x to 11.x").
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploycnn.engines import layers
from deploycnn.engines.layers import Layer, Tensor
from deploycnn.errors import ArtifactError

SAMPLES = Path(__file__).parent / "samples"


def sample(name: str) -> str:
    return (SAMPLES / f"{name}.json").read_text()


@pytest.fixture(scope="module")
def rtx_text() -> str:
    text = json.loads(sample("rtx-1.7-lenet5-int8"))["information"]
    assert isinstance(text, str)
    return text


def test_the_builders_text_gives_every_line_as_a_layer(rtx_text: str) -> None:
    found = layers.parse(rtx_text)
    assert len(found) == sum(
        line.startswith("Name: ") and "LayerType" in line for line in rtx_text.splitlines()
    )
    conv = next(layer for layer in found if layer.name == "features.0/Conv_myl0_2")
    assert conv.kind == "correlation"
    assert conv.onnx_nodes == ("features.0/Conv", "features.1/Relu")
    assert conv.tactic == "__myelin_CASK_STUB"
    assert conv.inputs[0].precision == "fp32"
    assert conv.inputs[0].format == "(NHWC) Channel major format"
    assert conv.constants[0].shape[2:] == (5, 5)
    assert conv.outputs[0].shape[0] == -1


def test_the_builders_text_tells_integer_layers_and_reformats(rtx_text: str) -> None:
    found = {layer.name: layer for layer in layers.parse(rtx_text)}
    assert found["features.3/Conv_myl0_6"].precision == "int8"
    assert found["classifier.0/Gemm_myl0_10"].precision == "int8"
    assert [layer.name for layer in found.values() if layer.is_reformat] == [
        "__myl_Move_myl0_1",
        "__myl_Resh_myl0_9",
    ]
    compute, _ = layers.precisions(rtx_text)
    assert compute == {"f32", "int8"}


def test_tensorrt_10() -> None:
    reformat, conv1, conv2, fc = layers.parse(sample("tensorrt-10-documented"))
    assert reformat.is_reformat
    assert not conv1.is_reformat
    assert [layer.precision for layer in (conv1, conv2, fc)] == ["fp16", "int8", "tf32"]
    assert conv1.onnx_nodes == ("conv1", "relu1")
    assert layers.precisions(sample("tensorrt-10-documented")) == ({"f16", "int8", "tf32"}, {"f32"})


def test_tensorrt_11() -> None:
    (conv,) = layers.parse(sample("tensorrt-11-documented"))
    assert conv.precision == "fp16"
    assert conv.inputs[0].format.startswith("Channel major FP16")
    assert conv.onnx_nodes == ("conv1", "relu1")


def test_engines_without_metadata_are_named_after_their_nodes() -> None:
    text = json.dumps({"Layers": [{"Name": "a + b", "LayerType": "CaskConvolution"}]})
    assert layers.parse(text)[0].onnx_nodes == ("a", "b")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "neither JSON"),
        ("{", "neither JSON"),
        ("{}", "holds no layers"),
        ('{"Layers": []}', "holds no layers"),
        ('{"Layers": ["conv1", "relu1"]}', "names only"),
        ("Layers:\n", "holds no layers"),
        ("Layers:\nName: a, LayerType: b, Inputs: [ { Name: c, Dim", "cut off"),
    ],
)
def test_what_tells_nothing_is_refused(text: str, why: str) -> None:
    with pytest.raises(ArtifactError, match=why):
        layers.parse(text)


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("Float", "fp32"),
        ("Half", "fp16"),
        ("BFloat16", "bf16"),
        ("Row major linear FP16 format", "fp16"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("UInt8", "uint8"),
        ("Int32", "int32"),
        ("FP8", "fp8"),
        ("Bool", "bool"),
        ("", ""),
        ("Opaque", ""),
    ],
)
def test_descriptions_of_types(text: str, precision: str) -> None:
    assert layers.precision_of(text) == precision


def tensor(precision: str, *shape: int) -> Tensor:
    return Tensor(name="t", precision=precision, format="", shape=shape)


@pytest.mark.parametrize(
    ("inputs", "weight", "precision"),
    [
        (("int8",), "int8", "int8"),
        (("fp16",), "int8", "fp16"),  # weights are scaled back first: float arithmetic
        (("fp32", "fp16"), "fp16", "fp16"),  # a residual of another type comes first
        (("fp32",), "fp32", "fp32"),
        (("int8",), "", "int8"),
        ((), "fp16", "fp16"),
    ],
)
def test_precision_of_a_layer(inputs: tuple[str, ...], weight: str, precision: str) -> None:
    constants = (tensor("fp32", 1), *((tensor(weight, 16, 16, 3, 3),) if weight else ()))
    layer = Layer(
        name="l",
        kind="correlation",
        inputs=tuple(tensor(item, 1, 16, 8, 8) for item in inputs),
        constants=constants if weight else (),
    )
    assert layer.precision == precision
