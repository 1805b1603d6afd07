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

``USED`` lists every name of the library that this package uses; a test holds it against the names of each flavour.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from deploycnn.engines.log import Log, listening, make_logger
from deploycnn.errors import ArtifactError, RuntimeUnavailable, nearest
from deploycnn.optional import installed, require

Name = Literal["tensorrt", "tensorrt-rtx"]

#: Modules of each flavour, in order of preference.
MODULES: Mapping[Name, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}

#: Class -> members that are used of it, in every flavour ("" is the module itself).
USED: Mapping[str, tuple[str, ...]] = {
    "ILogger": ("log",),
    "Builder": ("build_serialized_network", "create_builder_config", "create_network", "create_optimization_profile"),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "INetworkDefinition": ("get_input", "get_output", "num_inputs", "num_outputs", "num_layers"),
    "ITensor": ("dtype", "name", "shape"),
    "OnnxParser": ("get_error", "num_errors", "parse"),
    "ParserError": ("code", "desc", "node_name", "node_operator"),
    "IBuilderConfig": (
        "add_optimization_profile", "builder_optimization_level", "profiling_verbosity", "progress_monitor",
        "clear_flag", "set_flag", "set_memory_pool_limit",
    ),
    "IOptimizationProfile": ("set_shape",),
    "IProgressMonitor": ("phase_finish", "phase_start", "step_complete"),
    "MemoryPoolType": ("WORKSPACE",),
    "ProfilingVerbosity": ("DETAILED", "LAYER_NAMES_ONLY", "NONE"),
    "BuilderFlag": ("REFIT", "SPARSE_WEIGHTS", "STRIP_PLAN", "TF32"),
    "Runtime": ("deserialize_cuda_engine", "engine_host_code_allowed"),
    "ICudaEngine": (
        "create_engine_inspector", "create_execution_context", "get_tensor_dtype", "get_tensor_mode",
        "get_tensor_name", "get_tensor_profile_shape", "get_tensor_shape", "num_io_tensors",
        "num_optimization_profiles", "serialize",
    ),
    "EngineInspector": ("execution_context", "get_engine_information"),
    "LayerInformationFormat": ("JSON",),
    "TensorIOMode": ("INPUT",),
    "DataType": ("BF16", "BOOL", "FLOAT", "FP8", "HALF", "INT32", "INT4", "INT64", "INT8", "UINT8"),
    "Refitter": ("get_missing_weights", "refit_cuda_engine"),
    "OnnxParserRefitter": ("refit_from_bytes",),
}  # fmt: skip

#: What only ``tensorrt`` 10 and 11 are asked for.
USED_TENSORRT: Mapping[str, tuple[str, ...]] = {
    "BuilderFlag": ("EXCLUDE_LEAN_RUNTIME", "VERSION_COMPATIBLE"),
    "HardwareCompatibilityLevel": ("AMPERE_PLUS", "NONE", "SAME_COMPUTE_CAPABILITY"),
    "IBuilderConfig": (
        "create_timing_cache",
        "get_timing_cache",
        "hardware_compatibility_level",
        "set_timing_cache",
    ),
    "ITimingCache": ("serialize",),
}

#: What only TensorRT-RTX is asked for.
USED_RTX: Mapping[str, tuple[str, ...]] = {
    "ComputeCapability": ("CURRENT", "SM75", "SM80", "SM86", "SM89", "SM120", "SM121"),
    "CudaGraphStrategy": ("DISABLED", "WHOLE_GRAPH_CAPTURE"),
    "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
    "ICudaEngine": ("create_runtime_config",),
    "IRuntimeCache": ("deserialize", "serialize"),
    "IRuntimeConfig": ("create_runtime_cache", "cuda_graph_strategy", "set_runtime_cache"),
}

#: TensorRT's element types -> NumPy's names (bfloat16 and the like are named as ``ml_dtypes`` does).
DTYPES: Mapping[str, str] = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32",
    "INT64": "int64", "BOOL": "bool", "FP8": "float8_e4m3fn", "INT4": "int4",
}  # fmt: skip

#: Shapes of one profile: smallest, the one optimized for, largest.
ProfileShapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class IoTensor:
    """An input or output of an engine.

    Attributes:
        name: As in the ONNX graph.
        is_input: Else an output.
        dtype: NumPy's name of the element type.
        shape: -1 is a dynamic axis.
        profiles: For inputs: min, opt and max shape of each optimization profile.
    """

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]
    profiles: tuple[ProfileShapes, ...] = ()


@dataclass(frozen=True, slots=True)
class Flavour:
    """An installed TensorRT. ``name`` is that of the target; ``module`` is for what this class does not offer.

    Attributes:
        name: "tensorrt" or "tensorrt-rtx".
        module: The Python module.
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

    def network(self, builder: Any) -> Any:
        """An empty, strongly typed network."""
        flag = self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return builder.create_network(1 << int(flag))

    def progress_monitor(
        self,
        start: Callable[[str, str | None, int], None],
        step: Callable[[str, int], bool],
        finish: Callable[[str], None],
    ) -> Any:
        """An ``IProgressMonitor`` that calls these functions; ``step`` returns whether to go on."""
        base = self.module.IProgressMonitor

        class _Monitor(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                start(phase_name, parent_phase, num_steps)

            def step_complete(self, phase_name: str, step_index: int) -> bool:
                return step(phase_name, step_index)

            def phase_finish(self, phase_name: str) -> None:
                finish(phase_name)

        return _Monitor()

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
            level = getattr(self.module.HardwareCompatibilityLevel, hardware.upper())
            config.hardware_compatibility_level = level
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
        runtime = self.module.Runtime(self.logger)
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
                _three(engine.get_tensor_profile_shape(name, profile))
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


def _three(shapes: Sequence[Sequence[int]]) -> ProfileShapes:
    smallest, best, largest = (tuple(int(axis) for axis in shape) for shape in shapes)
    return smallest, best, largest


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
