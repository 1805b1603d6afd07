"""Measure variants: timing side by side, accuracy with every runtime, peak memory, each stored as it is done.

What was measured is kept under a key of all that it depends on, the machine included, so that an interrupted run
goes on where it stopped and a variant that was added is timed again together with those it is compared with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from deploycnn.core import Artifact
from deploycnn.errors import ArtifactError, DeployCNNError, RuntimeUnavailable
from deploycnn.events import Events, told
from deploycnn.execute import available_threads
from deploycnn.profiling.inputs import first_images, noise, require_memory
from deploycnn.recipe import Profile
from deploycnn.runtimes.base import Runtime, create, parse_spec, untimed
from deploycnn.store import Store

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from deploycnn.data.base import Data
    from deploycnn.profiling.accuracy import Predictions
    from deploycnn.profiling.rows import TimingRow

#: Splits that accuracy is measured on: val picks the winner, test proves it.
SPLITS: tuple[Literal["val", "test"], ...] = ("val", "test")
#: Enters the keys of stored measurements: bump when what is measured changes.
MEASUREMENT_VERSION = 1
#: Images in a batch when accuracy is measured, where the model leaves the choice.
ACCURACY_BATCH_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A named model to measure."""

    name: str
    artifact: Artifact


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Rows that were timed side by side; ``file`` holds them in the store."""

    batch_size: int
    threads: int
    rows: tuple[TimingRow, ...]
    file: str


@dataclass(slots=True, kw_only=True)
class Measured:
    """All measurements of a run. Pairs are (subject's name, runtime as ``name:mode``)."""

    runtimes: tuple[str, ...]
    timings: list[Timing] = field(default_factory=list)
    predictions: dict[tuple[str, str, str], Predictions] = field(default_factory=dict)
    memory_bytes: dict[tuple[str, str], int] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    #: Why the accuracy of a pair is missing, and why its memory.
    accuracy_failures: dict[tuple[str, str], str] = field(default_factory=dict)
    memory_failures: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def failures(self) -> dict[tuple[str, str], str]:
        """Why accuracy, or else memory, of a pair is missing."""
        return {**self.memory_failures, **self.accuracy_failures}

    def problems(self) -> tuple[str, ...]:
        """Pairs whose accuracy was asked for and could not be measured: a line for each runtime and reason."""
        told: dict[tuple[str, str], list[str]] = {}
        for (name, spec), why in self.accuracy_failures.items():
            told.setdefault((spec, why), []).append(name)
        return tuple(
            f"accuracy of {', '.join(names)} on {spec}: {why}" for (spec, why), names in told.items()
        )


def label(subject: str, runtime: str) -> str:
    """How a row is called in stored measurements."""
    return f"{subject}|{runtime}"


def timing_title(batch_size: int, threads: int) -> str:
    """What a person calls a set of timings."""
    return f"timing: batch {batch_size}, {threads} thread{'s' if threads > 1 else ''}"


def full_spec(spec: str) -> str:
    """``name:mode`` with the default mode filled in."""
    return ":".join(parse_spec(spec))


def require_reference(runtimes: Sequence[str], instead: str = "") -> None:
    """Check, before anything is computed, that the reference runtime works here.

    Args:
        runtimes: The first is the reference.
        instead: What can be done without it.

    Raises:
        RuntimeUnavailable: it does not; says why and how to mend it.
    """
    found = create(runtimes[0]).availability()
    if not found.ok:
        raise RuntimeUnavailable(f"{full_spec(runtimes[0])}: {found.why}; {found.mend}{instead}")


def thread_counts(wanted: Sequence[int | str]) -> tuple[int, ...]:
    """Resolve ``all``, drop duplicates, keep the order."""
    resolved = [available_threads() if item == "all" else int(item) for item in wanted]
    return tuple(dict.fromkeys(resolved))


def measure(
    subjects: Sequence[Subject],
    runtimes: Sequence[str],
    profile: Profile,
    store: Store,
    data: Data | None,
    events: Events,
    *,
    seed: int = 0,
) -> Measured:
    """Measure every subject on every runtime that works here.

    Args:
        subjects: The first is what ratios are taken against, on the first runtime.
        runtimes: Runtime specs.
        profile: What to measure, and for how long.
        store: Where results go and earlier ones are found.
        data: Images for accuracy and as timing input; random input and no accuracy without.
        events: Told of progress.
        seed: Of the order in which blocks are interleaved.

    Raises:
        RecipeError: a batch does not fit in memory.
    """
    from deploycnn import environment

    for subject in subjects:
        require_memory(max(profile.batch_sizes), _image_shape(subject))

    here = environment.detect().fingerprint
    result = Measured(runtimes=tuple(full_spec(spec) for spec in runtimes))
    usable = _usable(result, events)
    session = _Measurement(
        subjects=subjects,
        usable=usable,
        profile=profile,
        store=store,
        data=data,
        events=events,
        here=here,
        seed=seed,
    )
    if data is not None and profile.accuracy:
        session.accuracy(result)
    if profile.memory:
        session.memory(result)
    # Timing comes last, when nothing else is left to run beside it.
    for threads in thread_counts(profile.threads):
        for batch_size in dict.fromkeys(profile.batch_sizes):
            result.timings.append(session.timing(batch_size, threads))
    return result


def _usable(result: Measured, events: Events) -> dict[str, Runtime]:
    usable = {}
    for spec in result.runtimes:
        runtime = create(spec)
        found = runtime.availability()
        if found.ok:
            usable[spec] = runtime
        else:
            result.unavailable[spec] = f"{found.why}; {found.mend}"
            events.warning(f"{spec} is not measured: {found.why}; {found.mend}")
    return usable


@dataclass(frozen=True, kw_only=True)
class _Measurement:
    subjects: Sequence[Subject]
    usable: Mapping[str, Runtime]
    profile: Profile
    store: Store
    data: Data | None
    events: Events
    here: str
    seed: int

    def pairs(self) -> list[tuple[Subject, str, Runtime]]:
        """Every subject with every runtime that opens its format."""
        return [
            (subject, spec, runtime)
            for subject in self.subjects
            for spec, runtime in self.usable.items()
            if subject.artifact.format in runtime.accepts
        ]

    def key(self, kind: str, **identity: Any) -> str:
        """Name of a stored measurement: its kind and a hash of what it depends on."""
        everything = {"version": MEASUREMENT_VERSION, "machine": self.here, "kind": kind, **identity}
        return f"{kind}-{hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]}"

    def prepared(self, subject: Subject) -> Data | None:
        """The images as this subject wants them: a foreign model brings its own preprocessing."""
        if self.data is None or subject.artifact.facts.preprocessing is None:
            return self.data
        from deploycnn.data.base import Data
        from deploycnn.data.preprocessing import Preprocessing

        own = Preprocessing.from_json(subject.artifact.facts.preprocessing, str(subject.artifact.path))
        return Data(dataset=self.data.dataset, preprocessing=own)

    def images(
        self, subject: Subject, batch_size: int, made: dict[str, npt.NDArray[np.float32]]
    ) -> npt.NDArray[np.float32]:
        """Timing input: validation images, or noise without data; subjects that want the same share it."""
        data = self.prepared(subject)
        shape = _image_shape(subject)
        key = str(shape) if data is None else data.fingerprint
        if key not in made:
            made[key] = (
                noise(batch_size, shape, self.seed) if data is None else first_images(data, batch_size)
            )
        return made[key]

    def timing(self, batch_size: int, threads: int) -> Timing:
        """Time all pairs side by side, or read what an earlier run stored."""
        from deploycnn.profiling.rows import TimingRow
        from deploycnn.profiling.timing import Candidate, TimingSettings, time_interleaved

        pairs = self.pairs()
        settings = TimingSettings(budget_s=self.profile.budget_s, rounds=self.profile.rounds, seed=self.seed)
        name = self.key(
            "timing",
            subjects=[(subject.name, subject.artifact.key, spec) for subject, spec, _ in pairs],
            batch_size=batch_size,
            threads=threads,
            settings=[settings.budget_s, settings.rounds, settings.seed],
        )
        title = timing_title(batch_size, threads)
        stored = self.store.measurement(name)
        if stored is not None:
            self.events.step_finished(title, "hit", 0.0)
            rows = [TimingRow.from_json(row, name) for row in stored["rows"]]
        else:
            made: dict[str, npt.NDArray[np.float32]] = {}
            with told(self.events, title):
                candidates = [
                    Candidate(
                        label=label(subject.name, spec),
                        runtime=spec,
                        batch_size=batch_size,
                        threads=threads,
                        images_NCHW=self.images(subject, batch_size, made),
                        open=_opener(runtime, subject.artifact, batch_size, threads),
                    )
                    for subject, spec, runtime in pairs
                ]
                rows = time_interleaved(candidates, settings, self.events.progress)
            self.store.write_measurement(name, {"rows": [row.to_json() for row in rows]})
        return Timing(
            batch_size=batch_size, threads=threads, rows=tuple(rows), file=f"measurements/{name}.json"
        )

    def accuracy(self, result: Measured) -> None:
        """Predictions on val and test for every pair."""
        from deploycnn.profiling.accuracy import Predictions, evaluate

        for subject, spec, runtime in self.pairs():
            data = self.prepared(subject)
            if data is None:
                continue
            batch_size = subject.artifact.inputs[0].shape[0] or ACCURACY_BATCH_SIZE
            for split in SPLITS:
                on = untimed(spec)
                name = self.key(
                    "predictions", artifact=subject.artifact.key, data=data.fingerprint, on=on, split=split
                )
                stored = self.store.measurement(name)
                if stored is not None:
                    result.predictions[subject.name, spec, split] = Predictions.from_json(stored, name)
                    continue
                title = f"accuracy: {subject.name} on {spec}, {split}"
                try:
                    with told(self.events, title):
                        opened = runtime.open(
                            subject.artifact, batch_size=batch_size, threads=available_threads()
                        )
                        try:
                            predictions = evaluate(
                                opened, data, split, batch_size, progress=self.events.progress
                            )
                        finally:
                            opened.close()
                except DeployCNNError as error:
                    result.accuracy_failures[subject.name, spec] = str(error)
                    self.events.error(f"{title}: {error}")
                    break
                self.store.write_measurement(name, predictions.to_json())
                result.predictions[subject.name, spec, split] = predictions

    def memory(self, result: Measured) -> None:
        """Peak memory of every pair, each in a process of its own."""
        from deploycnn.profiling.memory import peak_memory_bytes

        batch_size = self.profile.batch_sizes[0]
        title = f"peak memory: batch {batch_size}"
        missing = []
        for subject, spec, _ in self.pairs():
            name = self.key("memory", artifact=subject.artifact.key, on=spec, batch_size=batch_size)
            stored = self.store.measurement(name)
            if stored is None:
                missing.append((subject, spec, name))
            else:
                result.memory_bytes[subject.name, spec] = stored["peak_memory_bytes"]
        if not missing:
            self.events.step_finished(title, "hit", 0.0)
            return
        with told(self.events, title):
            for index, (subject, spec, name) in enumerate(missing):
                self.events.progress(index, len(missing), f"{subject.name} on {spec}")
                try:
                    peak = peak_memory_bytes(subject.artifact, spec, batch_size=batch_size, threads=1)
                except (ArtifactError, RuntimeUnavailable) as error:
                    result.memory_failures[subject.name, spec] = str(error)
                    continue
                self.store.write_measurement(name, {"peak_memory_bytes": peak})
                result.memory_bytes[subject.name, spec] = peak


def _image_shape(subject: Subject) -> tuple[int, ...]:
    """(C, H, W); sizes that the model leaves open are 1."""
    return tuple(1 if size is None else size for size in subject.artifact.inputs[0].shape[1:])


def _opener(runtime: Runtime, artifact: Artifact, batch_size: int, threads: int) -> Any:
    return lambda: runtime.open(artifact, batch_size=batch_size, threads=threads)
