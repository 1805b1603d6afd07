"""High-bias absorption: take out of a channel what always passes its ReLU, and let the next layer add it.

Equalization can leave channels whose values are all large; they widen the range that all channels share (Nagel et
al. 2019, section 4.1.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from deploycnn.errors import PassRequirementError
from deploycnn.graph.model import attribute
from deploycnn.graph.observe import observe
from deploycnn.quantization.channels import rows, spread_inputs
from deploycnn.quantization.structure import Structure

Floats = npt.NDArray[np.float64]


def absorb_high_biases(
    model: ModelProto,
    images: Iterable[npt.NDArray[np.float32]],
    *,
    threads: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> ModelProto:
    """Move the part of each bias that always passes a ReLU into the layers behind it.

    A channel of relu(W x + b) that never falls below c > 0 on calibration images is relu(W x + b - c) + c there, and
    the + c is added by the readers' biases instead (Nagel et al. 2019, section 4.1.3, with the least value seen in
    place of mean - 3 sigma). Readers that pad with zeros would see the difference at borders, so only layers
    without padding take part. The range of activations shrinks by c.

    Args:
        model: Float, prepared; left as it is.
        images: Calibration images.
        threads: CPU threads.
        progress: Called with the number of images done.

    Raises:
        PassRequirementError: no layer can absorb a bias; or images as in ``observe``.
    """
    graph = Structure(model)
    chains = list(_absorbing(graph))
    if not chains:
        raise PassRequirementError(
            "bias absorption: no ReLU stands alone between layers without padding; leave absorb_bias out"
        )
    least: dict[str, Floats] = {}

    def visit(name: str, content: npt.NDArray[np.float32]) -> None:
        low = content.reshape(*content.shape[:2], -1).min(axis=(0, 2)).astype(np.float64)
        least[name] = np.minimum(least[name], low) if name in least else low

    if not observe(
        model, [relu.output[0] for _, relu, _ in chains], images, visit, threads=threads, progress=progress
    ):
        raise PassRequirementError("no calibration images; give data with a non-empty training split")
    changed = ModelProto()
    changed.CopyFrom(model)
    biases = Structure(changed).constants
    for maker, relu, readers in chains:
        excess = np.maximum(least[relu.output[0]], 0.0)
        _add(biases, maker.input[2], -excess)
        for reader in readers:
            weight = numpy_helper.to_array(graph.constants[reader.input[1]]).astype(np.float64)
            table = rows(reader, weight).sum(axis=2)
            _add(biases, reader.input[2], (table * spread_inputs(reader, len(table), excess)).sum(axis=1))
    return changed


def _absorbing(graph: Structure) -> Iterable[tuple[NodeProto, NodeProto, list[NodeProto]]]:
    for relu in graph.nodes:
        maker = graph.made_by.get(relu.input[0]) if relu.op_type == "Relu" else None
        readers = graph.read_by.get(relu.output[0], [])
        if (
            maker is not None
            and len(graph.read_by[relu.input[0]]) == 1
            and readers
            and not {relu.input[0], relu.output[0]} & graph.outputs
            and all(_has_own_bias(graph, node) for node in (maker, *readers))
            and all(not any(cast("list[int]", attribute(node, "pads", [0]))) for node in readers)
            and all(attribute(node, "auto_pad", b"NOTSET") in {b"NOTSET", b"VALID"} for node in readers)
            and all(node.op_type == "Conv" and node.input[0] == relu.output[0] for node in readers)
        ):
            yield maker, relu, readers


def _has_own_bias(graph: Structure, node: NodeProto) -> bool:
    return (
        node.op_type == "Conv"
        and len(node.input) > 2
        and all(name in graph.constants for name in node.input[1:])
        and len(graph.read_by[node.input[2]]) == 1
    )


def _add(constants: Mapping[str, TensorProto], name: str, amount: Floats) -> None:
    held = numpy_helper.to_array(constants[name])
    constants[name].CopyFrom(numpy_helper.from_array((held + amount).astype(held.dtype), name))
