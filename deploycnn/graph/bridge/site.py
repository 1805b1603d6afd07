"""One ONNX node as its operator's importer sees it: inputs, attributes, shapes; and the table of importers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from onnx import NodeProto
from torch import fx

from deploycnn.graph.bridge.builder import Builder, UnsupportedError
from deploycnn.graph.bridge.values import Array, Constant, RoundedConstant, Value
from deploycnn.graph.model import attribute

#: Imports one node: returns its output, or all its outputs.
Handler = Callable[["Site"], Value | Sequence[Value]]

OPERATORS: dict[str, Handler] = {}


def operator(*names: str) -> Callable[[Handler], Handler]:
    """Enter an importer into the table."""

    def enter(handler: Handler) -> Handler:
        for name in names:
            OPERATORS[name] = handler
        return handler

    return enter


class Site:
    """A node and where it stands."""

    def __init__(self, builder: Builder, node: NodeProto) -> None:
        self.builder = builder
        self.node = node
        self.opset = builder.opset
        self.inputs = [builder.read(name) for name in node.input]

    def value(self, index: int) -> Value | None:
        """An input, ``None`` where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def tensor(self, index: int) -> fx.Node:
        """An input as a run-time tensor."""
        value = self.value(index)
        if value is None:
            raise UnsupportedError(f"input {index} is missing")
        return self.builder.tensor(value)

    def constant(self, index: int) -> Array | None:
        """An input that must be constant, as an array; ``None`` where it is left out."""
        value = self.value(index)
        if value is None:
            return None
        if not isinstance(value, Constant):
            raise UnsupportedError(f'input "{self.node.input[index]}" is computed; it must be constant')
        return value.array

    def numbers(self, index: int) -> list[Any] | fx.Node | None:
        """An input of numbers such as a shape: a list, or a node whose value is one; ``None`` if left out."""
        value = self.value(index)
        if value is None:
            return None
        if isinstance(value, Constant):
            return value.array.reshape(-1).tolist()
        if isinstance(value, fx.Node) and value in self.builder.host:
            return value
        raise UnsupportedError(f'input "{self.node.input[index]}" is computed from data')

    def fixed_numbers(self, index: int) -> list[Any] | None:
        """An input of numbers that must be constant; ``None`` where it is left out."""
        found = self.constant(index)
        return None if found is None else found.reshape(-1).tolist()

    def axes(self, name: str, index: int) -> list[int] | None:
        """Axes, which older operator sets have as an attribute and newer ones as an input."""
        return self.ints(name) if self.has(name) else self.fixed_numbers(index)

    def has(self, name: str) -> bool:
        """Whether the attribute is given."""
        return any(held.name == name for held in self.node.attribute)

    def ints(self, name: str) -> list[int] | None:
        """A list attribute."""
        found = attribute(self.node, name)
        return None if found is None else [int(value) for value in cast("Sequence[int]", found)]

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        return int(cast("int", attribute(self.node, name, default)))

    def number(self, name: str, default: float) -> float:
        """A float attribute."""
        return float(cast("float", attribute(self.node, name, default)))

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        found = attribute(self.node, name, default)
        return found.decode() if isinstance(found, bytes) else str(found)

    def shape(self, index: int) -> tuple[int | None, ...] | None:
        """Shape of an input, as far as it is known."""
        value = self.value(index)
        if isinstance(value, Constant | RoundedConstant):
            return cast("tuple[int, ...]", value.array.shape)
        return self.builder.shape(self.node.input[index])

    def rank(self, index: int) -> int:
        """Number of axes of an input."""
        shape = self.shape(index)
        if shape is None:
            raise UnsupportedError(f'the rank of "{self.node.input[index]}" is not known')
        return len(shape)

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> fx.Node:
        """Call a function at run time."""
        return self.builder.call(function, *arguments, **options)

    def host(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> fx.Node:
        """Call a function at run time whose result is an array of numbers."""
        node = self.builder.call(function, *arguments, **options)
        self.builder.host.add(node)
        return node

    def hosted(self, index: int) -> Any:
        """An input as numbers: a node, or a nested list."""
        value = self.value(index)
        return value.array.tolist() if isinstance(value, Constant) else value

    def only_output(self, position: int, what: str) -> None:
        """Refuse a node whose further outputs are read.

        Args:
            position: First output that must not be read.
            what: What it is, for the message.
        """
        for name in self.node.output[position:]:
            if name and (name in self.builder.readers or name in self.builder.outputs):
                raise UnsupportedError(f"its output of {what} is used")

    def scalar(self, index: int) -> float | int | bool | None:
        """The content of a constant with a single element and no more axes than others have."""
        value = self.value(index)
        if isinstance(value, Constant) and value.array.size == 1 and value.array.dtype != np.bool_:
            others = [self.shape(i) for i in range(len(self.inputs)) if i != index]
            ranks = [len(shape) for shape in others if shape is not None]
            if value.array.ndim <= max(ranks, default=0):
                return cast("float | int", value.array.item())
        return None
