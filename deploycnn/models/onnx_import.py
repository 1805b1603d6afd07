"""Open other people's ONNX files safely: whole, valid, and nothing read from outside their folder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, TensorProto
from onnx.external_data_helper import load_external_data_for_tensor

from deploycnn.errors import SourceError
from deploycnn.graph import model as graphs

#: The oldest operator set whose semantics today's tools still run.
MIN_OPSET = 9


def read_foreign(path: Path) -> tuple[ModelProto, bool]:
    """Read and check an ONNX file.

    Returns:
        The model with all its weights inside, and whether some of them were in external files.

    Raises:
        SourceError: the file is missing, truncated, not ONNX, invalid or too old, or its external data is
            missing, truncated or outside the model's folder.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise SourceError(f"{path}: no such file") from error
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise SourceError(f"{path}: truncated or not an ONNX model; fetch or export it again") from error
    if not (model.graph.node or model.graph.output):
        raise SourceError(
            f"{path}: truncated or not an ONNX model (no graph in it); fetch or export it again"
        )
    if not model.opset_import:
        raise SourceError(f"{path}: not valid ONNX: it says no operator set (opset_import); export it again")
    opset = graphs.opset_of(model)
    if 0 < opset < MIN_OPSET:
        raise SourceError(
            f"{path}: opset {opset} is older than {MIN_OPSET}; convert it with onnx.version_converter, "
            "or export it again"
        )
    external = _embed(model, path)
    _check(model, path)
    return model, external


def _check(model: ModelProto, path: Path) -> None:
    if model.ByteSize() >= graphs.MAX_SELF_CONTAINED_BYTES:
        return  # The checker goes through one protobuf, which cannot be that large.
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        reason = " ".join(str(error).split())[:300]
        raise SourceError(f"{path}: not a valid ONNX model, or truncated: {reason}") from error


def _embed(model: ModelProto, path: Path) -> bool:
    """Read external data into the model; return whether there was any."""
    folder = path.parent.resolve()
    found = False
    for tensor in _all_tensors(model.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        found = True
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        file = (folder / location).resolve()
        # A location that leaves the folder is refused also where it comes back: onnx itself refuses to follow it.
        leaves = Path(location).is_absolute() or ".." in Path(location).parts
        if not location or leaves or not file.is_relative_to(folder):
            raise SourceError(
                f'{path}: the data of "{tensor.name}" lie outside the model\'s folder ("{location}"); '
                "refused. Put the data file beside the model and export it again"
            )
        if not file.is_file():
            raise SourceError(
                f'{path}: the data of "{tensor.name}" are missing: {file}; put the file beside the model'
            )
        needed = _stored_bytes(tensor)
        offset, length = _whole(entries, "offset", path, 0), _whole(entries, "length", path, needed)
        if length != needed or offset + length > file.stat().st_size:
            raise SourceError(
                f'{path}: the data of "{tensor.name}" need {needed} bytes from byte {offset} of {file}, '
                f"which has {file.stat().st_size}; truncated, fetch it again"
            )
        load_external_data_for_tensor(tensor, str(folder))
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]
    return found


def _whole(entries: dict[str, str], key: str, path: Path, default: int) -> int:
    value = entries.get(key, str(default))
    if not value.isdigit():
        raise SourceError(
            f'{path}: external data with {key} "{value}", which is no number of bytes; export it again'
        )
    return int(value)


def _stored_bytes(tensor: TensorProto) -> int:
    """Bytes of a tensor's raw data; 4-bit types are packed two to a byte."""
    count: int = math.prod(tensor.dims)
    if tensor.data_type in {TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1}:
        return (count + 1) // 2
    itemsize: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return count * itemsize


def _all_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every stored tensor: initializers, attributes of nodes, and those of subgraphs."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for inner in graphs.subgraphs(node):
            yield from _all_tensors(inner)


def external_files(path: Path) -> list[Path]:
    """Existing files beside ``path`` that hold its external data; empty where it cannot be read at all."""
    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except (OSError, DecodeError):
        return []
    names = {
        entry.value
        for tensor in _all_tensors(model.graph)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    folder = path.parent.resolve()
    files = (folder / name for name in sorted(names))
    return [file for file in files if file.resolve().is_relative_to(folder) and file.is_file()]


def precision_of(model: ModelProto) -> str:
    """Of the weights and activations as stored in the graph: "fp32", "fp16", "int8" or "int8_fp16"."""
    sizes: dict[int, int] = {}
    for tensor in _all_tensors(model.graph):
        sizes[tensor.data_type] = sizes.get(tensor.data_type, 0) + math.prod(tensor.dims)
    half = sizes.get(TensorProto.FLOAT16, 0) > sizes.get(TensorProto.FLOAT, 0)
    if graphs.is_quantized(model):
        return "int8_fp16" if half else "int8"
    return "fp16" if half else "fp32"
