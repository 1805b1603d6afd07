"""OpenVINO on the CPU.

On CPUs that have bf16 instructions OpenVINO computes in bf16 unless told otherwise, and calls the model FP32.
So the precision is part of the mode, is set, and is read back from the compiled layers.

Settings: latency hint, one stream, a stated number of threads. CPU pinning stays at OpenVINO's default, which
on Linux pins the worker threads only; the calling thread's affinity is untouched, so sessions of other
runtimes in the same process are not confined by it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deploycnn import optional
from deploycnn.errors import ArtifactError, RuntimeUnavailable, one_line
from deploycnn.runtimes.base import Availability, Executed, Runtime, Session
from deploycnn.runtimes.common import (
    COMPUTE_OPS,
    check_batch,
    check_file,
    check_images,
    check_request,
    precision_label,
    tiny_onnx,
    unavailable,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from deploycnn.core import Artifact, Format

_NAMES = {"f32": "f32", "f16": "f16", "bf16": "bf16", "i8": "int8", "u8": "int8"}


@dataclass(frozen=True, kw_only=True)
class OpenVino(Runtime):
    """ONNX files in OpenVINO on the CPU: ``openvino:f32`` or ``openvino:bf16``.

    Q/DQ models run their quantized layers in int8 in both modes; the mode says what the rest runs in.
    """

    modes: ClassVar[tuple[str, ...]] = ("f32", "bf16")
    accepts: ClassVar[tuple[Format, ...]] = ("onnx",)

    mode: str = "f32"

    def availability(self) -> Availability:
        """Whether OpenVINO loads, and a one-operator graph is compiled to the mode's arithmetic."""
        try:
            core = _core()
            _require_precision(core, self.mode)
            where = Path("a test graph")
            _executed_precision(
                _compile(core, core.read_model(tiny_onnx()), where, (), 1, 1, self.mode), self.mode, where
            )
        except (RuntimeUnavailable, ArtifactError) as error:
            return unavailable(error, _version(), 'pip install "deploycnn[openvino]"')
        return Availability(ok=True, version=_version())

    def open(self, artifact: Artifact, *, batch_size: int, threads: int) -> Session:
        """Compile an ONNX file for the CPU, with the batch size fixed.

        Raises:
            RuntimeUnavailable: not installed, or bf16 on a CPU without it.
            ArtifactError: damaged file, unsupported operator, another fixed batch, several inputs.
        """
        check_request(batch_size, threads)
        path = check_file(artifact, self.accepts, "openvino")
        core = _core()
        _require_precision(core, self.mode)
        model = _read(core, path)
        if len(model.inputs) != 1:
            names = ", ".join(item.get_any_name() for item in model.inputs)
            raise ArtifactError(
                f"{path}: {len(model.inputs)} inputs ({names}); models with one image input are supported"
            )
        if model.inputs[0].get_element_type().get_type_name() != "f32":
            kind = model.inputs[0].get_element_type().get_type_name()
            raise ArtifactError(f'{path}: input "{model.inputs[0].get_any_name()}" is {kind}, expected f32')
        shape = _shape(model.inputs[0].get_partial_shape())
        if shape:
            check_batch(path, shape[0], batch_size)
        compiled = _compile(core, model, path, shape, batch_size, threads, self.mode)
        executed = Executed(
            provider=",".join(compiled.get_property("EXECUTION_DEVICES")),
            precision=_executed_precision(compiled, self.mode, path),
            threads=int(compiled.get_property("INFERENCE_NUM_THREADS")),
        )
        return _OpenVinoSession(compiled, path, (batch_size, *shape[1:]), executed)


