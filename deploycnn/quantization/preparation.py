"""The float graph that gets quantized, made from whatever ONNX model comes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import numpy as np
from onnx import ModelProto, numpy_helper

from deploycnn.errors import PassRequirementError, nearest
from deploycnn.graph.batchnorm import batchnorm_to_depthwise
from deploycnn.graph.cleanup import simplify
from deploycnn.graph.model import infer_shapes, initializers
from deploycnn.graph.names import name_nodes
from deploycnn.graph.observe import image_input
from deploycnn.graph.opset import raise_opset
from deploycnn.quantization.insertion import MIN_OPSET
from deploycnn.quantization.packs import RulePack
from deploycnn.quantization.rewrites import apply_rewrites
from deploycnn.quantization.structure import COMPUTE


def prepare(original: ModelProto, pack: RulePack | None = None) -> ModelProto:
    """The float graph that gets quantized: opset 13 or newer, simplified, named, with inferred shapes.

    Batch norms that no convolution precedes become depthwise convolutions, so that they run on integers too, unless
    ``pack`` says otherwise. The rewrites that it names follow; they change values inside, so ranges are calibrated on
    the result.

    Raises:
        PassRequirementError: opset 13 cannot be reached, or the input is not one batch of float32 images.
    """
    # Simplified first: the converter has fewer operators to know, and old models' weights are no inputs any
    # more.
    model = raise_opset(simplify(original), MIN_OPSET)
    image_input(model)
    name_nodes(model)
    if pack is None or pack.integer_batchnorm:
        batchnorm_to_depthwise(model)
    model = infer_shapes(simplify(model))
    if pack is not None:
        apply_rewrites(model, pack.rewrites)
    return model


def check_constants(model: ModelProto) -> None:
    """Refuse weights and biases that are NaN or infinite: integers would hide them.

    Raises:
        PassRequirementError: names the constant and its node.
    """
    weights = initializers(model.graph)
    for node in model.graph.node:
        if node.op_type not in COMPUTE:
            continue
        for name in node.input[1:]:
            if name in weights and not np.isfinite(numpy_helper.to_array(weights[name])).all():
                raise PassRequirementError(
                    f'weights "{name}" of node "{node.name}" hold NaN or infinity; mend or fetch the model again'
                )


def check_exclude(original: ModelProto, prepared: ModelProto, exclude: Iterable[str]) -> None:
    """Names may come from the file as it is (a node that clean-up removes is float anyway) or as prepared."""
    known = {node.name for graph in (original.graph, prepared.graph) for node in graph.node if node.name}
    for name in exclude:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=5, cutoff=0.0)
            raise PassRequirementError(f'exclude: the model has no node "{name}"; {nearest(name, close)}')
