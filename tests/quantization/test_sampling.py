from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper

from deploycnn.graph.export import export_onnx
from deploycnn.graph.model import infer_shapes
from deploycnn.graph.parity import evaluator
from deploycnn.quantization import packs
from deploycnn.quantization.insertion import build, ranges_needed
from deploycnn.quantization.placement import place
from deploycnn.quantization.preparation import prepare
from deploycnn.quantization.reconstruction import find_layers
from deploycnn.quantization.sampling import Frontier, Sampler, Window, choose_places
from tests.graph.nets import Residual, images, randomized


@settings(max_examples=20, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pads=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    groups=st.sampled_from([1, 2, 4]),
)
def test_a_convolution_is_a_matrix_product_of_patches(
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilations: tuple[int, int],
    pads: tuple[int, int],
    groups: int,
) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4, 8, 9), dtype=np.float32)
    weight = rng.standard_normal((8, 4 // groups, *kernel), dtype=np.float32)
    expected = F.conv2d(
        torch.from_numpy(x), torch.from_numpy(weight), None, strides, pads, dilations, groups
    ).numpy()
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], strides=strides, dilations=dilations, pads=pads * 2, group=groups
    )
    places = choose_places(rng, 3, expected.shape[2:], 5)
    window = Window.of(node, kernel, x.shape[2:])
    found = window.patches(x, places, 0)
    products = np.einsum("sgk,gok->sgo", found, weight.reshape(groups, 8 // groups, -1)).reshape(3, -1, 8)
    for image in range(3):
        for place_, product in zip(places[image], products[image], strict=True):
            np.testing.assert_allclose(product, expected[image, :, place_[0], place_[1]], atol=1e-4)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("size", [7, 8])
def test_automatic_padding_is_that_of_onnxruntime(mode: str, size: int) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 2, size, size), dtype=np.float32)
    weight = rng.standard_normal((3, 2, 4, 3), dtype=np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], auto_pad=mode)
    model = helper.make_model(
        helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("x", 1, x.shape)],
            [helper.make_tensor_value_info("y", 1, None)],
            [helper.make_tensor("w", 1, weight.shape, weight.reshape(-1).tolist())],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    expected = evaluator(model)(x)[0]
    places = choose_places(rng, 2, expected.shape[2:], 100)
    found = Window.of(node, (4, 3), (size, size)).patches(x, places, 0)[:, 0] @ weight.reshape(3, -1).T
    np.testing.assert_allclose(
        found.reshape(2, -1, 3), expected.reshape(2, 3, -1).transpose(0, 2, 1), atol=1e-5
    )


def test_places_are_distinct_and_inside() -> None:
    places = choose_places(np.random.default_rng(2), 50, (4, 6), 10)
    assert places.shape == (50, 10, 2)
    assert all(len({tuple(place_) for place_ in image}) == 10 for image in places.tolist())
    assert places[:, :, 0].max() == 3
    assert places[:, :, 1].max() == 5
    assert choose_places(np.random.default_rng(2), 2, (2, 2), 10).shape == (2, 4, 2)


@pytest.fixture(scope="module")
def quantized() -> ModelProto:
    full = prepare(export_onnx(randomized(Residual()), (3, 12, 12), opset=18, classes=None))
    plan = place(full, packs.get("onnxruntime-cpu"))
    return infer_shapes(build(full, plan, dict.fromkeys(ranges_needed(plan), (-3.0, 3.0))))


def test_values_are_those_of_the_whole_graph_whatever_is_kept(quantized: ModelProto) -> None:
    batch = images(5, (3, 12, 12))
    frontier = Frontier(quantized, batch)
    convolutions = [node for node in quantized.graph.node if node.op_type in {"Conv", "Gemm"}]
    sources = [node.input[0] for node in convolutions]
    exposed = ModelProto()
    exposed.CopyFrom(quantized)
    exposed.graph.output.extend(helper.make_tensor_value_info(name, 1, None) for name in sources)
    expected = evaluator(exposed, outputs=sources, integers=False)(batch)
    for number, (source, right) in enumerate(zip(sources, expected, strict=True)):
        content, scale, zero_point = frontier.read(source)
        assert content.dtype == np.uint8
        np.testing.assert_array_equal((content.astype(np.float32) - zero_point) * np.float32(scale), right)
        frontier.forget_all_but(sources[number + 1 :])
    assert frontier.kept == {}
    assert frontier.peak_bytes >= batch.nbytes


def test_a_layers_output_and_its_addend_may_be_visited_at_the_same_time(quantized: ModelProto) -> None:
    full = prepare(export_onnx(randomized(Residual()), (3, 12, 12), opset=18, classes=None))
    layers = find_layers(full, quantized)
    block = layers[1]
    assert block.target_addend is not None
    rng = np.random.default_rng(5)
    contents = {
        name: rng.standard_normal((8, 8, 12, 12), dtype=np.float32)
        for name in (block.target, block.target_addend)
    }
    for _ in range(50):
        sampler = Sampler(layers, 8, 4096, 0)
        barrier = threading.Barrier(2)

        def visit(name: str, sampler: Sampler = sampler, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            sampler.visit(name, contents[name])

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(visit, contents))
        mine = sampler.samples[block.node.name]
        assert sum(map(len, mine.targets)) == sum(map(len, mine.addends)) == 8 * 144
