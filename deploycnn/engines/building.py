"""ONNX to engine: one function, cancellable, whose every failure names a node or a setting."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto

from deploycnn.core import ProgressFn, no_progress
from deploycnn.engines import checks, failures
from deploycnn.engines.device import Gpu
from deploycnn.engines.flavour import Flavour
from deploycnn.engines.log import Log, listening
from deploycnn.engines.progress import Phases, make_monitor
from deploycnn.engines.settings import BuildSettings, EngineRecord
from deploycnn.errors import ArtifactError, PassRequirementError, RuntimeUnavailable
from deploycnn.files import sha256_of
from deploycnn.graph.model import load_onnx, runtime_inputs, shape_of

#: How often the waiting thread looks whether it was interrupted.
_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """An engine that was built.

    Attributes:
        plan: Content of the engine file.
        record: Where it may run.
        log: All that TensorRT said.
        timing_cache: For the next build, where the flavour has one.
    """

    plan: bytes
    record: EngineRecord
    log: Log
    timing_cache: bytes | None


def build(
    path: Path,
    flavour: Flavour,
    settings: BuildSettings,
    *,
    gpu: Gpu | None,
    timing_cache: bytes = b"",
    progress: ProgressFn = no_progress,
    log: Log | None = None,
) -> Built:
    """Build an engine from the ONNX file ``path``; Ctrl-C stops at the next step of the builder.

    Args:
        path: Float or Q/DQ graph; its types are the engine's types.
        flavour: Which TensorRT.
        settings: What is asked for.
        gpu: The GPU of this machine, ``None`` where there is none.
        timing_cache: What an earlier build on this GPU with this version gave.
        progress: Told of the builder's own progress.
        log: Where TensorRT's messages go; kept by the caller even where the build fails.

    Raises:
        PassRequirementError: the graph or a setting does not fit; names the node, layer or setting.
        RuntimeUnavailable: this flavour needs a GPU for it.
        ArtifactError: the file cannot be read, or device memory ran out.
        KeyboardInterrupt: the user interrupted.
    """
    model = load_onnx(path)
    check(model, path.name, flavour, settings, has_gpu=gpu is not None)
    kept = log if log is not None else Log()
    with listening(kept):
        plan, cache = _Build(path, model, flavour, settings, gpu, kept, progress).run(timing_cache)
    ahead = flavour.is_rtx
    record = EngineRecord(
        flavour=flavour.name,
        version=flavour.version,
        gpu="" if ahead or gpu is None else gpu.name,
        capability="" if ahead or gpu is None else f"{gpu.capability[0]}.{gpu.capability[1]}",
        compute_capabilities=settings.compute_capabilities,
        hardware_compatibility=settings.hardware_compatibility,
        version_compatible=settings.version_compatible,
        weight_stripped=settings.weight_stripped,
        batch=batch_of(model, settings),
        onnx_sha256=sha256_of(path),
    )
    return Built(plan=plan, record=record, log=kept, timing_cache=cache)


def check(model: ModelProto, what: str, flavour: Flavour, settings: BuildSettings, *, has_gpu: bool) -> None:
    """Refuse what cannot give an engine, before the builder is started.

    Raises:
        PassRequirementError: names the node or setting.
        RuntimeUnavailable: this flavour needs a GPU for a setting.
    """
    if flavour.is_rtx and not has_gpu and (settings.weight_stripped or settings.refittable):
        # Its builder would fail after a while, with a message of its own on stderr.
        option = "weight_stripped" if settings.weight_stripped else "refittable"
        raise RuntimeUnavailable(
            f"build_engine: {flavour.name} {flavour.version} needs a GPU to build with {option}: true; "
            f"leave {option} out or build on a GPU host"
        )
    smallest, best, largest = settings.batch
    if not 1 <= smallest <= best <= largest:
        raise PassRequirementError(
            f"build_engine: min_batch {smallest}, opt_batch {best}, max_batch {largest} must grow, from 1 at least"
        )
    checks.check_opset(model, what)
    checks.check_quantization(model, what)
    if settings.sparse_weights and not checks.sparse_weights(model):
        raise PassRequirementError(
            f"build_engine: sparse_weights: no weight of {what} has the 2:4 pattern (two zeros among each four "
            f"input channels), so {flavour.name} would have nothing to use; leave sparse_weights out"
        )


def batch_of(model: ModelProto, settings: BuildSettings) -> tuple[int, int, int]:
    """Batches that the engine takes: the graph's own where it is fixed."""
    shape = shape_of(runtime_inputs(model)[0]) or (None,)
    fixed = shape[0]
    return settings.batch if fixed is None else (fixed, fixed, fixed)


