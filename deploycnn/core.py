"""The types that every room shares; standard library only.

One idea holds the house together: a pass maps an artifact to an artifact. ``Pass`` is a frozen dataclass whose
fields are at once the recipe's schema, the help text and the cache identity. A ``Source`` is a pass that
consumes nothing.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from deploycnn.data.base import Data

#: What an artifact is stored as: ``torch`` is safetensors + architecture.json, ``onnx`` one model.onnx.
Format = Literal["torch", "onnx", "engine"]

#: JSON-like values, as they stand in recipes, manifests and reports.
Json = Any

#: The main file of an artifact, by format.
MAIN_FILE: Mapping[Format, str] = {
    "torch": "model.safetensors",
    "onnx": "model.onnx",
    "engine": "model.engine",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A graph input or output. ``shape`` is NCHW for images; ``None`` is a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of an artifact besides its tensors.

    Attributes:
        params: Trained parameters (weights and biases, batch-norm statistics not counted).
        macs: Multiply-accumulates for one image, of convolutions and matrix products. Never "flops".
        size_bytes: Size on disk of the model's own files.
        preprocessing: ``Preprocessing.to_json()`` of the images that the model was made for.
        classes: Class names in output order; empty where unknown.
        precision: "fp32", "fp16", "int8", ...: of the weights and activations as stored in the graph.
        record: What the pass that made it wants to be known: parity, pruned widths, calibration, history. The
            keys "tables" (``Table``) and "histograms" (``Histogram``) are drawn by the report.
    """

    params: int | None = None
    macs: int | None = None
    size_bytes: int | None = None
    preprocessing: Json | None = None
    classes: tuple[str, ...] = ()
    precision: str = "fp32"
    record: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows that a pass wants shown in the report: ``Facts.record["tables"]`` is a list of them.

    Attributes:
        title: What it shows.
        columns: Titles, with their units.
        rows: A cell per column: text, a number, a truth value, or ``None`` where there is nothing to say.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | bool | None, ...], ...]

    def to_json(self) -> Json:
        """The form in which it stands in a record."""
        return {"title": self.title, "columns": list(self.columns), "rows": [list(row) for row in self.rows]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """A distribution that a pass wants shown in the report: ``Facts.record["histograms"]`` is a list of them.

    Attributes:
        title: Of what.
        start: Left edge of the first bin.
        stop: Right edge of the last; bins are equally wide.
        counts: By bin.
        low: Left end of a range to mark, such as the one that is quantized.
        high: Its right end.
    """

    title: str
    start: float
    stop: float
    counts: tuple[int, ...]
    low: float
    high: float

    def to_json(self) -> Json:
        """The form in which it stands in a record."""
        return {
            "title": self.title,
            "start": self.start,
            "stop": self.stop,
            "counts": list(self.counts),
            "low": self.low,
            "high": self.high,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A model on disk. ``path`` is its main file; other files stand beside it."""

    key: str
    format: Format
    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parents: tuple[str, ...]
    facts: Facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a pass returns: the files lie in ``ctx.output``; only the store mints artifacts from it."""

    format: Format
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    facts: Facts


class ProgressFn(Protocol):
    """Report progress: ``done`` of ``total`` units, and what is being done."""

    def __call__(self, done: float, total: float, message: str = "") -> None:
        """``done`` of ``total`` units; ``message`` says what is being done."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """A model's speed beside the first one of its race.

    Attributes:
        median_ms: Of one batch.
        ratio: Latency of the first model / latency of this one; above 1 is faster.
        low: Lower end of the ratio's interval.
        high: Its upper end. Both are 1 for the first model itself.
        earlier: When it was raced, where that was in an earlier run (ISO 8601); empty where it was just now.
    """

    median_ms: float
    ratio: float
    low: float
    high: float
    earlier: str = ""


class Stopwatch(Protocol):
    """Times ONNX models on the deployment target; passes get one where the target can run here."""

    @property
    def runtime(self) -> str:
        """Runtime that the times are of, as ``name:mode``."""
        ...

    @property
    def settings(self) -> tuple[tuple[int, int], ...]:
        """(batch size, threads) that the recipe asks for; the first pair decides."""
        ...

    def race(
        self, models: Mapping[str, Path], *, batch_size: int, threads: int, budget_s: float
    ) -> Mapping[str, Speed]:
        """Time models side by side; ``budget_s`` seconds for each.

        Raises:
            RuntimeUnavailable: one cannot be run (``TimingUnavailable``: as an engine, here).
        """
        ...

    def layer_ms(self, model: Path, *, batch_size: int, threads: int) -> Mapping[str, float]:
        """Median milliseconds of each node that the runtime ran, by name, in the order in which they ran.

        Nothing where the runtime tells no times of single nodes.
        """
        ...


def no_progress(done: float, total: float, message: str = "") -> None:
    """Ignore progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a pass may use while it runs.

    Attributes:
        output: Empty folder; every file written here becomes part of the artifact.
        scratch: Folder that survives an interruption and is removed once the artifact is committed; training
            keeps its checkpoints here.
        seed: Everything random derives from it.
        device: "cpu" or "cuda".
        threads: CPU threads to use.
        target: Name of the deployment target (see ``targets.py``).
        data: Images with their preprocessing; ``None`` where the recipe names none.
        references: Artifacts of other variants that the pass asked for (``Pass.references``), by variant name.
        stopwatch: Times models on the target; ``None`` where the target cannot run here.
        lineage: Artifacts that the pass's input was made from, in order: the source's first, the input last.
        num_classes: How many classes the model tells apart; ``None`` where there are no data.
    """

    output: Path
    scratch: Path
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    target: str = "onnxruntime-cpu"
    data: Data | None = None
    references: Mapping[str, Artifact] = field(default_factory=dict)
    stopwatch: Stopwatch | None = None
    lineage: tuple[Artifact, ...] = ()
    progress: ProgressFn = no_progress
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("deploycnn"))

    @property
    def num_classes(self) -> int | None:
        """Number of classes in the data, or ``None`` without data."""
        return len(self.data.dataset.classes) if self.data is not None else None


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """A step from artifact to artifact.

    Subclasses are frozen, keyword-only dataclasses in ``passes/<name>.py`` (one per file; the file's name is
    the pass's name in recipes). Fields are annotated ``Annotated[type, constraint, "help text"]`` and form the
    recipe's schema. A field of type ``Path`` names an input file: it is taken relative to the recipe, must
    exist, and enters the cache key by its content. Heavy imports live inside the methods.
    """

    consumes: ClassVar[Format | None]
    produces: ClassVar[Format]
    #: The field that takes a value written alone behind the pass's name (``int8: auto``), if any.
    main: ClassVar[str | None] = None
    #: Bump when the same fields produce another output.
    version: ClassVar[int] = 1
    #: Whether ``ctx.data`` must be there.
    needs_data: ClassVar[bool] = False
    #: Whether it trains, so that it runs on the GPU where there is one. Passes that consume torch always do.
    trains: ClassVar[bool] = False
    #: Whether the output depends on ``ctx.target`` (which then enters the key).
    uses_target: ClassVar[bool] = False
    #: Whether the output depends on the machine (engines; which then enters the key).
    uses_environment: ClassVar[bool] = False
    #: Whether what ``ctx.stopwatch`` tells decides about the output (target, machine and the recipe's batch sizes and
    #: threads then enter the key).
    timing_decides: ClassVar[bool] = False

    def extra_identity(self) -> Json:
        """What else the output depends on besides the fields; enters the cache key."""
        return None

    def references(self) -> tuple[str, ...]:
        """Names of variants whose last torch artifact this pass needs (a teacher)."""
        return ()

    def check_target(self, target: str) -> None:
        """Refuse options that the target named ``target`` cannot have, while the recipe is planned.

        Raises:
            PassRequirementError: which, and what to write instead.
        """

    def check_precision(self, precision: str) -> None:
        """Refuse models of a precision (``Facts.precision``), while the recipe is planned as far as it is known then.

        Raises:
            PassRequirementError: which, and where to put the pass instead.
        """

    def precision_after(self, before: str | None) -> str | None:
        """Precision of what is made of a model of precision ``before``; ``None``: not known before a file is opened."""
        return before

    def requires(self, source: Artifact) -> None:
        """Check ``source`` before any work is done.

        Raises:
            PassRequirementError: this pass cannot be applied to it.
        """
        self.check_precision(source.facts.precision)

    @abstractmethod
    def run(self, source: Artifact, ctx: Context) -> Draft:
        """Make the new artifact's files in ``ctx.output``."""


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """Where a model comes from: ``sources/<name>.py``, written ``source: {<name>: <main value>, ...}``.

    ``main`` names the field that takes the value written after the source's name.
    """

    main: ClassVar[str]
    produces: ClassVar[Format]
    version: ClassVar[int] = 1

    def extra_identity(self) -> Json:
        """What else the model depends on besides the fields (a user module's code); enters the cache key."""
        return None

    @abstractmethod
    def run(self, ctx: Context) -> Draft:
        """Write the model's files to ``ctx.output``.

        Raises:
            SourceError: the model cannot be built or its weights do not fit.
        """
