"""Layers of an engine from what TensorRT tells of them, in each of its dialects.

* TensorRT 10's inspector JSON: ``Bindings`` are names; a tensor's ``Format/Datatype`` is one sentence.
* TensorRT 11's and TensorRT-RTX's: ``I/O Tensors`` are objects; ``Datatype`` and ``Format`` are apart.
* The text that the builder logs at detailed verbosity ("Layers:", a line each): the same fields as in the JSON of its
  version. It is all that there is on a machine without a GPU, where an engine cannot be loaded to be inspected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deploycnn.errors import ArtifactError

#: Words in TensorRT's descriptions of a tensor's type -> precision, the more particular first.
_TYPES = (
    (r"bfloat16|bf16", "bf16"), (r"fp8|float8|e4m3", "fp8"), (r"fp4|float4", "fp4"), (r"half|fp16|float16", "fp16"),
    (r"uint8", "uint8"), (r"int8", "int8"), (r"int4", "int4"), (r"int64", "int64"), (r"int32", "int32"),
    (r"float|fp32", "fp32"), (r"bool", "bool"),
)  # fmt: skip

_ONNX = re.compile(r"\[ONNX Layer: (.+?)\](?=\[|[\x1e\x1f]|\s*$)")
_REFORMAT = re.compile(r"^reformat", re.IGNORECASE)
#: Kernels that TensorRT generates are named after their pieces: ``__myl_CastReplConc_myl0_1``.
_GENERATED = re.compile(r"^_*myl_((?:[A-Z][a-z]+)+)")
_MOVING = frozenset({"Move", "Tran", "Repl", "Conc", "Cast", "Resh"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A value between two layers. ``precision`` is "fp32", "int8", ...; empty where it is not told."""

    name: str
    precision: str
    format: str
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A kernel of the engine.

    Attributes:
        name: As TensorRT calls it.
        kind: Its ``LayerType``: "CaskConvolution", "correlation", "kgen", "Reformat", ...
        inputs: Values that it reads.
        constants: Weights, scales and the like.
        outputs: Values that it makes.
        tactic: Name of the chosen kernel; empty where it is chosen later.
        onnx_nodes: Names of the ONNX nodes that it computes, all or in part.
    """

    name: str
    kind: str
    inputs: tuple[Tensor, ...] = ()
    constants: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    tactic: str = ""
    onnx_nodes: tuple[str, ...] = ()

    @property
    def pieces(self) -> tuple[str, ...]:
        """Operations of a generated kernel, by TensorRT's abbreviations: ("Cast", "Repl", "Conc")."""
        found = _GENERATED.match(self.name)
        return tuple(re.findall(r"[A-Z][a-z]+", found[1])) if found else ()

    @property
    def is_reformat(self) -> bool:
        """Whether it only moves values to another layout or type, and stands for no operator of the graph."""
        if _REFORMAT.match(self.kind) or _REFORMAT.match(self.name):
            return True
        if not self.pieces or not set(self.pieces) <= _MOVING:
            return False
        formats = {tensor.format for tensor in (*self.inputs, *self.outputs)}
        return not self.onnx_nodes or len(formats) > 1

    @property
    def precision(self) -> str:
        """Of its arithmetic: that of the values that it multiplies, as far as the engine tells.

        Integers need both sides to be integers: INT8 weights that are scaled back first are float arithmetic.
        """
        read = [tensor.precision for tensor in self.inputs if tensor.precision]
        weight = max(self.constants, key=lambda tensor: _size(tensor.shape), default=None)
        stored = weight.precision if weight else ""
        if not read:
            return stored or next((tensor.precision for tensor in self.outputs if tensor.precision), "")
        # A residual that is added on the way may have another type than the values that are multiplied.
        found = stored if stored in read else _widest([read[0], stored])
        return "tf32" if found == "fp32" and "tf32" in self.tactic else found


def _widest(precisions: list[str]) -> str:
    known = [precision for precision in ("fp32", "bf16", "fp16", "fp8") if precision in precisions]
    return known[0] if known else next(precision for precision in precisions if precision)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for axis in shape:
        size *= abs(axis)
    return size


def parse(text: str) -> list[Layer]:
    """Layers in the order in which they run, from the inspector's JSON or the builder's log.

    Raises:
        ArtifactError: it is neither, or holds names only.
    """
    stripped = text.lstrip()
    if stripped.startswith("Layers:"):
        raw: list[Any] = [
            dict(_fields(line)) for line in stripped.splitlines()[1:] if line.startswith("Name: ")
        ]
    else:
        try:
            content = json.loads(stripped)
        except ValueError as error:
            raise ArtifactError(f"layer information: neither JSON nor a builder's log: {error}") from error
        raw = content.get("Layers", []) if isinstance(content, Mapping) else content
    if not isinstance(raw, list) or not raw:
        raise ArtifactError("layer information: holds no layers; build with profiling_verbosity: detailed")
    if not all(isinstance(item, Mapping) for item in raw):
        raise ArtifactError("layer information: holds names only; build with profiling_verbosity: detailed")
    return [_layer(item) for item in raw]


