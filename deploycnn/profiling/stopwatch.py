"""``core.Stopwatch`` on top of a runtime: interleaved races, and the runtime's own account of its nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from deploycnn.core import Artifact, Facts, Speed, TensorSpec
from deploycnn.errors import ArtifactError, PassRequirementError, RuntimeUnavailable, TimingUnavailable
from deploycnn.profiling.engines import Engines
from deploycnn.profiling.inputs import noise
from deploycnn.profiling.nodes import PROFILERS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from deploycnn.runtimes.base import Runtime, Session


@dataclass(frozen=True, kw_only=True)
class RuntimeStopwatch:
    """Times models with one runtime.

    Attributes:
        runtime: ``name:mode``.
        settings: (batch size, threads) that the recipe asks for.
        image_shape: (C, H, W) of the images, for models that leave H and W open.
        seed: Of the images, which are noise: times do not depend on them.
        engines: Where the runtime takes engines: those that were built for it.
    """

    runtime: str
    settings: tuple[tuple[int, int], ...] = ((1, 1),)
    image_shape: tuple[int, int, int] | None = None
    seed: int = 0
    engines: Engines = field(default_factory=Engines, repr=False, compare=False)

    def race(
        self, models: Mapping[str, Path], *, batch_size: int, threads: int, budget_s: float
    ) -> dict[str, Speed]:
        """Time models side by side (``timing.time_interleaved``); the first one is what others are compared with.

        Raises:
            RuntimeUnavailable: one cannot be run; says why.
            TimingUnavailable: no engine can be built of one, or it does not load; names the node.
        """
        from deploycnn.runtimes.base import create
        from deploycnn.runtimes.tensorrt import TensorRT

        runtime = create(self.runtime)
        if isinstance(runtime, TensorRT):
            with _untimed(self.runtime):
                engines = self.engines.of(
                    [self._artifact(path) for path in models.values()], runtime, batch_size
                )
                return self._race(
                    dict(zip(models, engines, strict=True)), runtime, batch_size, threads, budget_s
                )
        artifacts = {label: self._artifact(path) for label, path in models.items()}
        return self._race(artifacts, runtime, batch_size, threads, budget_s)

    def _race(
        self,
        artifacts: Mapping[str, Artifact],
        runtime: Runtime,
        batch_size: int,
        threads: int,
        budget_s: float,
    ) -> dict[str, Speed]:
        from deploycnn.profiling.statistics import compare, summarize
        from deploycnn.profiling.timing import Candidate, TimingSettings, time_interleaved

        candidates = []
        made: dict[tuple[int | None, ...], npt.NDArray[np.float32]] = {}
        for label, artifact in artifacts.items():
            shape = artifact.inputs[0].shape
            if shape not in made:
                made[shape] = self._images(artifact, batch_size)
            candidates.append(
                Candidate(
                    label=label,
                    runtime=self.runtime,
                    batch_size=batch_size,
                    threads=threads,
                    images_NCHW=made[shape],
                    open=_Opener(runtime, artifact, batch_size, threads),
                )
            )
        rows = time_interleaved(candidates, TimingSettings(budget_s=budget_s, seed=self.seed))
        for row in rows:
            if not row.measured:
                raise RuntimeUnavailable(f"{self.runtime}: {row.label} cannot be timed: {row.why}")
        found = {}
        for row in rows:
            ratio = compare(rows[0], row)
            found[row.label] = Speed(
                median_ms=summarize(row).median_ms, ratio=ratio.ratio, low=ratio.low, high=ratio.high
            )
        return found

    def layer_ms(self, model: Path, *, batch_size: int, threads: int) -> dict[str, float]:
        """See ``core.Stopwatch.layer_ms``."""
        from deploycnn.runtimes.base import create
        from deploycnn.runtimes.tensorrt import TensorRT

        artifact = self._artifact(model)
        images = self._images(artifact, batch_size)
        if self.runtime in PROFILERS:
            return PROFILERS[self.runtime](model, images, threads)
        runtime = create(self.runtime)
        if not isinstance(runtime, TensorRT):
            return {}
        with _untimed(self.runtime):
            return self.engines.node_ms(artifact, runtime, images)

    def _images(self, artifact: Artifact, batch_size: int) -> npt.NDArray[np.float32]:
        return noise(batch_size, [size or 1 for size in artifact.inputs[0].shape[1:]], self.seed)

    def _artifact(self, path: Path) -> Artifact:
        """The file as an artifact; its image size is stated."""
        import onnx

        graph = onnx.load(str(path), load_external_data=False).graph
        weights = {tensor.name for tensor in graph.initializer}
        inputs = [value for value in graph.input if value.name not in weights]
        shape = self._shape(path, [axis.dim_value for axis in inputs[0].type.tensor_type.shape.dim])
        specs = (TensorSpec(name=inputs[0].name, dtype="float32", shape=(None, *shape)),)
        return Artifact(
            key=str(path), format="onnx", path=path, inputs=specs, outputs=(), parents=(), facts=Facts()
        )

    def _shape(self, path: Path, dims: list[int]) -> tuple[int, ...]:
        stated = tuple(dims[1:])
        if all(stated):
            return stated
        if self.image_shape is None:
            raise ArtifactError(f"{path}: its input leaves the image size open; export it with a fixed size")
        return self.image_shape


@contextmanager
def _untimed(runtime: str) -> Iterator[None]:
    """Whatever an engine meets that is made only to be timed is no fault of the model's."""
    try:
        yield
    except (ArtifactError, PassRequirementError, RuntimeUnavailable, OSError) as error:
        raise TimingUnavailable(f"{runtime}: an engine cannot be timed here: {error}") from error


@dataclass(frozen=True, slots=True)
class _Opener:
    runtime: Runtime
    artifact: Artifact
    batch_size: int
    threads: int

    def __call__(self) -> Session:
        return self.runtime.open(self.artifact, batch_size=self.batch_size, threads=self.threads)
