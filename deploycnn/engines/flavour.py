"""TensorRT 11, TensorRT 10 and TensorRT-RTX behind one interface: all differences between them are in this file.

============================  =======================  ==========================  ===============================
what                          TensorRT 10              TensorRT 11                 TensorRT-RTX
============================  =======================  ==========================  ===============================
module                        ``tensorrt``             ``tensorrt``                ``tensorrt_rtx`` (``_bindings``)
strong typing                 a flag of the network    a flag, the only way        a flag, the only way
where engines are built       on their GPU             on their GPU                anywhere, for compute capabilities
kept between builds           timing cache             timing cache                nothing (kernels are not timed)
kept between loads            nothing                  nothing                     runtime cache (compiled kernels)
inspector's list of in/out    ``Bindings`` (names)     ``I/O Tensors`` (objects)   ``I/O Tensors`` (objects)
lean runtime                  yes                      yes                         no
runs on other GPUs            compatibility level      compatibility level         compute capabilities
============================  =======================  ==========================  ===============================

``names.USED`` lists every name of the library that this package uses; a test holds it against those of each flavour.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

from deploycnn.engines.log import Log, listening, make_logger
from deploycnn.engines.names import DISTRIBUTIONS, MODULES, Name
from deploycnn.engines.tensors import DTYPES, IoTensor, three
from deploycnn.errors import ArtifactError, RuntimeUnavailable, nearest
from deploycnn.optional import installed, require


@dataclass(frozen=True, slots=True)
class Flavour:
    """An installed TensorRT.

    Attributes:
        name: "tensorrt" or "tensorrt-rtx".
        module: The Python module, for what this class does not offer.
        version: "11.4.0.106".
    """

    name: Name
    module: ModuleType
    version: str

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT-RTX."""
        return self.name == "tensorrt-rtx"

    @property
    def logger(self) -> Any:
        """The process's one logger of this flavour; collect its messages with ``log.listening``."""
        return _logger(self.module)

    def flag(self, name: str) -> int:
        """A builder flag.

        Raises:
            RuntimeUnavailable: this flavour has no such flag.
        """
        flags = self.module.BuilderFlag
        if not hasattr(flags, name):
            raise RuntimeUnavailable(f"{self.name} {self.version} has no builder flag {name}")
        value: int = getattr(flags, name)
        return value

    def dtype(self, value: Any) -> str:
        """NumPy's name of a ``DataType``."""
        return DTYPES.get(value.name, value.name.lower())

    # -- building ------------------------------------------------------------------------------------

    def builder(self) -> Any:
        """A ``Builder``.

        Raises:
            RuntimeUnavailable: the library cannot start here.
        """
        return self._start(self.module.Builder)

    def _start(self, make: Callable[[Any], Any]) -> Any:
        try:
            return make(self.logger)
        except TypeError as error:  # pybind11: the library's factory returned nothing
            raise RuntimeUnavailable(
                f"{self.name} {self.version} cannot start: the driver is too old for it, or it does not serve this GPU"
            ) from error

    def network(self, builder: Any) -> Any:
        """An empty, strongly typed network."""
        flag = self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return builder.create_network(1 << int(flag))

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities that engines can be built for ahead of time, "8.0"; none for ``tensorrt``."""
        if not self.is_rtx:
            return ()
        names = (name for name in dir(self.module.ComputeCapability) if name.startswith("SM"))
        return tuple(sorted((f"{name[2:-1]}.{name[-1]}" for name in names), key=_as_version))

    def set_capabilities(self, config: Any, capabilities: Sequence[str]) -> None:
        """Build for these compute capabilities ("8.6"); none means the flavour's default (Ampere and newer).

        Raises:
            RuntimeUnavailable: the flavour builds for the GPU at hand only, or does not know one.
        """
        if not capabilities:
            return
        if not self.is_rtx:
            raise RuntimeUnavailable(
                "compute_capabilities: tensorrt builds for the GPU at hand; leave it out, use "
                "hardware_compatibility, or the target tensorrt-rtx"
            )
        for capability in capabilities:
            if capability not in self.capabilities:
                raise RuntimeUnavailable(
                    f'compute_capabilities: {self.name} {self.version} does not know "{capability}"; '
                    f"{nearest(capability, self.capabilities)}"
                )
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            member = getattr(self.module.ComputeCapability, f"SM{capability.replace('.', '')}")
            config.set_compute_capability(member, index)

    def set_compatibility(self, config: Any, *, hardware: str, version: bool) -> None:
        """Make the engine load on other GPUs (``hardware``: none, ampere_plus, same_compute_capability) and versions.

        Raises:
            RuntimeUnavailable: TensorRT-RTX was asked; it has neither.
        """
        if self.is_rtx and (hardware != "none" or version):
            option = "version_compatible" if version else "hardware_compatibility"
            raise RuntimeUnavailable(
                f"{option}: TensorRT-RTX engines load in their own version only, on the compute capabilities that "
                "they were built for; leave it out (see compute_capabilities)"
            )
        if hardware != "none":
            config.hardware_compatibility_level = getattr(
                self.module.HardwareCompatibilityLevel, hardware.upper()
            )
        if version:
            config.set_flag(self.flag("VERSION_COMPATIBLE"))

    def set_tf32(self, config: Any, allowed: bool) -> None:
        """Whether float32 matrix products may round their inputs to TF32."""
        flag = self.flag("TF32")
        if allowed:
            config.set_flag(flag)
        else:
            config.clear_flag(flag)

    def attach_timing_cache(self, config: Any, content: bytes) -> bool:
        """Give the builder the tactic timings of earlier builds; ``False`` where the flavour has none."""
        if self.is_rtx:
            return False
        cache = config.create_timing_cache(content)
        if cache is None or not config.set_timing_cache(cache, False):
            # A cache of another GPU or version: start anew rather than trust its timings.
            config.set_timing_cache(config.create_timing_cache(b""), False)
        return True

    def timing_cache(self, config: Any) -> bytes | None:
        """The timings after a build, to be given to the next one; ``None`` where the flavour has none."""
        if self.is_rtx:
            return None
        cache = config.get_timing_cache()
        return None if cache is None else bytes(cache.serialize())

    # -- loading -------------------------------------------------------------------------------------

    def runtime(self, *, host_code_allowed: bool = False) -> Any:
        """A ``Runtime``. ``host_code_allowed``: version-compatible engines hold host code.

        Raises:
            RuntimeUnavailable: the library cannot start here.
        """
        runtime = self._start(self.module.Runtime)
        if host_code_allowed:
            runtime.engine_host_code_allowed = True
        return runtime

    def deserialize(self, plan: bytes, *, what: str, host_code_allowed: bool = False) -> Any:
        """An ``ICudaEngine``. Keep the result alive as long as its contexts; it runs code from ``plan``.

        Args:
            plan: Content of an engine file that ``vouch.check_engine`` let pass.
            what: Name of the file, for messages.
            host_code_allowed: Needed for version-compatible engines.

        Raises:
            ArtifactError: the library refuses it; says what the library said.
        """
        with listening(Log()) as log:
            runtime = self.runtime(host_code_allowed=host_code_allowed)
            engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            from deploycnn.engines.failures import loading_error

            raise loading_error(log, what, self)
        return engine

    def io_tensors(self, engine: Any) -> tuple[IoTensor, ...]:
        """Inputs and outputs of an engine, in its order."""
        tensors = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == self.module.TensorIOMode.INPUT
            profiles = tuple(
                three(engine.get_tensor_profile_shape(name, profile))
                for profile in range(engine.num_optimization_profiles if is_input else 0)
            )
            tensors.append(
                IoTensor(
                    name=name,
                    is_input=is_input,
                    dtype=self.dtype(engine.get_tensor_dtype(name)),
                    shape=tuple(engine.get_tensor_shape(name)),
                    profiles=profiles,
                )
            )
        return tuple(tensors)

    def context(
        self, engine: Any, *, runtime_cache: bytes = b"", cuda_graphs: bool = False
    ) -> tuple[Any, Callable[[], bytes | None]]:
        """An execution context, and a function that gives its runtime cache's content (``None``: has none).

        Args:
            engine: From :meth:`deserialize`.
            runtime_cache: TensorRT-RTX compiles kernels when a context is made; what an earlier one compiled.
            cuda_graphs: TensorRT-RTX captures and replays graphs by itself.

        Raises:
            ArtifactError: no context could be made (device memory, most of the time).
        """
        with listening(Log()) as log:
            read: Callable[[], bytes | None]
            if self.is_rtx:
                config = engine.create_runtime_config()
                cache = config.create_runtime_cache()
                if runtime_cache:
                    cache.deserialize(runtime_cache)
                config.set_runtime_cache(cache)
                strategy = self.module.CudaGraphStrategy
                config.cuda_graph_strategy = (
                    strategy.WHOLE_GRAPH_CAPTURE if cuda_graphs else strategy.DISABLED
                )
                context = engine.create_execution_context(config)

                def read() -> bytes | None:
                    return bytes(cache.serialize())
            else:
                context = engine.create_execution_context()

                def read() -> bytes | None:
                    return None

        if context is None:
            from deploycnn.engines.failures import memory_error

            raise memory_error(log, "making an execution context")
        return context, read

    def inspect(self, engine: Any, context: Any | None = None) -> str:
        """The inspector's JSON of all layers (``layers.parse`` reads each flavour's dialect)."""
        inspector = engine.create_engine_inspector()
        if inspector is None:
            raise ArtifactError(
                "the engine gives no layer information; build it with profiling_verbosity: detailed"
            )
        if context is not None:
            inspector.execution_context = context
        text: str = inspector.get_engine_information(self.module.LayerInformationFormat.JSON)
        return text

    def refit(self, engine: Any, onnx_model: bytes, *, what: str) -> None:
        """Put the weights of ``onnx_model`` into a weight-stripped or refittable engine.

        Raises:
            ArtifactError: the weights do not fit, or some are missing; names them.
        """
        with listening(Log()) as log:
            refitter = self.module.Refitter(engine, self.logger)
            parser = self.module.OnnxParserRefitter(refitter, self.logger)
            fits = parser.refit_from_bytes(onnx_model) and refitter.refit_cuda_engine()
        if not fits:
            missing = ", ".join(list(refitter.get_missing_weights())[:5])
            why = f"missing: {missing}" if missing else "; ".join(log.errors()[:1])
            raise ArtifactError(
                f"{what}: refit failed ({why}); refit with the very ONNX file that it was built from"
            )


def _as_version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


@functools.cache
def _logger(module: ModuleType) -> Any:
    return make_logger(module)


@functools.cache
def find(name: Name) -> Flavour:
    """The installed TensorRT for a target.

    Raises:
        RuntimeUnavailable: it is not installed, does not load, or is older than 10.
    """
    choices = MODULES[name]
    module = require(next((choice for choice in choices if installed(choice)), choices[-1]))
    version = str(getattr(module, "__version__", "0"))
    if name == "tensorrt" and int(version.partition(".")[0]) < 10:
        raise RuntimeUnavailable(
            f'tensorrt {version} is too old; strongly typed networks need 10 or newer: pip install "tensorrt>=10"'
        )
    return Flavour(name=name, module=module, version=version)


def is_installed(name: Name) -> bool:
    """Whether one of its modules can be found; nothing is loaded."""
    return any(installed(module) for module in MODULES[name])


def version_of(name: Name) -> str:
    """Version of an installed TensorRT, from its distribution's metadata: the library is not loaded.

    Raises:
        RuntimeUnavailable: none is installed.
    """
    for distribution in DISTRIBUTIONS[name]:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    raise RuntimeUnavailable(f'{name} is not installed; pip install "deploycnn[{name}]"')


__all__ = ["MODULES", "Flavour", "IoTensor", "Name", "find", "is_installed", "version_of"]
