"""An engine that computes on the fake GPU: ``logits = sum of the image * weight``, one row for each image."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.gpu.fakes import Gpu, Stream

IMAGE = (3, 2, 2)
CLASSES = 4
WEIGHT = np.arange(1, CLASSES + 1, dtype=np.float32)


class Context:
    """``IExecutionContext``: the members that the runner uses, and what they answer."""

    def __init__(self, gpu: Gpu, engine: Engine) -> None:
        self.gpu, self.engine = gpu, engine
        self.shape: tuple[int, ...] | None = None
        self.addresses: dict[str, int] = {}
        self.profile = 0
        self.fails = False
        self.ran = 0
        self.profiler: Any = None

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle in Stream.known
        self.profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.profiles[self.profile]
        fits = all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
        self.shape = shape if fits else None
        return name == "images" and fits

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == "logits"
        assert self.shape is not None
        return (-1,) if self.engine.data_dependent else (self.shape[0], CLASSES)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in ("images", "logits")

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert self.shape is not None
        assert set(self.addresses) == {"images", "logits"}
        if self.fails:
            return False
        shape, addresses = self.shape, dict(self.addresses)

        def run() -> None:
            self.ran += 1
            raw = self.gpu.read(addresses["images"], int(np.prod(shape)) * self.engine.dtype.itemsize)
            images = np.frombuffer(raw, self.engine.dtype).reshape(shape).astype(np.float32)
            logits = images.sum(axis=(1, 2, 3))[:, None] * WEIGHT
            self.gpu.write(addresses["logits"], logits.astype(self.engine.dtype).tobytes())
            if self.profiler is not None:
                self.profiler.report_layer_time("sum", 1.5)
                self.profiler.report_layer_time("scale", 0.5)

        self.gpu.enqueue(Stream.known[stream_handle], run, "engine", ms=2.0)
        return True


class Engine:
    """What ``Flavour`` gives of an engine."""

    def __init__(
        self, gpu: Gpu, dtype: str = "float32", *, inputs: int = 1, data_dependent: bool = False
    ) -> None:
        self.gpu, self.dtype, self.inputs = gpu, np.dtype(dtype), inputs
        self.data_dependent = data_dependent
        self.profiles = (((1, *IMAGE), (4, *IMAGE), (8, *IMAGE)), ((16, *IMAGE), (16, *IMAGE), (16, *IMAGE)))
        self.contexts: list[Context] = []


class Flavour:
    """The methods of ``engines.flavour.Flavour`` that a session calls."""

    def __init__(self, *, is_rtx: bool = False) -> None:
        self.name = "tensorrt-rtx" if is_rtx else "tensorrt"
        self.version, self.is_rtx = "11.4.0.106", is_rtx
        self.module = types.SimpleNamespace(IProfiler=type("IProfiler", (), {}))
        self.caches: list[tuple[bytes, bool]] = []

    def io_tensors(self, engine: Engine) -> tuple[Any, ...]:
        def tensor(name: str, is_input: bool, shape: tuple[int, ...]) -> Any:
            return types.SimpleNamespace(
                name=name,
                is_input=is_input,
                dtype=engine.dtype.name,
                shape=shape,
                profiles=engine.profiles if is_input else (),
            )

        inputs = [
            tensor("images" if index == 0 else f"more{index}", True, (-1, *IMAGE))
            for index in range(engine.inputs)
        ]
        return (*inputs, tensor("logits", False, (-1, CLASSES)))

    def context(
        self, engine: Engine, *, runtime_cache: bytes = b"", cuda_graphs: bool = False
    ) -> tuple[Context, Callable[[], bytes | None]]:
        self.caches.append((runtime_cache, cuda_graphs))
        engine.contexts.append(Context(engine.gpu, engine))
        return engine.contexts[-1], lambda: b"kernels" if self.is_rtx else None

    def inspect(self, engine: Engine) -> str:
        return "layers"


def expected(images: Any) -> Any:
    """What the engine answers, in float64."""
    return np.asarray(images, np.float64).sum(axis=(1, 2, 3))[:, None] * WEIGHT.astype(np.float64)
