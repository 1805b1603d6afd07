"""Measure a latency table: whole models at random widths, the runtime's times of their layers, and races."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor, nn

from deploycnn import cache, environment, targets
from deploycnn.core import Stopwatch
from deploycnn.errors import PassRequirementError
from deploycnn.graph.export import NATIVE_OPSET, export_onnx
from deploycnn.graph.model import save_onnx
from deploycnn.latency import steps
from deploycnn.latency.deployed import deployed
from deploycnn.latency.instances import FixedWidthsError, narrowed
from deploycnn.latency.layers import Layer, layers_of, with_tails
from deploycnn.latency.model import SCHEMA, LatencyTable, Sample
from deploycnn.latency.reading import table_of
from deploycnn.latency.samples import configurations, samples_of
from deploycnn.pruning.surgery import Removals, channels_at, remove, sharing

if TYPE_CHECKING:
    from onnx import ModelProto

#: Times that each configuration is profiled, far apart: a neighbour disturbs one of them only.
REPEATS = 2
#: Times that the first model of a race, with which all are compared, takes part in it.
FIRST_RUNS = 4
#: Bytes of the files that are raced at once: all are open, and a runtime keeps about two copies of the weights.
RACE_BYTES = 1 << 30
#: Models that are raced at once on a GPU, whose memory holds what they compute with besides their weights.
GPU_RACE = 8
#: What a profile may add to the time of each node: that is taken with which the table predicts best.
OVERHEADS_MS = (0.0, 0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.014, 0.02, 0.03)
#: Of a node's profiled time, what is left at least when the overhead is taken off.
_LEAST_SHARE = 0.1
#: Part of the names in the cache: another way to measure is another table.
_VERSION = 12


class Kept(NamedTuple):
    """What a race tells of a pruned model.

    Attributes:
        measured_ratio: Its latency / that of the dense one.
        dense_ms: Of the dense one.
        measured_ms: Its own.
        earlier: As in ``core.Speed``.
    """

    measured_ratio: float
    dense_ms: float
    measured_ms: float
    earlier: str = ""


@dataclass(slots=True, kw_only=True)
class Bench:
    """A model on its target: timed dense, at other widths, and as finally pruned.

    Attributes:
        model: The dense model, in evaluation mode.
        images: Example input (N, C, H, W).
        stopwatch: Of the target.
        precision: Of what will be deployed (``targets.Precision``).
        batch_size: Images per run.
        threads: Of the runtime.
        target: Name of the target, for the rules of INT8.
        budget_s: Seconds of timing for each model of a race.
        tell: Told what is being done: (done, total, message).
    """

    model: nn.Module
    images: Tensor
    stopwatch: Stopwatch
    precision: str
    batch_size: int
    threads: int
    target: str
    budget_s: float = 1.5
    tell: Callable[[float, float, str], None] = lambda _done, _total, _message: None
    _exported: ModelProto | None = field(default=None, init=False)
    _dense: ModelProto | None = field(default=None, init=False)
    _layers: list[Layer] | None = field(default=None, init=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width_ = self.images.shape[1:]
        return channels, height, width_

    def export(self, model: nn.Module) -> ModelProto:
        """A model as it would be deployed: exported, and quantized or cast where that is what is timed."""
        return self._deployed(export_onnx(model, self.shape, opset=NATIVE_OPSET))

    def _deployed(self, graph: ModelProto) -> ModelProto:
        return deployed(graph, self.precision, self.target)

    def _export_dense(self) -> ModelProto:
        if self._exported is None:
            self.tell(0, 1, "exporting the dense model")
            self._exported = export_onnx(self.model, self.shape, opset=NATIVE_OPSET)
        return self._exported

    def dense(self) -> ModelProto:
        """The dense model's graph."""
        if self._dense is None:
            self._dense = self._deployed(self._export_dense())
        return self._dense

    def at(self, cuts: Removals) -> ModelProto:
        """The model's graph without some channels; weights need not be those that are left."""
        try:
            return self._deployed(narrowed(self._export_dense(), cuts, channels_at(self.model, cuts)))
        except FixedWidthsError:
            # A reshape to sizes that the module computes, for one: the graph has them as constants. Surgery proved
            # that the module fits, so it is exported anew, which takes longer.
            pruned = sharing(self.model)
            remove(pruned, cuts)
            return self.export(pruned)

    def layers(self) -> list[Layer]:
        """The model's layers; those that share a kind share a table.

        Raises:
            PassRequirementError: the target tells no times of layers.
        """
        if self._layers is None:
            with tempfile.TemporaryDirectory(prefix="deploycnn-") as folder:
                save_onnx(self.dense(), path := Path(folder) / "dense.onnx")
                times = self.profile(path)
            operators = {node.name: node.op_type for node in self.dense().graph.node}
            self._layers = with_tails(layers_of(self.model, self.images[:1]), times, operators)
        return self._layers

    def profile(self, path: Path) -> Mapping[str, float]:
        """Milliseconds by node of a graph in a file."""
        times = self.stopwatch.layer_ms(path, batch_size=self.batch_size, threads=self.threads)
        if not times:
            raise PassRequirementError(
                f"latency: {self.stopwatch.runtime} tells no times of single layers; use macs_ratio for this target"
            )
        return times

    def ratio(self, pruned: ModelProto, *, again: int = 0) -> Kept:
        """Race what ``export`` made of a pruned model with the dense one; longer each time it is raced ``again``."""
        with tempfile.TemporaryDirectory(prefix="deploycnn-") as folder:
            paths = {"dense": Path(folder) / "dense.onnx", "pruned": Path(folder) / "pruned.onnx"}
            save_onnx(self.dense(), paths["dense"])
            save_onnx(pruned, paths["pruned"])
            speeds = self.stopwatch.race(
                paths,
                batch_size=self.batch_size,
                threads=self.threads,
                budget_s=2 * (1 + again) * self.budget_s,
            )
        kept = 1 / speeds["pruned"].ratio
        dense_ms = speeds["dense"].median_ms
        return Kept(
            measured_ratio=kept,
            dense_ms=dense_ms,
            measured_ms=kept * dense_ms,
            earlier=speeds["pruned"].earlier,
        )

    def step(self) -> int:
        """Widths may be rounded up to multiples of this at no cost; cached for the machine."""
        identity = self._identity({"steps": sorted({layer.key for layer in self.layers()})})
        stored = cache.load("latency", identity)
        if stored is None:
            self.tell(0, 1, "finding the steps of the hardware")
            stored = steps.find(
                [layer.kind for layer in self.layers()],
                self.stopwatch,
                batch_size=self.batch_size,
                threads=self.threads,
                prepare=self._deployed,
            )
            cache.store("latency", identity, stored)
        return int(stored)

    def table(self, draw: Callable[[np.random.Generator], Removals], *, seed: int = 0) -> LatencyTable:
        """The table of the model's layers, measured or from the cache.

        Args:
            draw: Makes a random width configuration.
            seed: Of the configurations.
        """
        cuts = configurations(draw, seed=seed)
        # How many channels a layer has is what costs, not which: the ranking of channels may change.
        configs = [
            sorted((name, str(side), len(removed)) for (name, side), removed in cut.items()) for cut in cuts
        ]
        kinds = [f"{layer.name}: {layer.key}" for layer in self.layers()]
        identity = self._identity({"kinds": kinds, "configs": configs})
        stored = cache.load("latency", identity)
        if stored is None:
            stored = self.measure(cuts).to_json()
            cache.store("latency", identity, stored)
        return table_of(stored)  # rounded as in the file, so that the next run chooses alike

    def measure(self, cuts: Sequence[Removals]) -> LatencyTable:
        """Profile and race the dense model and the configurations that ``cuts`` leave of it.

        A machine changes its speed from second to second, so the profiles of two configurations are no measure of each
        other; a race interleaves, so its latencies are. Each profile tells the shares, the race the whole.
        """
        cuts = [{}, *cuts]
        with tempfile.TemporaryDirectory(prefix="deploycnn-") as name:
            folder = Path(name)
            paths = {str(config): folder / f"{config}.onnx" for config in range(len(cuts))}
            for cut, path in zip(cuts, paths.values(), strict=True):
                save_onnx(self.at(cut), path)
            profiles = self.profiles(list(paths.values()))
            self.tell(0, 1, f"racing {len(cuts)} width configurations")
            whole = self.race(paths)
        tables = [self._assembled(cuts, profiles, whole, overhead) for overhead in OVERHEADS_MS]
        return min(tables, key=lambda table: table.error.median if table.error else np.inf)

    def _assembled(
        self,
        cuts: Sequence[Removals],
        profiles: Sequence[Mapping[str, float]],
        whole: Mapping[str, float],
        overhead_ms: float,
    ) -> LatencyTable:
        """The table, were ``overhead_ms`` what a profile adds to each node."""
        samples: list[Sample] = []
        for config, (cut, times) in enumerate(zip(cuts, profiles, strict=True)):
            net = {node: max(ms - overhead_ms, _LEAST_SHARE * ms) for node, ms in times.items()}
            scale = whole[str(config)] / sum(net.values())
            scaled = {node: scale * ms for node, ms in net.items()}
            samples += samples_of(self.layers(), self.model, cut, scaled, config)
        return LatencyTable(
            environment=environment.detect().to_json(),
            runtime=self.stopwatch.runtime,
            precision=self.precision,
            batch_size=self.batch_size,
            threads=self.threads,
            step=self.step(),
            layers={layer.name: layer.key for layer in self.layers()},
            overhead_ms=overhead_ms,
            samples=tuple(samples),
        ).judged()

    def profiles(self, paths: Sequence[Path]) -> list[dict[str, float]]:
        """Milliseconds by node of each graph, the median of several profiles."""
        seen: list[list[Mapping[str, float]]] = [[] for _ in paths]
        for repeat in range(REPEATS):
            for config, path in enumerate(paths):
                self.tell(repeat * len(paths) + config, REPEATS * len(paths), "timing layers at other widths")
                seen[config].append(self.profile(path))
        return [
            {node: float(np.median([run[node] for run in runs if node in run])) for node in runs[0]}
            for runs in seen
        ]

    def race(self, paths: Mapping[str, Path]) -> dict[str, float]:
        """Milliseconds of whole models, timed side by side.

        All are compared with the first, and an error of its time would be one of all: it runs several times over. All
        models of a race are open at once; where they are too large for that, there are several, each with the first.
        """
        first, *others = paths
        again = {f"{first} again {number}": paths[first] for number in range(1, FIRST_RUNS)}
        ms: dict[str, float] = {}
        count = GPU_RACE if targets.get(self.target).device == "cuda" else len(others)
        for part in parts([paths[name].stat().st_size for name in others], RACE_BYTES, count):
            racing = {name: paths[name] for name in (first, *(others[index] for index in part))}
            speeds = self.stopwatch.race(
                {**racing, **again},
                batch_size=self.batch_size,
                threads=self.threads,
                budget_s=self.budget_s,
            )
            shares = {name: 1 / speed.ratio for name, speed in speeds.items()}
            mean = float(np.exp(np.mean([np.log(shares[name]) for name in (first, *again)])))
            ms.setdefault(first, speeds[first].median_ms * mean)
            ms |= {name: ms[first] * shares[name] / mean for name in racing if name != first}
        return ms

    def _identity(self, what: object) -> str:
        identity = {
            "version": [SCHEMA, _VERSION],
            "environment": environment.detect().fingerprint,
            "runtime": self.stopwatch.runtime,
            "target": self.target if self.precision != "fp32" else "",
            "precision": self.precision,
            "batch_size": self.batch_size,
            "threads": self.threads,
            "what": what,
        }
        return json.dumps(identity, sort_keys=True)


def parts(sizes: Sequence[int], most: int, count: int) -> list[list[int]]:
    """Indices in runs, each of at most ``count`` files with at most ``most`` bytes together, or of a single one."""
    found: list[list[int]] = []
    held = 0
    for index, size in enumerate(sizes):
        if not found or held + size > most or len(found[-1]) == count:
            found.append([])
            held = 0
        found[-1].append(index)
        held += size
    return found
