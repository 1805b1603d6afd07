"""TensorRT-RTX that builds for real and runs on the fake GPU: onnxruntime computes what the engine was built from.

So the tests of engines on a GPU run everywhere with all of the package's own code; only the library's execution is
replaced.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deploycnn.engines import layers
from deploycnn.engines.device import Gpu as Described
from deploycnn.engines.flavour import Flavour
from deploycnn.engines.tensors import IoTensor
from deploycnn.errors import ArtifactError
from tests.gpu.fakes import Gpu, Stream

HERE = Described(name="NVIDIA Fake", capability=(8, 9), driver_cuda="13.0")
SHAPE = (8, 12, 12)


@dataclasses.dataclass
class Engine:
    """A plan with the graph that lies beside it."""

    folder: Path
    batch: tuple[int, int, int]


class Context:
    """``IExecutionContext`` on the fake GPU's memory."""

    profiler: Any = None

    def __init__(self, gpu: Gpu, engine: Engine) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        path = str(engine.folder / "model.onnx")
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.gpu, self.engine = gpu, engine
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return name == "images" and self.engine.batch[0] <= shape[0] <= self.engine.batch[2]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        output = self.session.run(None, {"images": np.zeros((1, *SHAPE), np.float32)})[0]
        return (self.shape[0], *output.shape[1:])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, handle: int) -> bool:
        addresses, shape = dict(self.addresses), self.shape

        def run() -> None:
            raw = self.gpu.read(addresses["images"], 4 * int(np.prod(shape)))
            given = np.frombuffer(raw, np.float32).reshape(shape)
            self.gpu.write(addresses["logits"], self.session.run(None, {"images": given})[0].tobytes())
            for layer in layers.parse(told(self.engine.folder)) if self.profiler is not None else ():
                self.profiler.report_layer_time(layer.name, 0.25)

        self.gpu.enqueue(Stream.known[handle], run, "engine", ms=2.0)
        return True


def told(folder: Path) -> str:
    """What the builder said of the layers."""
    return (folder / "layers.txt").read_text()


class Simulated(Flavour):
    """The installed TensorRT-RTX, whose engines run on ``gpu``."""

    __slots__ = ("gpu",)

    def __init__(self, found: Flavour, gpu: Gpu) -> None:
        super().__init__(found.name, found.module, found.version)
        object.__setattr__(self, "gpu", gpu)

    def deserialize(self, plan: bytes, *, what: str, host_code_allowed: bool = False) -> Any:
        folder = Path(what).parent
        if not any(plan):
            raise ArtifactError(f"{what}: not an engine of {self.name} {self.version}, or damaged")
        manifest = folder / "manifest.json"
        batch = (1, 1, 16)
        if manifest.is_file():
            batch = tuple(json.loads(manifest.read_text())["facts"]["record"]["engine"]["batch"])
        return Engine(folder, batch)

    def io_tensors(self, engine: Any) -> tuple[IoTensor, ...]:
        profile = tuple((size, *SHAPE) for size in engine.batch)
        return (
            IoTensor(name="images", is_input=True, dtype="float32", shape=(-1, *SHAPE), profiles=(profile,)),  # type: ignore[arg-type]
            IoTensor(name="logits", is_input=False, dtype="float32", shape=(-1, 5)),
        )

    def context(
        self, engine: Any, *, runtime_cache: bytes = b"", cuda_graphs: bool = False
    ) -> tuple[Any, Callable[[], bytes | None]]:
        return Context(self.gpu, engine), lambda: b"kernels"  # type: ignore[attr-defined]

    def inspect(self, engine: Any, context: Any | None = None) -> str:
        return told(engine.folder)
