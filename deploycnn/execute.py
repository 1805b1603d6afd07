"""Walk a plan: load what has been made, make what has not, commit each artifact at once.

A failing step does not stop the variants that do not need it: it is recorded, its variants are reported as failed
with the reason, and the walk goes on. Nothing that failed is ever a cache hit.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from deploycnn.core import Artifact, Context, Pass, Source, Stopwatch
from deploycnn.data.base import Data
from deploycnn.errors import ArtifactError, DeployCNNError, StorageError
from deploycnn.events import Events
from deploycnn.events import Outcome as Ending
from deploycnn.plan import Plan, Step
from deploycnn.recipe import Recipe
from deploycnn.runtimes.base import create
from deploycnn.store import Store


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a walk left: artifacts and failures, both by step key."""

    artifacts: dict[str, Artifact] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    hits: set[str] = field(default_factory=set)
    #: Exceptions that are our fault, not the user's.
    bugs: list[Exception] = field(default_factory=list)

    def state(self, key: str) -> str:
        """``hit``, ``made``, ``failed`` or ``miss``, as it stands in plan.txt."""
        if key in self.failures:
            return "failed"
        if key in self.hits:
            return "hit"
        return "made" if key in self.artifacts else "miss"


def execute(recipe: Recipe, plan: Plan, store: Store, data: Data | None, events: Events) -> Outcome:
    """Make every artifact of ``plan``.

    Returns:
        Artifacts and failures. Failures that the user can mend are messages; others are kept as ``bugs`` too.

    Raises:
        StorageError: the disk is full or not writable; nothing further could be kept.
    """
    outcome = Outcome()
    for number, step in enumerate(plan.steps, start=1):
        title = describe(step, number, len(plan.steps))
        blocker = _blocker(step, outcome)
        if blocker is not None:
            outcome.failures[step.key] = blocker
            events.step_finished(title, "failed", 0.0)
            continue
        artifact = _stored(step, store, events)
        if artifact is not None:
            outcome.artifacts[step.key] = artifact
            outcome.hits.add(step.key)
            events.step_finished(title, "hit", 0.0)
            continue
        events.step_started(title)
        started = time.perf_counter()
        try:
            outcome.artifacts[step.key] = _make(recipe, plan, step, store, data, outcome.artifacts, events)
        except StorageError:
            raise
        except DeployCNNError as error:
            _fail(step, error, str(error), store, outcome)
            events.error(str(error))
        except Exception as error:
            where = _fail(step, error, f"{type(error).__name__}: {error}", store, outcome)
            outcome.bugs.append(error)
            events.error(f"{step.name}: unexpected {type(error).__name__}: {error} (traceback: {where})")
        finished: Ending = "done" if step.key in outcome.artifacts else "failed"
        events.step_finished(title, finished, time.perf_counter() - started)
    return outcome


def describe(step: Step, number: int, total: int) -> str:
    """One line for people: which step, for which variants."""
    return f"[{number}/{total}] {step.name} ({', '.join(step.variants)})"


def _fail(step: Step, error: Exception, message: str, store: Store, outcome: Outcome) -> str:
    # Many a message begins with the name already.
    text = " ".join(message.split()).removeprefix(f"{step.name}: ")
    outcome.failures[step.key] = f"{step.name}: {text}"
    return str(store.record_failure(step.folder, error))


def _blocker(step: Step, outcome: Outcome) -> str | None:
    """Why this step cannot even begin: something that it needs has failed."""
    for key in (step.parent, *step.references.values()):
        if key is not None and key in outcome.failures:
            return outcome.failures[key]
    return None


def _stored(step: Step, store: Store, events: Events) -> Artifact | None:
    if not store.has(step):
        return None
    try:
        return store.load(step)
    except ArtifactError as error:
        events.warning(f"{error}; making it again")
        store.discard(step)
        return None


