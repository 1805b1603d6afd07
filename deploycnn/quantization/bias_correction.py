"""Empirical bias correction: what rounding the weights adds to a layer's outputs on average, its bias takes away.

Nagel et al. 2019, section 4.2, measured instead of derived. Rounding turns weights W into W + dW, which shifts the
mean of output channel m by E[(dW * x)_m] over images and positions. A convolution is linear, so this is the mean over
positions of dW * E[x], where E[x] is the mean input map over calibration images: one pass over the images serves all
layers, and zero padding at borders is accounted for exactly. Shifts are local: each layer takes away what it adds
itself, so that corrections do not add up along the graph.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper, numpy_helper

from deploycnn.errors import PassRequirementError
from deploycnn.graph.model import infer_shapes
from deploycnn.graph.names import unique
from deploycnn.graph.parity import evaluator
from deploycnn.quantization.structure import Structure
from deploycnn.quantization.types import IntegerWeight, Plan
from deploycnn.quantization.weights import dequantize, quantize_weight

Floats = npt.NDArray[np.float64]


def bias_shifts(
    model: ModelProto,
    plan: Plan,
    means: Mapping[str, npt.NDArray[np.float32]],
    *,
    weights: Mapping[str, IntegerWeight] | None = None,
) -> dict[str, Floats]:
    """What rounding the weights adds to the output channels of each layer on average, by node; shape (channels,).

    A layer's shift holds as long as its weights are rounded so, whatever becomes of the other layers.

    Args:
        model: Float, prepared; the graph that ``plan`` was made of.
        plan: Which weights are rounded, and how.
        means: What the layers read, on average over calibration images, in the shape of one image's; must hold
            ``inputs_of(model, plan)``.
        weights: Integer weights by initializer, where they are not those of rounding to nearest.

    Raises:
        PassRequirementError: the plan rounds no layer that has a place for a bias.
    """
    layers = _layers(model, plan)
    if not layers:
        raise PassRequirementError("bias correction: no quantized convolution or Gemm to correct")
    graph = Structure(model)
    plans = {item.initializer: item for item in plan.weights}
    shifts = {}
    for node in layers:
        name = node.input[1]
        real = numpy_helper.to_array(graph.constants[name])
        rounded = (weights or {}).get(name) or quantize_weight(real, plans[name])
        error = (dequantize(rounded) - real).astype(np.float32)
        shifts[node.name] = _mean_output(node, means[node.input[0]], error)
    return shifts


def inputs_of(model: ModelProto, plan: Plan) -> list[str]:
    """Values whose mean maps ``bias_shifts`` needs, each once."""
    return list(dict.fromkeys(node.input[0] for node in _layers(model, plan)))


def _layers(model: ModelProto, plan: Plan) -> list[NodeProto]:
    """Layers with rounded weights and a bias, or room for one, that no other layer shares."""
    graph = Structure(model)
    rounded = {item.node for item in plan.weights}
    return [
        node
        for node in graph.nodes
        if node.name in rounded
        and node.op_type in {"Conv", "Gemm"}
        and (
            len(node.input) < 3
            or not node.input[2]
            or (node.input[2] in graph.constants and len(graph.read_by[node.input[2]]) == 1)
        )
    ]


def _mean_output(node: NodeProto, mean: npt.NDArray[np.float32], weight: npt.NDArray[np.float32]) -> Floats:
    """Mean over positions of each output channel of a layer with ``weight`` and no bias, on one mean input."""
    copy = NodeProto()
    copy.CopyFrom(node)
    del copy.input[2:]
    for held in [held for held in copy.attribute if held.name == "beta"]:
        copy.attribute.remove(held)
    graph = helper.make_graph(
        [copy],
        "layer",
        [helper.make_tensor_value_info(node.input[0], 1, (1, *mean.shape))],
        [helper.make_tensor_value_info(node.output[0], 1, None)],
        [numpy_helper.from_array(weight, node.input[1])],
    )
    layer = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    (output,) = evaluator(layer)(mean[None])
    by_channel: Floats = output[0].reshape(output.shape[1], -1).mean(axis=1, dtype=np.float64)
    return by_channel


def correct_biases(model: ModelProto, shifts: Mapping[str, Floats]) -> ModelProto:
    """A copy of ``model`` with ``shifts`` taken away from the biases of the named layers, which may have had none."""
    changed = ModelProto()
    changed.CopyFrom(model)
    graph = Structure(changed)
    taken = set(graph.constants) | {name for name, _ in graph.values()}
    for node in graph.nodes:
        if node.name not in shifts:
            continue
        shift = shifts[node.name]
        if len(node.input) > 2 and node.input[2]:
            held = numpy_helper.to_array(graph.constants[node.input[2]])
            # A Gemm's bias may be (1, N) or one number for all.
            corrected = np.asarray(held - shift.reshape((-1,) if held.ndim < 2 else (1, -1)), held.dtype)
            graph.constants[node.input[2]].CopyFrom(numpy_helper.from_array(corrected, node.input[2]))
            continue
        kind = numpy_helper.to_array(graph.constants[node.input[1]]).dtype
        name = unique(f"{node.input[1].removesuffix('.weight')}.bias", taken)
        taken.add(name)
        changed.graph.initializer.append(numpy_helper.from_array((-shift).astype(kind), name))
        del node.input[2:]
        node.input.append(name)
    return infer_shapes(changed)
