"""Shortcuts without weights as convolutions: the same integers as the slices and paddings that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, helper

from deploycnn.graph.model import attribute, save_onnx
from deploycnn.graph.parity import cpu_session
from deploycnn.quantization import packs
from deploycnn.quantization.fusion import count_fused
from deploycnn.quantization.lint import lint_graph
from deploycnn.quantization.packed import measure
from deploycnn.quantization.selections import Selection, is_selection
from tests.graph.nets import Weights, images, operators
from tests.quantization.test_insertion import quantized
from tests.quantization.test_placement import conv, model, node

CPU = packs.get("onnxruntime-cpu")
COPIES = replace(CPU, convolves_selections=False)
END = np.iinfo(np.int64).max

Change = Callable[[Weights, dict[str, NodeProto]], None]


def shortcut(
    strides: tuple[int, int] = (2, 2),
    channels: tuple[int, int, int] = (2, 8, 6),
    size: tuple[int, int] = (8, 8),
    *,
    change: Change = lambda *_: None,
    outputs: tuple[str, ...] = ("y",),
) -> ModelProto:
    """Every other row, every other column, channels of zeros before and behind, between two convolutions.

    ``change`` may alter constants and nodes, by name.
    """
    before, held, behind = channels
    weights: Weights = {
        "start": np.int64([0]), "end": np.int64([END]), "two": np.int64([2]), "three": np.int64([3]),
        "rows.step": np.int64([strides[0]]), "columns.step": np.int64([strides[1]]),
        "pads": np.int64([0, before, 0, 0, 0, behind, 0, 0]),
    }  # fmt: skip
    nodes = [
        conv("x", "stem", weights, (held, 3, 3, 3)),
        node("Slice", "stem start end two rows.step", "rows"),
        node("Slice", "rows start end three columns.step", "columns"),
        node("Pad", "columns pads", "wide"),
        conv("wide", "y", weights, (4, before + held + behind, 1, 1)),
    ]
    by_name = {held.name: held for held in nodes}
    change(weights, by_name)
    return model([*by_name.values()], weights, outputs=outputs, shape=("N", 3, *size))


def results(made: ModelProto, x: np.ndarray) -> list[np.ndarray]:
    """What a graph means, and what onnxruntime makes of it."""
    return [
        np.asarray(found)
        for optimize in (False, True)
        for found in cpu_session(made, optimize=optimize).run(None, {"x": x})
    ]


def selected(made: ModelProto) -> list[NodeProto]:
    return [held for held in made.graph.node if held.name.endswith("_selected")]


def check_alike(made: ModelProto, x: np.ndarray) -> ModelProto:
    """The graph with convolutions, which computes what the one with copies does, to the last bit."""
    found, expected = (quantized(made, pack) for pack in (CPU, COPIES))
    for first, second in zip(results(found, x), results(expected, x), strict=True):
        np.testing.assert_array_equal(first, second)
    assert not selected(expected)
    assert measure(found) == measure(expected)  # they are no weights of the model
    return found


@given(
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)).filter(lambda found: found != (1, 1)),
    channels=st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(0, 3)),
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    low=st.floats(-4, 0),
    high=st.floats(0.1, 6),
    dtype=st.sampled_from(["uint8", "int8"]),
)
@settings(max_examples=25, deadline=None)
def test_the_convolution_returns_the_same_integers(
    strides: tuple[int, int],
    channels: tuple[int, int, int],
    size: tuple[int, int],
    low: float,
    high: float,
    dtype: str,
) -> None:
    made = shortcut(strides, channels, size)
    convolved, copied = (
        quantized(made, replace(pack, activation=replace(pack.activation, dtype=dtype)), (low, high))
        for pack in (CPU, COPIES)
    )
    x = images(2, (3, *size))
    for found, expected in zip(results(convolved, x), results(copied, x), strict=True):
        np.testing.assert_array_equal(found, expected)
    (held,) = selected(convolved)
    assert attribute(held, "strides") == list(strides)
    assert not {"Slice", "Pad"} & set(operators(convolved))


def test_it_is_one_integer_kernel_and_clean_for_every_cpu_target(tmp_path: Path) -> None:
    counts = {}
    for name, pack in (("convolved", CPU), ("copied", COPIES)):
        save_onnx(quantized(shortcut(), pack), tmp_path / f"{name}.onnx")
        counts[name] = count_fused(tmp_path / f"{name}.onnx")
    assert counts["convolved"].quantized == counts["copied"].quantized + 1
    assert counts["convolved"].layers["wide_selected"]
    assert counts["convolved"].stray == counts["copied"].stray
    for target in ("cpu", "onnxruntime-cpu", "openvino"):
        assert not lint_graph(quantized(shortcut(), CPU), packs.get(target))


def test_openvino_gets_copies() -> None:
    for target, expected in (("onnxruntime-cpu", 1), ("cpu", 0), ("openvino", 0)):
        assert len(selected(quantized(shortcut(), packs.get(target)))) == expected


def replacing(name: str, place: int, content: object) -> Change:
    """Another constant as an input of a node."""

    def change(weights: Weights, nodes: dict[str, NodeProto]) -> None:
        weights["other"] = np.asarray(content)
        inputs = [*nodes[name].input, *[""] * (place + 1 - len(nodes[name].input))]
        inputs[place] = "other"
        nodes[name].input[:] = inputs

    return change


def both_axes(weights: Weights, nodes: dict[str, NodeProto]) -> None:
    weights |= {"axes": np.int64([-1, -2]), "steps": np.int64([3, 2]), "starts": np.int64([0, 0])}
    weights["ends"] = np.int64([END, np.iinfo(np.int32).max])
    nodes["rows"].input[1:] = ["starts", "ends", "axes", "steps"]


def test_both_axes_at_once_and_slices_of_slices_count() -> None:
    made = check_alike(shortcut(change=both_axes, size=(9, 13)), images(2, (3, 9, 13)))
    (held,) = selected(made)
    assert attribute(held, "strides") == [2, 6]


def reflecting(weights: Weights, nodes: dict[str, NodeProto]) -> None:
    weights["pads"] = np.int64([0, 4, 0, 0, 0, 4, 0, 0])
    nodes["wide"].attribute.append(helper.make_attribute("mode", "reflect"))


def every_other_channel(weights: Weights, nodes: dict[str, NodeProto]) -> None:
    weights["two"], weights["pads"] = np.int64([1]), np.int64([0, 6, 0, 0, 0, 6, 0, 0])


def all_pixels(weights: Weights, nodes: dict[str, NodeProto]) -> None:
    weights["rows.step"] = weights["columns.step"] = np.int64([1])


def computed_steps(weights: Weights, nodes: dict[str, NodeProto]) -> None:
    """The step is the number of the image's channels, less one."""
    weights["one"] = np.int64([1])
    computed = [node("Shape", "x", "sizes", start=1, end=2), node("Sub", "sizes one", "step")]
    nodes["rows"].input[4] = "step"
    given = dict(nodes)
    nodes.clear()
    nodes.update({held.name: held for held in computed} | given)


