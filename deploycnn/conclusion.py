"""What a run concludes from all that was made and measured: entries, problems, the report and the winner."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from deploycnn import bundle, evidence, files, measure
from deploycnn.core import Artifact
from deploycnn.errors import DeployCNNError
from deploycnn.execute import Outcome
from deploycnn.plan import Plan
from deploycnn.recipe import Recipe
from deploycnn.store import Store


def subjects(recipe: Recipe, planned: Plan, outcome: Outcome) -> list[measure.Subject]:
    """The variants that were made, ready to be measured.

    Raises:
        DeployCNNError: the baseline is not among them; there is nothing to compare with.
    """
    _raise_baseline(recipe, planned, outcome)
    return [
        measure.Subject(name=name, artifact=outcome.artifacts[keys[-1]])
        for name, keys in planned.chains.items()
        if keys[-1] in outcome.artifacts
    ]


def entries(recipe: Recipe, planned: Plan, outcome: Outcome, store: Store) -> list[evidence.Entry]:
    """What the report says of how each variant was made."""
    result = []
    for name, keys in planned.chains.items():
        manifests = [store.manifest(planned.step(key)) for key in keys if key in outcome.artifacts]
        parities = [
            manifest["facts"]["record"]["parity"] for manifest in manifests if manifest["step"] == "export"
        ]
        result.append(
            evidence.Entry(
                name=name,
                passes=tuple(pass_name for pass_name, _ in recipe.variant(name).passes),
                artifact=outcome.artifacts.get(keys[-1]),
                why=outcome.failures.get(keys[-1], ""),
                parity=parities[-1] if parities else None,
                provenance=tuple(provenance(manifest) for manifest in manifests),
            )
        )
    return result


def provenance(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A step as the report tells it, from its manifest."""
    return {
        "pass": manifest["step"],
        "key": manifest["key"],
        "options": manifest["options"],
        "seconds": manifest["seconds"],
        "record": manifest["facts"]["record"],
        "warnings": manifest.get("warnings", []),
    }


def _raise_baseline(recipe: Recipe, planned: Plan, outcome: Outcome) -> None:
    failure = outcome.failures.get(planned.chains[recipe.baseline][-1])
    if failure is None:
        return
    raise_bugs(outcome)
    others = [
        f"variant {name}: {outcome.failures[keys[-1]]}"
        for name, keys in planned.chains.items()
        if outcome.failures.get(keys[-1], failure) != failure
    ]
    raise DeployCNNError("; ".join([f"baseline {recipe.baseline}: {failure}", *others]))


def raise_bugs(outcome: Outcome) -> None:
    """Our own faults keep their traceback."""
    if outcome.bugs:
        raise outcome.bugs[0]


def problems_of_making(
    outcome: Outcome, planned: Plan, measured: measure.Measured, recipe: Recipe
) -> tuple[str, ...]:
    """What could not be made, or not be measured though the recipe asks for it: a line each."""
    problems = [
        f"variant {name}: {outcome.failures[keys[-1]]}"
        for name, keys in planned.chains.items()
        if keys[-1] in outcome.failures
    ]
    asked = set(recipe.profile.runtimes)
    problems += [f"{spec}: {why}" for spec, why in measured.unavailable.items() if spec in asked]
    return (*problems, *measured.problems())


def problems_of_report(report: Mapping[str, Any]) -> tuple[str, ...]:
    """What a report could not tell of models that were made: a line each.

    Raises:
        DeployCNNError: the baseline was not measured; there is nothing to compare with.
    """
    problems = []
    for variant in report["variants"]:
        if variant["status"] == "not measured":
            why = f"{variant['name']}: not measured: {variant['why']}"
            if variant["name"] == report["baseline"]["variant"]:
                raise DeployCNNError(f"baseline {why}")
            problems.append(f"variant {why}")
    return tuple(problems)


def write_report(store: Store, report: Mapping[str, Any]) -> None:
    """Write report.html, .md and .json.

    Raises:
        StorageError: no space or no permission.
    """
    from deploycnn.report import write_reports

    with files.storage_errors(store.root):
        write_reports(store.root, report)


def write_winner(store: Store, report: Mapping[str, Any], measured: Sequence[measure.Subject]) -> None:
    """Write ``best/``, or remove that of an earlier recipe: it must not contradict the report beside it."""
    winner = report["winner"]
    if winner is None:
        _remove_best(store)
        return
    artifact: Artifact = next(subject.artifact for subject in measured if subject.name == winner["variant"])
    if artifact.format == "torch":
        _remove_best(store)
        return
    entry = next(variant for variant in report["variants"] if variant["name"] == winner["variant"])
    kept = (
        "top1",
        "top1_interval",
        "top1_drop",
        "top1_drop_interval",
        "latency_ms",
        "speedup",
        "within_budget",
    )
    bundle.write_bundle(
        store.root / "best",
        artifact,
        variant=winner["variant"],
        runtime=winner["runtime"],
        evidence={name: entry[name] for name in kept},
    )


def _remove_best(store: Store) -> None:
    with files.storage_errors(store.root / "best"):
        if (store.root / "best").exists():
            shutil.rmtree(store.root / "best")
