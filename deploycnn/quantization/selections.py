"""Shortcuts without weights: every other row and column of a value, and channels of zeros around them.

They are option A of He et al. 2016 (arXiv:1512.03385, section 4.1). As slices and paddings of integers they are three
operators, which onnxruntime runs one by one. As a 1x1 convolution with a stride, whose weights are 1 where a channel
goes on and whose scale is 1, they are one kernel that returns the same integers, as there is one scale and zero point
on both sides of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, ValueInfoProto

from deploycnn.graph.model import shape_of
from deploycnn.quantization.structure import Structure

#: With more weights the copies are faster: a convolution multiplies by all its zeros.
_MOST_WEIGHTS = 32 * 64

#: Rows and columns, and the axes of (N, C, H, W) counted from behind.
_ROWS_AND_COLUMNS = {2: 0, 3: 1, -2: 0, -1: 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What a run of ``Slice`` and ``Pad`` keeps of an image.

    Attributes:
        source: The value that it reads.
        channels: Of ``source``.
        reader: Name of the node that reads it.
        nodes: How many there are in the run.
        strides: Of rows and columns.
        before: Channels of zeros before those of ``source``.
        behind: And behind them.
    """

    source: str
    channels: int
    reader: str
    nodes: int = 0
    strides: tuple[int, int] = (1, 1)
    before: int = 0
    behind: int = 0

    def weight(self) -> npt.NDArray[np.int8]:
        """Of the convolution, shape (outputs, channels, 1, 1)."""
        kept = np.eye(self.channels, dtype=np.int8)
        return np.pad(kept, ((self.before, self.behind), (0, 0)))[:, :, None, None]

    def worth_a_convolution(self) -> bool:
        """Whether it is more than one copy, pixels are left out, and it would have few weights."""
        outputs = self.before + self.channels + self.behind
        return self.nodes > 1 and self.strides != (1, 1) and outputs * self.channels <= _MOST_WEIGHTS


def is_selection(weight: npt.NDArray[np.generic]) -> bool:
    """Whether a convolution with these integers lets every channel through, once and as it is."""
    if weight.ndim != 4 or weight.shape[2:] != (1, 1):
        return False
    kept = weight != 0
    return bool((kept.sum(axis=0) == 1).all() and (kept.sum(axis=1) <= 1).all() and (weight[kept] == 1).all())


def find_selections(
    graph: Structure, types: Mapping[str, ValueInfoProto], integer: Collection[str]
) -> dict[str, Selection]:
    """Runs of ``Slice`` and ``Pad`` that a convolution should stand for, by the value that they make.

    Args:
        graph: Of a float model.
        types: Of its values.
        integer: Names of the nodes that compute between DQ and Q; others are in no run.
    """
    found = dict[str, Selection]()
    for node in graph.nodes:
        if node.name not in integer or node.op_type not in {"Slice", "Pad"}:
            continue
        source = node.input[0]
        alone = len(graph.read_by[source]) == 1 and source not in graph.outputs
        before = found.get(source) if alone else None
        if before is None:
            shape = shape_of(types[source]) if source in types else None
            if shape is None or len(shape) != 4 or shape[1] is None:
                continue
            before = Selection(source=source, channels=shape[1], reader=node.name)
        after = _sliced(before, graph, node) if node.op_type == "Slice" else _padded(before, graph, node)
        if after is not None:
            found[node.output[0]] = replace(after, nodes=after.nodes + 1)
            if alone:
                found.pop(source, None)
    return {value: selection for value, selection in found.items() if selection.worth_a_convolution()}


def _sliced(before: Selection, graph: Structure, node: NodeProto) -> Selection | None:
    """``None`` where a ``Slice`` does more than leave out rows and columns at regular distances."""
    starts, ends, axes, steps = (graph.integers(node, position) for position in range(1, 5))
    if starts is not None and not any(node.input[4:]):
        steps = [1] * len(starts)
    if starts is None or ends is None or axes is None or steps is None:
        return None
    strides = list(before.strides)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if axis not in _ROWS_AND_COLUMNS or start != 0 or end < np.iinfo(np.int32).max or step < 1:
            return None
        strides[_ROWS_AND_COLUMNS[axis]] *= step
    return replace(before, strides=(strides[0], strides[1]))


def _padded(before: Selection, graph: Structure, node: NodeProto) -> Selection | None:
    """``None`` where a ``Pad`` does more than add channels of zeros."""
    added = graph.zero_channels(node)
    if added is None:
        return None
    return replace(before, before=before.before + added[0], behind=before.behind + added[1])