def no_steps(weights: Weights, nodes: dict[str, NodeProto]) -> None:
    del nodes["rows"].input[4:]


#: What changes the shortcut -> the name of the convolution that may still stand for its beginning.
CANNOT = {
    "starts at 1": (replacing("rows", 1, np.int64([1])), {"wide_selected": [1, 2]}),
    "ends before the end": (replacing("columns", 2, np.int64([7])), {}),
    "counted from the end": (replacing("columns", 2, np.int64([-1])), {}),
    "takes channels": (every_other_channel, {"wide_selected": [1, 2]}),
    "adds rows": (replacing("wide", 1, np.int64([0, 2, 1, 0, 0, 6, 0, 0])), {"columns_selected": [2, 2]}),
    "takes channels away": (
        replacing("wide", 1, np.int64([0, 9, 0, 0, 0, -1, 0, 0])),
        {"columns_selected": [2, 2]},
    ),
    "adds something else": (replacing("wide", 2, np.float32(1.0)), {}),
    "reflects": (reflecting, {"columns_selected": [2, 2]}),
    "leaves out no pixel": (all_pixels, {}),
    "computes its steps": (computed_steps, {}),
    "has no steps": (no_steps, {"wide_selected": [1, 2]}),
}


@pytest.mark.parametrize(("change", "expected"), CANNOT.values(), ids=CANNOT)
def test_what_is_no_such_shortcut_stays(change: Change, expected: dict[str, list[int]]) -> None:
    made = check_alike(shortcut(change=change), images(2, (3, 8, 8)))
    assert {held.name: attribute(held, "strides") for held in selected(made)} == expected


@pytest.mark.parametrize("value", ["rows", "columns", "wide"])
def test_outputs_of_the_graph_are_made(value: str) -> None:
    made = check_alike(shortcut(outputs=("y", value)), images(2, (3, 8, 8)))
    assert not selected(made)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("rows", {"wide_selected": [1, 2]}),
        ("columns", {"columns_selected": [2, 2]}),
        ("wide", {"wide_selected": [2, 2]}),
    ],
)
def test_what_two_nodes_read_is_made_once(value: str, expected: object) -> None:
    def read_twice(weights: Weights, nodes: dict[str, NodeProto]) -> None:
        nodes["z"] = conv(value, "z", weights, (4, 16 if value == "wide" else 8, 1, 1))

    made = check_alike(shortcut(outputs=("y", "z"), change=read_twice), images(2, (3, 8, 8)))
    assert {held.name: attribute(held, "strides") for held in selected(made)} == expected


def test_many_weights_are_worse_than_copies() -> None:
    for channels, expected in (((16, 32, 16), 1), ((16, 33, 16), 0), ((32, 64, 32), 0)):
        assert len(selected(quantized(shortcut(channels=channels), CPU))) == expected


@pytest.mark.parametrize("node", ["rows", "columns", "wide"])
def test_what_was_asked_to_stay_float_stays(node: str) -> None:
    made = quantized(shortcut(), CPU, keep_float=(node,))
    assert {"rows", "columns", "wide"} <= {held.name for held in made.graph.node}
    assert not selected(made)


def test_weights_are_ones_where_a_channel_goes_on() -> None:
    found = Selection(source="x", channels=3, reader="r", before=1, behind=2).weight()
    assert found.shape == (6, 3, 1, 1)
    x = np.arange(3.0)
    np.testing.assert_array_equal(found[:, :, 0, 0] @ x, [0, 0, 1, 2, 0, 0])
    assert is_selection(found)
    for spoiled in (2 * found, found[:2], found.repeat(2, axis=0), found.repeat(2, axis=1), found[:, :, 0]):
        assert not is_selection(spoiled)
