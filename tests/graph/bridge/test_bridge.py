"""Whole graphs through the bridge: leaves, names, training, the way back, and what is refused."""

from __future__ import annotations

import copy
import io
import math
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from deploycnn.errors import PassRequirementError
from deploycnn.graph.bridge import supported_operators, to_torch
from deploycnn.graph.cleanup import simplify
from tests.graph.bridge.support import (
    Array,
    assert_same_as_onnxruntime,
    by_torch,
    convnet,
    model_of,
    noise,
    run,
)

FAMILIES = {
    "resnet18": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "efficientnet_b0": 64,
    "shufflenet_v2_x0_5": 64,
    "densenet121": 64,
    "googlenet": 64,
    "squeezenet1_1": 64,
    "alexnet": 224,
    "vgg11_bn": 224,
    "regnet_y_400mf": 64,
    "convnext_tiny": 64,
    "mnasnet0_5": 64,
    "inception_v3": 128,
}


def by_torchscript(model: nn.Module, size: int, opset: int = 13) -> onnx.ModelProto:
    """Exported with batch norms and shape arithmetic left in, a dynamic batch."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            (torch.zeros(2, 3, size, size),),
            buffer,
            dynamo=False,
            opset_version=opset,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
        )
    return onnx.load_from_string(buffer.getvalue())


def torchvision_model(name: str) -> nn.Module:
    import torchvision

    options = {"init_weights": False} if name in {"inception_v3", "googlenet"} else {}
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, **options).eval()


def layers(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> int:
    return sum(isinstance(part, kinds) for part in module.modules())


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in {"resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"}
        else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_torchvision_families(name: str) -> None:
    size = FAMILIES[name]
    model = torchvision_model(name)
    graph = by_torchscript(model, size)
    bridge = assert_same_as_onnxruntime(graph, noise(3, 3, size, size), rtol=1e-3, atol=1e-4)
    # Every weight of the model is a parameter of an ordinary leaf again.
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    assert layers(bridge.module, kinds) == layers(_without_heads(model), kinds)


def _without_heads(model: nn.Module) -> nn.Module:
    """Auxiliary classifiers run in training only and are not exported."""
    for name in ("aux1", "aux2", "AuxLogits"):
        if hasattr(model, name):
            setattr(model, name, None)
    return model


@pytest.mark.parametrize("opset", [9, 11, 13, 17])
def test_layers_are_ordinary_leaves_named_after_the_nodes(opset: int) -> None:
    model = convnet(max(opset, 11), norm=True)
    bridge = assert_same_as_onnxruntime(model, noise(5, 3, 12, 12))
    assert type(bridge.module.stem) is nn.Conv2d
    assert type(bridge.module.bn) is nn.BatchNorm2d
    assert type(bridge.module.head) is nn.Linear
    assert bridge.module.dw.groups == 8
    assert bridge.module.bn.momentum == pytest.approx(0.2)
    assert bridge.module_of == {name: name for name in ("stem", "bn", "dw", "pw", "head")}
    assert not bridge.module.training


def test_names_are_made_into_identifiers() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "/layer1/0.conv/Conv"),
        helper.make_node("Conv", ["a", "v"], ["b"], "0"),
        helper.make_node("Conv", ["b", "v"], ["c"], "forward"),
        helper.make_node("Conv", ["c", "v"], ["y"], ""),
    ]
    weights = {"w": noise(4, 3, 1, 1), "v": noise(4, 4, 1, 1)}
    bridge = assert_same_as_onnxruntime(
        model_of(nodes, weights, inputs={"x": ["N", 3, 5, 5]}), noise(2, 3, 5, 5)
    )
    assert bridge.module_of["/layer1/0.conv/Conv"] == "layer1_0_conv_Conv"
    assert bridge.module_of["0"] == "n0"
    assert bridge.module_of["forward"] == "forward_1"
    assert bridge.module_of["Conv_0"] == "Conv_0"
    # One initializer that three layers read is one parameter.
    assert bridge.module.n0.weight is bridge.module.forward_1.weight is bridge.module.Conv_0.weight
    with torch.no_grad():
        bridge.module.n0.weight.mul_(2)
    x = noise(2, 3, 5, 5)
    np.testing.assert_allclose(run(bridge.write_back(), x)[0], by_torch(bridge, x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [False, True])
def test_trained_parameters_go_back_into_the_same_initializers(norm: bool) -> None:
    model = convnet(norm=norm)
    bridge = to_torch(model)
    module = bridge.module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    images, labels = torch.from_numpy(noise(32, 3, 12, 12)), torch.arange(32) % 5
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images), labels).backward()
        optimizer.step()
    module.eval()
    written = bridge.write_back()
    onnx.checker.check_model(written, full_check=True)
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    after = {tensor.name: numpy_helper.to_array(tensor) for tensor in written.graph.initializer}
    assert before.keys() == after.keys()
    assert [node.SerializeToString() for node in written.graph.node] == [
        node.SerializeToString() for node in model.graph.node
    ]
    for name in before.keys() - {"zero", "six"}:
        assert not np.array_equal(before[name], after[name]), name
    x = noise(4, 3, 12, 12, seed=5)
    np.testing.assert_allclose(run(written, x)[0], by_torch(bridge, x)[0], rtol=1e-4, atol=1e-5)
    assert np.abs(run(model, x)[0] - run(written, x)[0]).max() > 0.01


def test_batch_norms_use_batch_statistics_in_training_mode() -> None:
    bridge = to_torch(convnet(norm=True))
    x = torch.from_numpy(noise(64, 3, 12, 12) * 3 + 1)
    before = bridge.module.bn.running_mean.clone()
    features: list[torch.Tensor] = []
    bridge.module.bn.register_forward_hook(lambda _module, _inputs, output: features.append(output))
    bridge.module.train()(x)
    expected = bridge.module.bn.bias
    torch.testing.assert_close(features[0].mean((0, 2, 3)), expected, rtol=1e-3, atol=1e-4)
    assert not torch.equal(before, bridge.module.bn.running_mean)


def test_a_weight_behind_a_rearrangement_is_written_back_rearranged() -> None:
    nodes = [
        helper.make_node("Transpose", ["w"], ["wt"], "flip", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["m"], "product"),
        helper.make_node("Reshape", ["b", "shape"], ["b1"], "flat"),
        helper.make_node("Add", ["m", "b1"], ["y"], "add"),
    ]
    weights: dict[str, Array] = {"w": noise(4, 5), "b": noise(2, 2), "shape": np.int64([4])}
    model = model_of(nodes, weights, inputs={"x": ["N", 5]})
    bridge = assert_same_as_onnxruntime(model, noise(3, 5))
    with torch.no_grad():
        bridge.module.product.weight.add_(1)
        bridge.module.product.bias.add_(2)
    after = {t.name: numpy_helper.to_array(t) for t in bridge.write_back().graph.initializer}
    np.testing.assert_array_equal(after["w"], weights["w"] + 1)
    np.testing.assert_array_equal(after["b"], weights["b"] + 2)


def test_a_computed_weight_becomes_an_initializer_once_it_is_trained() -> None:
    nodes = [
        helper.make_node("Mul", ["w", "two"], ["w2"], "double"),
        helper.make_node("Conv", ["x", "w2"], ["y"], "conv"),
    ]
    model = model_of(nodes, {"w": noise(4, 3, 1, 1), "two": np.float32([2])}, inputs={"x": ["N", 3, 4, 4]})
    x = noise(2, 3, 4, 4)
    bridge = assert_same_as_onnxruntime(model, x)
    with torch.no_grad():
        bridge.module.conv.weight.add_(1)
    written = bridge.write_back()
    onnx.checker.check_model(written, full_check=True)
    assert [node.op_type for node in written.graph.node] == ["Conv"]
    np.testing.assert_allclose(run(written, x)[0], by_torch(bridge, x)[0], rtol=1e-4, atol=1e-5)


def test_constants_ahead_of_the_first_layer_are_not_trained() -> None:
    """Preprocessing inside the graph stays what it is; a scale behind a layer is learned."""
    nodes = [
        helper.make_node("Sub", ["x", "mean"], ["c"], "sub"),
        helper.make_node("Conv", ["c", "w"], ["d"], "conv"),
        helper.make_node("Mul", ["d", "gamma"], ["y"], "scale"),
    ]
    weights = {"mean": noise(1, 3, 1, 1), "w": noise(4, 3, 1, 1), "gamma": noise(4, 1, 1)}
    bridge = assert_same_as_onnxruntime(
        model_of(nodes, weights, inputs={"x": ["N", 3, 4, 4]}), noise(2, 3, 4, 4)
    )
    assert {name for name, _ in bridge.module.named_parameters()} == {"conv.weight", "gamma"}


def test_all_that_is_lacking_is_named_at_once() -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["i"], "first"),
        helper.make_node("Cast", ["i"], ["f"], "cast", to=1),
        helper.make_node("MaxPool", ["x"], ["p", "where"], "pool", kernel_shape=[2, 2]),
        helper.make_node("Cast", ["where"], ["w"], "cast2", to=1),
        helper.make_node("Det", ["x"], ["d"], "second"),
    ]
    model = model_of(nodes, {}, inputs={"x": [1, 3, 4, 4]}, outputs=("f", "w", "d"), opset=13)
    with pytest.raises(PassRequirementError) as caught:
        to_torch(model)
    text = str(caught.value)
    assert 'NonZero (node "first")' in text
    assert 'Det (node "second")' in text
    assert "opset 13" in text
    del model.graph.node[0]
    del model.graph.node[0]
    del model.graph.node[-1]
    del model.graph.output[0], model.graph.output[-1]
    with pytest.raises(PassRequirementError, match=r'MaxPool: its output of indices is used \(node "pool"\)'):
        to_torch(model)


def test_a_pruned_module_is_not_written_into_the_old_graph() -> None:
    bridge = to_torch(convnet())
    bridge.module.head.weight = nn.Parameter(torch.zeros(4, 8))
    with pytest.raises(PassRequirementError, match=r"head\.weight has shape .* export the module instead"):
        bridge.write_back()


def test_a_copy_is_independent_and_computes_the_same() -> None:
    bridge = to_torch(convnet(norm=True))
    twin = copy.deepcopy(bridge.module)
    x = torch.from_numpy(noise(2, 3, 12, 12))
    with torch.no_grad():
        torch.testing.assert_close(twin(x), bridge.module(x), rtol=0, atol=0)
        twin.stem.weight.zero_()
    assert bridge.module.stem.weight.abs().sum() > 0
    assert twin.state_dict().keys() == bridge.module.state_dict().keys()


def test_the_specification_knows_every_operator_of_the_table() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
    assert supported_operators() <= known | {"Upsample"}
    assert len(supported_operators()) > 100


ULTRAFACE = Path("/work/shared/data/onnx/ultraface-slim-320.onnx")


@pytest.mark.skipif(not ULTRAFACE.exists(), reason="the opset 9 detector is not here")
def test_an_old_detector_of_opset_9() -> None:
    model = onnx.load(ULTRAFACE)
    bridge = assert_same_as_onnxruntime(model, noise(1, 3, 240, 320), rtol=1e-3, atol=1e-4)
    assert layers(bridge.module, (nn.Conv2d,)) == 42
    assert layers(bridge.module, (nn.BatchNorm2d,)) == 25
    assert_same_as_onnxruntime(simplify(model), noise(1, 3, 240, 320), rtol=1e-3, atol=1e-4)


class SamePadding(nn.Module):
    """A convolution padded as TensorFlow does it, by sums that depend on the image's size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        pads = [
            max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0)
            if isinstance(size, int)
            else torch.clamp((torch.ceil(size / 2) - 1) * 2 + 3 - size, min=0)
            for size in (width, height)
        ]
        x = nn.functional.pad(x, [pads[0] // 2, pads[0] - pads[0] // 2, pads[1] // 2, pads[1] - pads[1] // 2])
        return self.conv(x).mean((2, 3))


@pytest.mark.parametrize("size", [12, 13])
def test_padding_that_follows_from_the_size_is_computed_on_the_host(size: int) -> None:
    torch.manual_seed(0)
    model = by_torchscript(SamePadding(), 12)
    kinds = {node.op_type for node in model.graph.node}
    assert {"Clip", "Transpose", "Pad"} <= kinds
    free = model.graph.input[0].type.tensor_type.shape
    for axis in (2, 3):
        free.dim[axis].dim_param = f"d{axis}"
    assert_same_as_onnxruntime(model, noise(2, 3, size, size))