class _Build:
    def __init__(
        self,
        path: Path,
        model: ModelProto,
        flavour: Flavour,
        settings: BuildSettings,
        gpu: Gpu | None,
        log: Log,
        progress: ProgressFn,
    ) -> None:
        self.path = path
        self.model = model
        self.flavour = flavour
        self.settings = settings
        self.gpu = gpu
        self.log = log
        self.began, self.stop, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.phases = Phases(progress)
        self.result: tuple[bytes | None, bytes | None] = (None, None)
        self.error: BaseException | None = None

    def run(self, timing_cache: bytes) -> tuple[bytes, bytes | None]:
        """Build in a thread of its own: TensorRT does not pass a KeyboardInterrupt on, so this one waits for it."""
        worker = threading.Thread(target=self._work, args=(timing_cache,), name="build_engine")
        interrupted = False
        try:
            worker.start()
        except KeyboardInterrupt:
            interrupted = True
            self.stop.set()
            # Interrupted while the thread was being made: it runs, or never will.
            if not self.began.wait(1.0):
                raise
        while not self.ended.is_set():
            try:
                while not self.ended.wait(_POLL_S):
                    pass
            except KeyboardInterrupt:
                interrupted = True
                self.stop.set()
        worker.join()
        if interrupted:
            raise KeyboardInterrupt
        if self.error is not None:
            raise self.error
        plan, cache = self.result
        if plan is None:
            raise failures.build_error(self.log, self.path.name, self.flavour, self.settings)
        return plan, cache

    def _work(self, timing_cache: bytes) -> None:
        self.began.set()
        try:
            self.result = self._build(timing_cache)
        except BaseException as error:
            self.error = error
        finally:
            self.ended.set()

    def _build(self, timing_cache: bytes) -> tuple[bytes | None, bytes | None]:
        trt = self.flavour.module
        builder = self.flavour.builder()
        network = self.flavour.network(builder)
        parser = trt.OnnxParser(network, self.flavour.logger)
        if not parser.parse(self.path.read_bytes(), str(self.path)):
            found = [parser.get_error(index) for index in range(parser.num_errors)]
            refused = [
                failures.ParserFailure(node=item.node_name(), operator=item.node_operator(), why=item.desc())
                for item in found
            ]
            raise failures.parser_error(refused, self.path.name, self.flavour)
        config = builder.create_builder_config()
        self._configure(config)
        config.add_optimization_profile(self._profile(builder, network))
        self.flavour.attach_timing_cache(config, timing_cache)
        # The monitor must outlive the build, so it has a name.
        monitor = make_monitor(self.flavour, self.phases, go_on=lambda: not self.stop.is_set())
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        return (None if plan is None else bytes(plan)), self.flavour.timing_cache(config)

    def _configure(self, config: Any) -> None:
        settings, trt = self.settings, self.flavour.module
        config.builder_optimization_level = settings.optimization_level
        config.profiling_verbosity = getattr(trt.ProfilingVerbosity, settings.profiling_verbosity.upper())
        if settings.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
        self.flavour.set_tf32(config, settings.tf32)
        self.flavour.set_capabilities(config, settings.compute_capabilities)
        self.flavour.set_compatibility(
            config, hardware=settings.hardware_compatibility, version=settings.version_compatible
        )
        for flag, wanted in (
            ("REFIT", settings.refittable or settings.weight_stripped),
            ("STRIP_PLAN", settings.weight_stripped),
            ("SPARSE_WEIGHTS", settings.sparse_weights),
        ):
            if wanted:
                config.set_flag(self.flavour.flag(flag))

    def _profile(self, builder: Any, network: Any) -> Any:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            shape = tuple(tensor.shape)
            if -1 in shape[1:]:
                raise PassRequirementError(
                    f'build_engine: input "{tensor.name}" of {self.path.name} is {list(shape)}: axes other than the '
                    "batch are dynamic; export with a fixed image size"
                )
            if shape and shape[0] == -1:
                profile.set_shape(tensor.name, *((batch, *shape[1:]) for batch in self.settings.batch))
        return profile


def read_plan(path: Path) -> bytes:
    """Content of an engine file.

    Raises:
        ArtifactError: it is missing, unreadable or empty.
    """
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); name an engine file") from error
    if not plan:
        raise ArtifactError(f"{path}: the file is empty; build or copy it again")
    return plan
