"""TensorRT-RTX that builds for real and runs on the fake GPU: onnxruntime computes what the engine was built from.

So the tests of engines on a GPU run everywhere with all of the package's own code; only the library's execution is
replaced. Time is invented: each kernel takes ``KERNEL_MS``, and ``MAC_MS`` for each multiply-accumulate.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from deploycnn.engines import audit, building, layers
from deploycnn.engines.building import Built
from deploycnn.engines.device import Gpu as Described
from deploycnn.engines.flavour import Flavour
from deploycnn.engines.tensors import IoTensor
from deploycnn.errors import ArtifactError
from deploycnn.graph.model import runtime_inputs, shape_of
from tests.gpu.fakes import Gpu, Stream

HERE = Described(name="NVIDIA Fake", capability=(8, 9), driver_cuda="13.0")
KERNEL_MS, MAC_MS = 0.05, 1e-6


@dataclasses.dataclass
class Engine:
    """A plan with what it was built from."""

    model: onnx.ModelProto
    told: str
    batch: tuple[int, int, int]
    known: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return tuple(axis or 0 for axis in (shape_of(runtime_inputs(self.model)[0]) or ())[1:])

    def times(self, batch_size: int) -> dict[str, float]:
        """Milliseconds by kernel."""
        if batch_size not in self.known:
            self.known[batch_size] = self._times(batch_size)
        return self.known[batch_size]

    def _times(self, batch_size: int) -> dict[str, float]:
        told = layers.parse(self.told)
        products = audit.products_of(told, audit.asked_of(self.model))
        return {
            layer.name: KERNEL_MS
            + MAC_MS * batch_size * sum(item.macs or 0 for item in products.get(layer.name, []))
            for layer in told
        }


class Context:
    """``IExecutionContext`` on the fake GPU's memory."""

    profiler: Any = None

    def __init__(self, gpu: Gpu, engine: Engine) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = ort.InferenceSession(
            engine.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.input, self.output = self.session.get_inputs()[0].name, self.session.get_outputs()[0].name
        self.gpu, self.engine = gpu, engine
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return name == self.input and self.engine.batch[0] <= shape[0] <= self.engine.batch[2]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        output = self.session.run(None, {self.input: np.zeros((1, *self.engine.shape), np.float32)})[0]
        return (self.shape[0], *output.shape[1:])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, handle: int) -> bool:
        addresses, shape = dict(self.addresses), self.shape
        times = self.engine.times(shape[0])

        def run() -> None:
            raw = self.gpu.read(addresses[self.input], 4 * int(np.prod(shape)))
            given = np.frombuffer(raw, np.float32).reshape(shape)
            found = self.session.run(None, {self.input: given})[0]
            self.gpu.write(addresses[self.output], found.tobytes())
            for name, ms in times.items() if self.profiler is not None else ():
                self.profiler.report_layer_time(name, ms)

        self.gpu.enqueue(Stream.known[handle], run, "engine", ms=sum(times.values()))
        return True


class Simulated(Flavour):
    """The installed TensorRT-RTX, whose engines run on ``gpu`` if they were built since :meth:`watch`."""

    __slots__ = ("engines", "gpu")

    def __init__(self, found: Flavour, gpu: Gpu) -> None:
        super().__init__(found.name, found.module, found.version)
        object.__setattr__(self, "gpu", gpu)
        object.__setattr__(self, "engines", {})

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Note what is built."""
        real = building.build

        def build(path: Path, *args: Any, **kwargs: Any) -> Built:
            built = real(path, *args, **kwargs)
            told = built.log.layer_information() or ""
            engine = Engine(onnx.load(str(path)), told, built.record.batch)
            self.engines[hashlib.sha256(built.plan).digest()] = engine  # type: ignore[attr-defined]
            return built

        monkeypatch.setattr(building, "build", build)

    def deserialize(self, plan: bytes, *, what: str, host_code_allowed: bool = False) -> Any:
        found = self.engines.get(hashlib.sha256(plan).digest())  # type: ignore[attr-defined]
        if found is None:
            raise ArtifactError(f"{what}: not an engine of {self.name} {self.version}, or damaged")
        return found

    def io_tensors(self, engine: Any) -> tuple[IoTensor, ...]:
        profile: Any = tuple((size, *engine.shape) for size in engine.batch)
        (given,), (answer,) = runtime_inputs(engine.model), engine.model.graph.output
        classes = tuple(Context(self.gpu, engine).session.get_outputs()[0].shape[1:])  # type: ignore[attr-defined]
        return (
            IoTensor(
                name=given.name,
                is_input=True,
                dtype="float32",
                shape=(-1, *engine.shape),
                profiles=(profile,),
            ),
            IoTensor(name=answer.name, is_input=False, dtype="float32", shape=(-1, *classes)),
        )

    def context(
        self, engine: Any, *, runtime_cache: bytes = b"", cuda_graphs: bool = False
    ) -> tuple[Any, Callable[[], bytes | None]]:
        return Context(self.gpu, engine), lambda: b"kernels"  # type: ignore[attr-defined]

    def inspect(self, engine: Any, context: Any | None = None) -> str:
        told: str = engine.told
        return told
