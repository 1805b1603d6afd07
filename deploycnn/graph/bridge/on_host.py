"""Operators on shapes: where all inputs are numbers and not tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from onnx import TensorProto, numpy_helper

from deploycnn.graph.bridge import host
from deploycnn.graph.bridge.builder import UnsupportedError
from deploycnn.graph.bridge.site import Site
from deploycnn.graph.bridge.values import Value
from deploycnn.graph.model import attribute

HOST_OPERATORS: dict[str, Callable[[Site], Value]] = {}


def _on_host(*names: str) -> Callable[[Callable[[Site], Value]], Callable[[Site], Value]]:
    def enter(handler: Callable[[Site], Value]) -> Callable[[Site], Value]:
        for name in names:
            HOST_OPERATORS[name] = handler
        return handler

    return enter


def _all(site: Site) -> list[Any]:
    return [site.hosted(index) for index in range(len(site.inputs))]


@_on_host(*host.ELEMENTWISE)
def _elementwise(site: Site) -> Value:
    return site.host(host.elementwise, site.node.op_type, *_all(site))


_KINDS: dict[int, str] = {
    TensorProto.FLOAT: "float",
    TensorProto.FLOAT16: "float",
    TensorProto.DOUBLE: "float",
    TensorProto.INT32: "int",
    TensorProto.INT64: "int",
    TensorProto.BOOL: "bool",
}


@_on_host("Cast")
def _cast(site: Site) -> Value:
    target = site.integer("to", 0)
    if target not in _KINDS:
        raise UnsupportedError(f"a shape is cast to {TensorProto.DataType.Name(target)}")
    return site.host(host.cast, site.hosted(0), _KINDS[target])


@_on_host("Clip")
def _clip(site: Site) -> Value:
    if site.opset < 11:
        bounds = [attribute(site.node, name, None) for name in ("min", "max")]
    else:
        bounds = [site.hosted(index) if site.value(index) is not None else None for index in (1, 2)]
    return site.host(host.clip, site.hosted(0), *bounds)


@_on_host("Transpose")
def _transpose(site: Site) -> Value:
    return site.host(host.transpose, site.hosted(0), site.ints("perm") or None)


@_on_host("Gather")
def _gather(site: Site) -> Value:
    return site.host(host.gather, site.hosted(0), site.hosted(1), site.integer("axis", 0))


@_on_host("Concat")
def _concat(site: Site) -> Value:
    return site.host(host.concatenate, site.integer("axis", 0), *_all(site))


@_on_host("Slice")
def _slice(site: Site) -> Value:
    if site.opset < 10:
        bounds: list[Any] = [site.ints("starts"), site.ints("ends"), site.ints("axes"), None]
    else:
        bounds = [site.numbers(index) for index in range(1, 5)]
    return site.host(host.take_slice, site.hosted(0), *bounds)


@_on_host("Reshape")
def _reshape(site: Site) -> Value:
    return site.host(host.reshape, site.hosted(0), site.hosted(1))


@_on_host("Squeeze")
def _squeeze(site: Site) -> Value:
    return site.host(host.squeeze, site.hosted(0), site.axes("axes", 1))


@_on_host("Unsqueeze")
def _unsqueeze(site: Site) -> Value:
    return site.host(host.unsqueeze, site.hosted(0), site.axes("axes", 1) or [0])


@_on_host("ReduceProd")
def _product(site: Site) -> Value:
    return site.host(host.product, site.hosted(0), keepdims=bool(site.integer("keepdims", 1)))


@_on_host("ConstantOfShape")
def _filled(site: Site) -> Value:
    held = attribute(site.node, "value")
    value = np.float32(0) if held is None else numpy_helper.to_array(cast("TensorProto", held)).reshape(-1)[0]
    return site.host(host.filled, site.hosted(0), value.item())


@_on_host("Range")
def _range(site: Site) -> Value:
    return site.host(host.arange, *_all(site))


@_on_host("Shape")
def _shape(site: Site) -> Value:
    return site.host(host.shape_of, site.hosted(0), 0, None)
