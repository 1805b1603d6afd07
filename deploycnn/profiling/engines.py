"""TensorRT engines of ONNX files, built to be timed."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deploycnn.core import MAIN_FILE, Artifact
from deploycnn.errors import ArtifactError, DeployCNNError, StorageError
from deploycnn.files import sha256_of, write_bytes, write_json

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from deploycnn.engines.settings import BuildSettings
    from deploycnn.runtimes.tensorrt import TensorRT

#: Bytes of engines that are kept for when the same graph is timed again.
_KEPT_BYTES = 4 << 30
#: Share of the profiled time that must be of layers which the inspector names.
_LEAST_TOLD = 0.9


@dataclass(slots=True, weakref_slot=True)
class Engines:
    """Engines by the graph that they were built from; they are gone with this object.

    They are built as `build_engine` builds by default, but for a single batch size: that which is timed.

    Attributes:
        log: Told what is built, and all that TensorRT says where it fails.
    """

    log: logging.Logger = field(default_factory=lambda: logging.getLogger("deploycnn"))
    _folder: Path | None = field(default=None, init=False)
    _made: dict[str, Artifact] = field(default_factory=dict, init=False)

    def of(self, models: Sequence[Artifact], runtime: TensorRT, batch_size: int) -> list[Artifact]:
        """An engine for each ONNX artifact.

        Raises:
            PassRequirementError: TensorRT does not take a graph; names the node.
            RuntimeUnavailable: TensorRT is not installed.
            ArtifactError: device memory ran out.
            OSError: there is no room for the file.
        """
        keys = [f"{runtime.flavour}-{batch_size}-{sha256_of(model.path)}" for model in models]
        self._forget(keys)
        for key, model in zip(keys, models, strict=True):
            if key not in self._made:
                self.log.info(
                    "building an engine of %s for batch %d, to time it", model.path.name, batch_size
                )
                self._made[key] = self._build(model, runtime, batch_size, key)
        return [self._made[key] for key in keys]

    def node_ms(
        self, model: Artifact, runtime: TensorRT, images_NCHW: npt.NDArray[np.float32]
    ) -> dict[str, float]:
        """Milliseconds of each node of an ONNX artifact in its engine (``engines.node_times``).

        Raises:
            PassRequirementError, RuntimeUnavailable, ArtifactError: see ``of``.
        """
        from deploycnn.engines import audit, layers
        from deploycnn.engines.node_times import node_times
        from deploycnn.graph.model import load_onnx

        batch_size = len(images_NCHW)
        [engine] = self.of([model], runtime, batch_size)
        with closing(runtime.open(engine, batch_size=batch_size, threads=1)) as session:
            told, times = layers.parse(session.inspect()), session.layer_times(images_NCHW)
        found = node_times(told, audit.asked_of(load_onnx(model.path)), times)
        if sum(found.values()) < _LEAST_TOLD * sum(times.values()):
            names = ", ".join(sorted(set(times) - {layer.name for layer in told})[:3])
            raise ArtifactError(
                f"{model.path.name}: TensorRT's profiler times layers that its inspector does not know ({names})"
            )
        return found

    def _forget(self, wanted: Sequence[str]) -> None:
        """Remove the oldest where they are too many; never those that are wanted now."""
        from deploycnn.runtimes.tensorrt import forget_kernels

        sizes = {key: artifact.path.stat().st_size for key, artifact in self._made.items()}
        for key in list(sizes):
            if sum(sizes.values()) <= _KEPT_BYTES:
                return
            if key not in wanted:
                path = self._made.pop(key).path
                forget_kernels(path)
                shutil.rmtree(path.parent, ignore_errors=True)
                del sizes[key]

    def _build(self, model: Artifact, runtime: TensorRT, batch_size: int, key: str) -> Artifact:
        from deploycnn.engines import building, device, flavour, timing_cache
        from deploycnn.engines.log import Log

        found = flavour.find(runtime.flavour)
        gpu = device.current_gpu()
        cache, said = timing_cache.path(found, gpu), Log()
        try:
            built = building.build(
                model.path,
                found,
                _settings(batch_size),
                gpu=gpu,
                timing_cache=cache.read_bytes() if cache is not None and cache.is_file() else b"",
                log=said,
            )
        except DeployCNNError:
            for severity, text in said.records:
                self.log.info("%s: %s", severity, text)
            raise
        if cache is not None and built.timing_cache:
            with contextlib.suppress(StorageError):  # losing it costs time
                write_bytes(cache, built.timing_cache)
        if self._folder is None:
            # Engines are executable code: only this process's user reads the folder.
            self._folder = Path(tempfile.mkdtemp(prefix="deploycnn-engines-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        folder = self._folder / key
        folder.mkdir(exist_ok=True)
        path = folder / MAIN_FILE["engine"]
        path.write_bytes(built.plan)
        record = {"engine": built.record.to_json()}
        manifest = {"files": {path.name: {"sha256": sha256_of(path)}}, "facts": {"record": record}}
        write_json(path.with_name("manifest.json"), manifest)
        inputs = tuple(replace(item, shape=(batch_size, *item.shape[1:])) for item in model.inputs)
        return replace(model, key=key, format="engine", path=path, inputs=inputs)


def _settings(batch_size: int) -> BuildSettings:
    from deploycnn.engines.settings import BuildSettings

    return BuildSettings(batch=(batch_size, batch_size, batch_size))