class _OpenVinoSession(Session):
    def __init__(self, compiled: Any, path: Path, shape: tuple[int | None, ...], executed: Executed) -> None:
        self.executed = executed
        self._compiled: Any = compiled
        self._request: Any = compiled.create_infer_request()
        self._path = path
        self._shape = shape

    def run(self, images_NCHW: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """Outputs in graph order, as float32. The batch must be the one that the session was opened for.

        Raises:
            ArtifactError: the images do not fit the input.
        """
        import numpy as np

        images = check_images(self._path, self._shape, images_NCHW)
        results = self._request.infer({0: images}, share_inputs=True)
        return [np.array(results[index], dtype=np.float32) for index in range(len(self._compiled.outputs))]

    def bind(self, images_NCHW: npt.NDArray[np.float32]) -> Callable[[], None]:
        """A synchronous inference on a request of its own whose input tensor is the images' memory.

        Synchronous, because the hand-over to a stream's thread that ``start_async`` makes costs some 0.06 ms.
        """
        import numpy as np
        import openvino

        images = np.require(check_images(self._path, self._shape, images_NCHW), requirements=["C", "W"])
        request = self._compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(images, shared_memory=True))
        infer = request.infer

        def call() -> None:
            infer(None, share_inputs=True, share_outputs=True)

        return call

    def close(self) -> None:
        """Free the compiled model and its streams."""
        self._request = self._compiled = None


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("openvino")
    except metadata.PackageNotFoundError:
        return ""


@functools.cache
def _core() -> Any:
    """The process's OpenVINO core; plugins load once."""
    openvino = optional.require("openvino")
    core = openvino.Core()
    if "CPU" not in core.available_devices:
        raise RuntimeUnavailable(
            f"openvino {_version()} finds no CPU device (it has {core.available_devices}); "
            'reinstall it: pip install --force-reinstall "deploycnn[openvino]"'
        )
    return core


def _require_precision(core: Any, mode: str) -> None:
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if mode == "bf16" and "BF16" not in capabilities:
        name = core.get_property("CPU", "FULL_DEVICE_NAME")
        raise RuntimeUnavailable(
            f"openvino:bf16: this CPU ({name}) has no bf16 instructions (AVX512_BF16 or AMX); "
            "use openvino:f32"
        )


def _read(core: Any, path: Path) -> Any:
    try:
        return core.read_model(str(path))
    except RuntimeError as error:
        text = str(error)
        if "No conversion rule found for operations:" in text:
            missing = one_line(text.partition("No conversion rule found for operations:")[2])
            raise ArtifactError(f"{path}: operators not supported by openvino: {missing}") from error
        if "Unable to read the model" in text:
            raise ArtifactError(f"{path}: not an ONNX file, or cut short; copy it again") from error
        raise ArtifactError(f"{path}: openvino cannot read it: {one_line(error)}") from error


def _shape(partial: Any) -> tuple[int | None, ...]:
    if partial.rank.is_dynamic:
        return ()
    return tuple(axis.get_length() if axis.is_static else None for axis in partial)


def _compile(
    core: Any, model: Any, path: Path, shape: tuple[int | None, ...], batch_size: int, threads: int, mode: str
) -> Any:
    try:
        if shape and shape[0] is None:
            model.reshape([batch_size, *(-1 if axis is None else axis for axis in shape[1:])])
        return core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": mode,
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": threads,
            },
        )
    except RuntimeError as error:
        raise ArtifactError(
            f"{path}: openvino cannot compile it for batches of {batch_size}: {one_line(error)}"
        ) from error


def _executed_precision(compiled: Any, mode: str, path: Path) -> str:
    """What the compiled layers say that they run in.

    Raises:
        RuntimeUnavailable: another precision than the mode's was chosen.
    """
    hint = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    compute = []
    for layer in compiled.get_runtime_model().get_ordered_ops():
        info = layer.get_rt_info()
        if "runtimePrecision" not in info or "layerType" not in info:
            continue
        if info["layerType"].astype(str) in COMPUTE_OPS:
            name = info["runtimePrecision"].astype(str).lower()
            compute.append(_NAMES.get(name, name))
    label = precision_label(compute, [hint])
    if hint != mode or not set(compute) <= {mode, "int8"}:
        raise RuntimeUnavailable(
            f"openvino:{mode}: {path}: asked for {mode}, but it was compiled to {label} (hint {hint}); "
            "no row is measured under a name that is not its own"
        )
    return label
