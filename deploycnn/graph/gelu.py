"""GELU in the order in which onnxruntime knows it as one operator."""

from __future__ import annotations

from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from deploycnn.graph.model import consumers, initializers, lasting_names, producers


def order_gelu(model: ModelProto) -> int:
    """Make ``x * (0.5 * (1 + erf(x / sqrt(2))))`` into ``0.5 * (x * (1 + erf(x / sqrt(2))))``; return how many.

    In place. PyTorch's exporter writes the first for opsets without ``Gelu``, which onnxruntime computes in five
    passes; it fuses the second, with the bias before it. To halve is exact, so each form gives the other's bits.
    """
    graph = model.graph
    constants, makers, readers = initializers(graph), producers(graph), consumers(graph)
    lasting = lasting_names(graph)

    def only_reader(node: NodeProto, operator: str) -> NodeProto | None:
        found = readers.get(node.output[0], [])
        alone = len(found) == 1 and node.output[0] not in lasting
        return found[0] if alone and found[0].op_type == operator else None

    changed = 0
    for node in graph.node:
        scaled = makers.get(node.input[0]) if node.op_type == "Erf" else None
        if scaled is None or scaled.op_type not in {"Div", "Mul"}:
            continue
        shifted = only_reader(node, "Add")
        halved = only_reader(shifted, "Mul") if shifted is not None else None
        product = only_reader(halved, "Mul") if halved is not None else None
        if shifted is None or halved is None or product is None:
            continue
        half = [name for name in halved.input if name != shifted.output[0] and _is(constants.get(name), 0.5)]
        source = [name for name in product.input if name != halved.output[0]]
        if len(half) == len(source) == 1 and source[0] in scaled.input and source[0] not in constants:
            halved.input[:] = [source[0], shifted.output[0]]
            product.input[:] = [halved.output[0], half[0]]
            changed += 1
    return changed


def _is(tensor: TensorProto | None, value: float) -> bool:
    if tensor is None:
        return False
    array = numpy_helper.to_array(tensor)
    return bool(array.size == 1 and array.ndim <= 1 and array.item() == value)