def _make(
    recipe: Recipe,
    plan: Plan,
    step: Step,
    store: Store,
    data: Data | None,
    artifacts: Mapping[str, Artifact],
    events: Events,
) -> Artifact:
    log = logging.getLogger(f"deploycnn.run.{step.folder}")
    with store.workplace(step) as (output, scratch):
        handler = _Log(output / "log.txt", delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        told = _Told(events, step.name)
        log.addHandler(handler)
        log.addHandler(told)
        log.setLevel(logging.INFO)
        log.propagate = False
        started = time.perf_counter()
        try:
            context = Context(
                output=output,
                scratch=scratch,
                seed=recipe.seed,
                device=_device(step),
                threads=available_threads(),
                target=recipe.target.name,
                data=data,
                references={name: artifacts[key] for name, key in step.references.items()},
                stopwatch=stopwatch(recipe, data, log) if _may_time(step) else None,
                lineage=tuple(artifacts[key] for key in _ancestors(plan, step)),
                progress=events.progress,
                log=log,
            )
            if isinstance(step.component, Source):
                draft = step.component.run(context)
            else:
                parent = artifacts[step.parent or ""]
                step.component.requires(parent)
                draft = step.component.run(parent, context)
        finally:
            log.removeHandler(told)
            log.removeHandler(handler)
            handler.close()
        artifact = store.commit(
            step,
            draft,
            output,
            seconds=time.perf_counter() - started,
            extra={
                "seed": recipe.seed,
                "data": data.fingerprint if data else None,
                "target": recipe.target.name,
                "warnings": told.texts,
            },
        )
    store.clear_failure(step.folder)
    return artifact


class _Log(logging.FileHandler):
    """A step's log, which fails like any other file of the step instead of printing tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 - logging's signature
        """Let a full disk end the step."""
        raise  # noqa: PLE0704 - logging calls this while it handles the error


class _Told(logging.Handler):
    """Tells a step's warnings to whoever watches the run, and keeps them for its manifest."""

    def __init__(self, events: Events, title: str) -> None:
        super().__init__(logging.WARNING)
        self._events, self._title = events, title
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Pass it on with the step's title."""
        self.texts.append(record.getMessage())
        self._events.warning(f"{self._title}: {record.getMessage()}")


def stopwatch(recipe: Recipe, data: Data | None, log: logging.Logger) -> Stopwatch | None:
    """What times models on the recipe's target at the settings of its profile; ``None`` where it cannot run here."""
    from deploycnn.profiling.engines import Engines
    from deploycnn.profiling.remembering import RememberingStopwatch
    from deploycnn.profiling.stopwatch import RuntimeStopwatch

    spec = recipe.target.runtimes[0]
    runtime = create(spec)
    if not runtime.availability().ok:
        return None
    threads = [available_threads() if item == "all" else int(item) for item in recipe.profile.threads]
    if runtime.device_of(runtime.mode) == "cuda":
        threads = threads[:1]  # they make no difference there
    return RememberingStopwatch(
        stopwatch=RuntimeStopwatch(
            runtime=spec,
            settings=tuple(
                dict.fromkeys((size, count) for count in threads for size in recipe.profile.batch_sizes)
            ),
            image_shape=data.preprocessing.input_shape if data is not None else None,
            seed=recipe.seed,
            engines=Engines(log=log),
        ),
        log=log,
    )


def _may_time(step: Step) -> bool:
    return isinstance(step.component, Pass) and step.component.timing_decides


def _ancestors(plan: Plan, step: Step) -> list[str]:
    """Keys of the steps that a step's input was made by, source first. They are in its key through its parent's."""
    keys: list[str] = []
    while step.parent is not None:
        keys.insert(0, step.parent)
        step = plan.step(step.parent)
    return keys


def available_threads() -> int:
    """CPUs that this process may use (affinity and cpusets respected)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(step: Step) -> str:
    """Where training and the like run: the GPU if there is one. Measurement chooses its device by runtime."""
    component = step.component
    if isinstance(component, Pass) and (component.trains or component.consumes == "torch"):
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu"
