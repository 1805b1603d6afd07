"""A graph without its trained tensors, as text: what a stored module is rebuilt from."""

from __future__ import annotations

import base64
import binascii
import zlib

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import ModelProto, TensorProto, helper, numpy_helper

from deploycnn.errors import ArtifactError
from deploycnn.graph.bridge.bridge import Bridge


def skeleton(bridge: Bridge) -> str:
    """The graph behind ``bridge`` without the content of the tensors that its module holds.

    What the module does not hold (shapes, limits, constants of preprocessing) stays. The text is base64 of a
    zlib stream of the serialized model: a few kilobytes.
    """
    model = ModelProto()
    model.CopyFrom(bridge.original)
    held = {slot.origin for slot in bridge.slots} - bridge.evaluated
    for tensor in model.graph.initializer:
        if tensor.name in held:
            tensor.CopyFrom(TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims))
    return base64.b64encode(zlib.compress(model.SerializeToString(deterministic=True), 9)).decode()


def from_skeleton(text: str) -> ModelProto:
    """The graph of :func:`skeleton`, zeros in place of what was left out.

    Raises:
        ArtifactError: the text is damaged.
    """
    try:
        model: ModelProto = ModelProto.FromString(zlib.decompress(base64.b64decode(text, validate=True)))
    except (binascii.Error, zlib.error, DecodeError, ValueError) as error:
        raise ArtifactError(f"the stored graph is damaged ({error}); make the artifact again") from error
    for tensor in model.graph.initializer:
        if not _has_content(tensor):
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tuple(tensor.dims), dtype), tensor.name))
    return model


def _has_content(tensor: TensorProto) -> bool:
    if 0 in tensor.dims or tensor.raw_data:
        return True
    return any(field.name.endswith("_data") for field, _ in tensor.ListFields())
