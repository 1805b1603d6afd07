"""ONNX Runtime with GPU providers, on the fake GPU: names as in onnxruntime 1.32 (held against it by a test)."""

from __future__ import annotations

import types
from typing import Any

import numpy as np

from tests.gpu.fakes import Gpu, Stream
from tests.runtimes.fake_engine import CLASSES, IMAGE, WEIGHT

RTX = "NvTensorRTRTXExecutionProvider"


class SessionOptions:
    def __init__(self) -> None:
        self.config: dict[str, str] = {}
        self.devices: list[tuple[Any, dict[str, str]]] = []

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.config[key] = value

    def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
        self.devices.append((devices, options))


class RunOptions:
    def __init__(self) -> None:
        self.config: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.config[key] = value


class Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, tuple[Any, ...]] = {}
        self.outputs: dict[str, tuple[Any, ...]] = {}

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Any, buffer_ptr: int
    ) -> None:
        assert (device_type, device_id) == ("cuda", 0)
        self.inputs[name] = (np.dtype(element_type), tuple(shape), buffer_ptr)

    def bind_output(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Any, buffer_ptr: int
    ) -> None:
        assert (device_type, device_id) == ("cuda", 0)
        self.outputs[name] = (np.dtype(element_type), tuple(shape), buffer_ptr)


class OnnxRuntime(types.ModuleType):
    """The module. ``providers``: those that are built in; ``loads``: whether the GPU's one loads."""

    class ExecutionMode:
        ORT_SEQUENTIAL = 0

    class GraphOptimizationLevel:
        ORT_ENABLE_ALL = 99

    SessionOptions, RunOptions = SessionOptions, RunOptions
    __version__ = "1.32.0"

    def __init__(self, gpu: Gpu, providers: tuple[str, ...], *, loads: bool = True, stray: str = "") -> None:
        super().__init__("onnxruntime")
        self.gpu, self.providers, self.loads, self.stray = gpu, providers, loads, stray
        self.registered: dict[str, str] = {}
        self.sessions: list[Any] = []
        self.output_shape: list[Any] = ["N", CLASSES]
        self.output_type = "tensor(float)"
        self.serves = True

    def get_available_providers(self) -> list[str]:
        return [*self.providers, "CPUExecutionProvider"]

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if path == "broken.so":
            raise RuntimeError("libcudart.so.13: cannot open shared object file")
        self.registered[name] = path

    def get_ep_devices(self) -> list[Any]:
        names = ["CPUExecutionProvider", *(self.registered if self.serves else [])]
        return [types.SimpleNamespace(ep_name=name) for name in names]

    def InferenceSession(self, model: Any, options: Any, *, providers: Any, enable_fallback: int) -> Session:
        assert enable_fallback == 0
        session = Session(self, options, providers)
        self.sessions.append(session)
        return session


class Session:
    def __init__(self, ort: OnnxRuntime, options: SessionOptions, providers: Any) -> None:
        self.ort, self.options = ort, options
        if providers is None:
            [(devices, self.provider_options)] = options.devices
            self.provider = devices[0].ep_name
        else:
            self.provider, self.provider_options = providers[0]
        self.bindings: list[Binding] = []
        self.runs = 0

    def get_providers(self) -> list[str]:
        return [self.provider, "CPUExecutionProvider"] if self.ort.loads else ["CPUExecutionProvider"]

    def get_inputs(self) -> list[Any]:
        return [types.SimpleNamespace(name="images", type="tensor(float)", shape=["N", *IMAGE])]

    def get_outputs(self) -> list[Any]:
        return [types.SimpleNamespace(name="logits", type=self.ort.output_type, shape=self.ort.output_shape)]

    def get_session_options(self) -> Any:
        return self.options

    def get_provider_graph_assignment_info(self) -> list[Any]:
        def part(ep_name: str, op_type: str) -> Any:
            node = types.SimpleNamespace(op_type=op_type, name=f"{op_type}_0")
            return types.SimpleNamespace(ep_name=ep_name, get_nodes=lambda: [node])

        strays = [part("CPUExecutionProvider", self.ort.stray)] if self.ort.stray else []
        return [part(self.provider, "Conv"), *strays]

    def io_binding(self) -> Binding:
        self.bindings.append(Binding())
        return self.bindings[-1]

    def run_with_iobinding(self, binding: Binding, run_options: RunOptions) -> None:
        assert run_options.config == {"disable_synchronize_execution_providers": "1"}
        self.runs += 1
        gpu, stream = self.ort.gpu, Stream.known[int(self.provider_options["user_compute_stream"])]
        kind, shape, source = binding.inputs["images"]
        out_kind, out_shape, target = binding.outputs["logits"]

        def run() -> None:
            images = np.frombuffer(gpu.read(source, int(np.prod(shape)) * kind.itemsize), kind).reshape(shape)
            logits = images.sum(axis=(1, 2, 3))[:, None] * WEIGHT
            assert logits.shape == out_shape
            gpu.write(target, logits.astype(out_kind).tobytes())

        gpu.enqueue(stream, run, "session", ms=3.0)