#: Layers that hold the arithmetic of a CNN, by kind, and by the pieces of generated kernels.
_COMPUTE = re.compile(r"conv|correlation|gemm|matmul|matrix|deconv|fullyconnected", re.IGNORECASE)
_COMPUTE_PIECES = frozenset({"Corr", "Conv", "Fc", "Gemm", "Dot", "Matm", "Bmm", "Deco"})


def computes(layer: Layer) -> bool:
    """Whether it is a convolution or matrix product, alone or fused with others."""
    return bool(_COMPUTE.search(layer.kind) or _COMPUTE_PIECES & set(layer.pieces))


def precisions(text: str) -> tuple[set[str], set[str]]:
    """Precisions of convolutions and matrix products, and those of the other layers: "f32", "int8", ...

    Raises:
        ArtifactError: see :func:`parse`.
    """
    compute: set[str] = set()
    rest: set[str] = set()
    for layer in parse(text):
        if layer.precision:
            short = layer.precision.replace("fp32", "f32").replace("fp16", "f16")
            (compute if computes(layer) else rest).add(short)
    return compute, rest


def _layer(raw: Mapping[str, Any]) -> Layer:
    constants = tuple(_tensor(item) for item in raw.get("Constants") or ())
    weights = raw.get("Weights")
    if not constants and isinstance(weights, Mapping):
        constants = (Tensor(name="weights", precision=precision_of(str(weights.get("Type", ""))), format=""),)
    metadata = str(raw.get("Metadata", ""))
    return Layer(
        name=str(raw.get("Name", "")),
        kind=str(raw.get("LayerType", "")),
        inputs=tuple(_tensor(item) for item in raw.get("Inputs") or ()),
        constants=constants,
        outputs=tuple(_tensor(item) for item in raw.get("Outputs") or ()),
        tactic=str(raw.get("TacticName") or raw.get("TacticValue") or ""),
        onnx_nodes=tuple(dict.fromkeys(_ONNX.findall(metadata))) or _from_name(raw),
    )


def _from_name(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Engines without metadata: a fused layer is named after its nodes, "conv1 + relu1"."""
    name = str(raw.get("Name", ""))
    if "Metadata" in raw or _REFORMAT.match(name) or name.startswith("__"):
        return ()
    return tuple(part.strip() for part in name.split(" + "))


def _tensor(raw: Any) -> Tensor:
    if not isinstance(raw, Mapping):
        return Tensor(name=str(raw), precision="", format="")
    both = str(raw.get("Format/Datatype", ""))
    shape = raw.get("Dimensions") or ()
    return Tensor(
        name=str(raw.get("Name", "")),
        precision=precision_of(str(raw.get("Datatype") or raw.get("DataType") or both)),
        format=str(raw.get("Format") or both),
        shape=tuple(int(axis) for axis in shape),
    )


def precision_of(text: str) -> str:
    """The precision in a description such as "Half" or "Row major linear FP16 format"; empty if there is none."""
    return next((name for pattern, name in _TYPES if re.search(pattern, text, re.IGNORECASE)), "")


# -- the builder's text: "Key: value, Key: [ { Key: value, ... }, ... ], ..." -----------------------------------

_KEY = re.compile(r"([A-Z][A-Za-z/]*): ")
_NEXT = re.compile(r", (?=[A-Z][A-Za-z/]*: )")


def _fields(line: str) -> Iterator[tuple[str, Any]]:
    """Keys and values of a line. ``Metadata`` is the last and takes the rest, whatever is in it."""
    position = 0
    while position < len(line):
        key = _KEY.match(line, position)
        if key is None:
            return
        if key[1] == "Metadata":
            yield key[1], line[key.end() :]
            return
        value, position = _value(line, key.end())
        yield key[1], value
        position += 2 if line.startswith(", ", position) else 1


def _value(line: str, start: int) -> tuple[Any, int]:
    if line.startswith("[ {", start):
        items, position = [], start + 2
        while line.startswith("{", position):
            end = _closing(line, position)
            items.append(dict(_fields(line[position + 2 : end].rstrip())))
            position = end + 1
            position += 2 if line.startswith(", {", position) else 0
        return items, line.index("]", position) + 1
    if line.startswith("[", start):
        end = line.index("]", start)
        inside = line[start + 1 : end]
        return (
            [int(part) for part in inside.split(",")] if re.fullmatch(r"[-\d,]+", inside) else []
        ), end + 1
    following = _NEXT.search(line, start)
    end = following.start() if following else len(line)
    return line[start:end], end


def _closing(line: str, start: int) -> int:
    """Where the brace that opens at ``start`` closes."""
    depth = 0
    for position in range(start, len(line)):
        depth += {"{": 1, "}": -1}.get(line[position], 0)
        if depth == 0:
            return position
    raise ArtifactError("layer information: a line ends within braces; the log is cut off")
