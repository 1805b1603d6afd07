"""ONNX to a TensorRT engine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Interval

from deploycnn.core import MAIN_FILE, Artifact, Context, Draft, Format, Json, Pass, TensorSpec
from deploycnn.errors import PassRequirementError

if TYPE_CHECKING:
    from deploycnn.engines.building import Built
    from deploycnn.engines.device import Gpu
    from deploycnn.engines.flavour import Flavour
    from deploycnn.engines.settings import BuildSettings

#: Targets whose engines these are.
_TARGETS = ("tensorrt", "tensorrt-rtx")

#: What the builder takes as a size of an axis; beyond it, it says no more than that shapes are inconsistent.
_LARGEST = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class BuildEngine(Pass):
    """Build a TensorRT or TensorRT-RTX engine. Its precision is the graph's: put fp16 or int8 before it."""

    consumes: ClassVar[Format | None] = "onnx"
    produces: ClassVar[Format] = "engine"
    uses_target: ClassVar[bool] = True
    uses_environment: ClassVar[bool] = True

    flavour: Annotated[
        Literal["target", "tensorrt", "tensorrt-rtx"],
        "Which TensorRT builds; target: that of the recipe's target. tensorrt-rtx builds without a GPU too.",
    ] = "target"
    min_batch: Annotated[int, Interval(ge=1, le=_LARGEST), "Smallest batch that the engine takes."] = 1
    opt_batch: Annotated[int, Interval(ge=1, le=_LARGEST), "Batch that it is optimized for."] = 1
    max_batch: Annotated[
        int, Interval(ge=1, le=_LARGEST), "Largest batch; it decides how much memory the engine takes."
    ] = 64
    workspace_mib: Annotated[
        int | None,
        Interval(ge=1, le=2**30),
        "Scratch memory that one layer may take, in MiB; by default all of the device.",
    ] = None
    optimization_level: Annotated[
        int, Interval(ge=0, le=5), "0 builds quickest, 5 looks hardest for fast kernels."
    ] = 3
    tf32: Annotated[bool, "Let float32 layers multiply in TF32, with 10-bit mantissas."] = False
    compute_capabilities: Annotated[
        tuple[str, ...], "tensorrt-rtx: GPUs to build for, such as 8.6; by default Ampere (8.0) and newer."
    ] = ()
    hardware_compatibility: Annotated[
        Literal["none", "ampere_plus", "same_compute_capability"],
        "tensorrt: other GPUs that must load the engine too.",
    ] = "none"
    version_compatible: Annotated[bool, "tensorrt: let newer versions load the engine."] = False
    refittable: Annotated[bool, "Let the weights in the engine be replaced."] = False
    weight_stripped: Annotated[
        bool, "Keep the weights out of the engine; they are put in from the ONNX file when it is loaded."
    ] = False
    sparse_weights: Annotated[bool, "Use sparse kernels for weights with two zeros among each four."] = False
    profiling_verbosity: Annotated[
        Literal["none", "layer_names_only", "detailed"],
        "How much the engine tells of its layers; audits need all.",
    ] = "detailed"
    timing_cache: Annotated[
        bool, "tensorrt: keep the timings of kernels for later builds on this GPU with this version."
    ] = True

    def __post_init__(self) -> None:
        """Refuse batch sizes that contradict each other while the recipe is read, before anything is trained."""
        if not self.min_batch <= self.opt_batch <= self.max_batch:
            raise ValueError(
                f"min_batch {self.min_batch}, opt_batch {self.opt_batch} and max_batch {self.max_batch} "
                "must grow in this order"
            )

    def extra_identity(self) -> Json:
        """Engines of other library versions are other engines."""
        from deploycnn.engines import flavour
        from deploycnn.errors import RuntimeUnavailable

        found = {}
        for name in flavour.MODULES if self.flavour == "target" else (self.flavour,):
            try:
                found[name] = flavour.version_of(name)
            except RuntimeUnavailable:
                found[name] = ""
        return found

    def run(self, source: Artifact, ctx: Context) -> Draft:
        """Write ``model.engine``, ``layers.json`` and, for weight-stripped engines, ``model.onnx``.

        Raises:
            PassRequirementError: the graph or a setting does not fit; names the node, layer or setting.
            RuntimeUnavailable: TensorRT is not installed, or this build needs a GPU.
            ArtifactError: the source's file cannot be read, or device memory ran out.
        """
        from deploycnn import files
        from deploycnn.engines import building, device, flavour
        from deploycnn.engines.log import Log

        found = flavour.find(self._flavour(ctx.target))
        gpu = device.current_gpu()
        log = Log()
        cache = self._cache(found, gpu)
        try:
            built = building.build(
                source.path,
                found,
                self._settings(),
                gpu=gpu,
                timing_cache=cache.read_bytes() if cache and cache.is_file() else b"",
                progress=ctx.progress,
                log=log,
            )
        finally:
            for severity, text in log.records:
                ctx.log.info("%s: %s", severity, text)
        if cache and built.timing_cache:
            files.write_bytes(cache, built.timing_cache)
        return self._draft(source, built, found, ctx, gpu)

    def _draft(self, source: Artifact, built: Built, found: Flavour, ctx: Context, gpu: Gpu | None) -> Draft:
        """Write the artifact's files and describe them."""
        import shutil

        from deploycnn.engines import audit, layers
        from deploycnn.graph.model import load_onnx

        path = ctx.output / MAIN_FILE["engine"]
        path.write_bytes(built.plan)
        if self.weight_stripped:
            shutil.copyfile(source.path, ctx.output / "model.onnx")
        asked = audit.asked_of(load_onnx(source.path))
        told = self._layer_information(built, found, gpu)
        summary: Json = None
        if told is not None and self.profiling_verbosity == "detailed":
            origin, text = told
            content = {
                "schema_version": 1,
                "flavour": found.name,
                "version": found.version,
                "source": origin,
                "information": text,
                "asked": [asdict(item) for item in asked],
            }
            (ctx.output / "layers.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            result = audit.audit(layers.parse(text), asked)
            summary = {"census": result.census(), "metrics": result.metrics(), "source": origin}
            ctx.log.info("%s", result.census())
        precision = source.facts.precision
        return Draft(
            format="engine",
            inputs=_with_batch(source.inputs, built.record.batch),
            outputs=source.outputs,
            facts=replace(
                source.facts,
                size_bytes=len(built.plan),
                precision="tf32" if self.tf32 and precision == "fp32" else precision,
                record={
                    "engine": built.record.to_json(),
                    "audit": summary,
                    "warnings": _unique(built.log.warnings()),
                },
            ),
        )

    def _layer_information(self, built: Built, found: Flavour, gpu: Gpu | None) -> tuple[str, str] | None:
        """What is told of the layers: by the engine itself where it can be loaded, else by the builder's log."""
        if gpu is not None and not self.weight_stripped:
            engine = found.deserialize(
                built.plan, what="the new engine", host_code_allowed=self.version_compatible
            )
            return "inspector", found.inspect(engine)
        text = built.log.layer_information()
        return None if text is None else ("builder log", text)

    def _flavour(self, target: str) -> Literal["tensorrt", "tensorrt-rtx"]:
        name = target if self.flavour == "target" else self.flavour
        if name == "tensorrt":
            return "tensorrt"
        if name == "tensorrt-rtx":
            return "tensorrt-rtx"
        raise PassRequirementError(
            f'build_engine: the target "{target}" has no engines; set `target` to {" or ".join(_TARGETS)}, '
            "or build_engine.flavour"
        )

    def _settings(self) -> BuildSettings:
        from deploycnn.engines.settings import BuildSettings

        return BuildSettings(
            batch=(self.min_batch, self.opt_batch, self.max_batch),
            workspace_bytes=None if self.workspace_mib is None else self.workspace_mib * 2**20,
            optimization_level=self.optimization_level,
            tf32=self.tf32,
            compute_capabilities=self.compute_capabilities,
            hardware_compatibility=self.hardware_compatibility,
            version_compatible=self.version_compatible,
            refittable=self.refittable,
            weight_stripped=self.weight_stripped,
            sparse_weights=self.sparse_weights,
            profiling_verbosity=self.profiling_verbosity,
        )

    def _cache(self, found: Flavour, gpu: Gpu | None) -> Path | None:
        """Where the timings of this GPU and version are kept; ``None`` where there are none to keep."""
        from deploycnn.engines import timing_cache

        return timing_cache.path(found, gpu) if self.timing_cache and gpu is not None else None


def _with_batch(inputs: tuple[TensorSpec, ...], batch: tuple[int, int, int]) -> tuple[TensorSpec, ...]:
    """Inputs as the engine takes them: a single batch size is a fixed axis."""
    if batch[0] != batch[2]:
        return inputs
    return tuple(replace(item, shape=(batch[0], *item.shape[1:])) for item in inputs)


def _unique(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(" ".join(text.split()) for text in texts))
