"""Inputs and outputs of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: TensorRT's element types -> NumPy's names (bfloat16 and the like are named as ``ml_dtypes`` does).
DTYPES: Mapping[str, str] = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32",
    "INT64": "int64", "BOOL": "bool", "FP8": "float8_e4m3fn", "INT4": "int4",
}  # fmt: skip

#: Shapes of one profile: smallest, the one optimized for, largest.
ProfileShapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class IoTensor:
    """An input or output of an engine.

    Attributes:
        name: As in the ONNX graph.
        is_input: Else an output.
        dtype: NumPy's name of the element type.
        shape: -1 is a dynamic axis.
        profiles: For inputs: min, opt and max shape of each optimization profile.
    """

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]
    profiles: tuple[ProfileShapes, ...] = ()


def three(shapes: Sequence[Sequence[int]]) -> ProfileShapes:
    """Smallest, best and largest shape, as tuples."""
    smallest, best, largest = (tuple(int(axis) for axis in shape) for shape in shapes)
    return smallest, best, largest
