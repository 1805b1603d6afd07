"""From measurements to report.json: the verdict and the winner.

The winner is chosen by figures that the test split had no part in: among the variants whose drop on the validation
split is within the budget, the one with the lowest median latency at the primary setting. The test split then says
whether that holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from deploycnn import environment, measure
from deploycnn.figures import Entry, Figures, Inputs

__all__ = ["Entry", "Inputs", "report"]


def report(inputs: Inputs) -> dict[str, Any]:
    """``report.json`` as a dictionary; see ``report/schema.py`` for what stands where."""
    figures = Figures(inputs)
    measurements = figures.measurements()
    variants = [figures.variant(entry) for entry in inputs.entries]
    winner, why_none = _winner(figures, variants)
    result: dict[str, Any] = {
        "schema_version": 1,
        "name": inputs.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment.detect().to_json(),
        "data": _data(figures),
        "baseline": {"variant": inputs.baseline, "runtime": figures.reference_runtime},
        "budget": {"max_top1_drop": inputs.budget.max_top1_drop} if inputs.budget else None,
        "winner": winner,
        "why_no_winner": why_none,
        "primary": {
            "runtimes": list(inputs.measured.runtimes),
            "threads": figures.primary_threads,
            "batch_size": figures.primary_batch_size,
        },
        "variants": variants,
        "measurements": measurements,
        "warnings": _warnings(figures),
        "method": _method(figures),
    }
    if inputs.recipe is not None:
        result["recipe"] = inputs.recipe
    return result


def _winner(figures: Figures, variants: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any] | None, str]:
    """The fastest candidate within the budget by the validation split, or why there is none."""
    budget = figures.inputs.budget
    if budget is None:
        return None, "models are compared without a budget"
    measured = [variant for variant in variants if variant["status"] == "measured"]
    if not any(variant["val_top1_drop"] is not None for variant in measured):
        return None, "accuracy was not measured"
    primary = str(figures.primary_batch_size)
    kept = [
        variant
        for variant in measured
        if variant["val_top1_drop"] is not None
        and variant["val_top1_drop"] <= budget.max_top1_drop
        and primary in variant["speedup"]
    ]
    faster = [variant for variant in kept if variant["speedup"][primary]["verdict"] == "faster"]
    if not faster:
        return None, _why_none(measured, primary, budget.max_top1_drop)
    best = min(faster, key=lambda variant: variant["latency_ms"][primary]["median"])
    why = (
        f"fastest of {len(kept)} variants whose top-1 drops by at most {budget.max_top1_drop:g} on val "
        f"({best['val_top1_drop']:+.4f})"
    )
    return {"variant": best["name"], "runtime": best["runtime"], "why": why}, ""


def _why_none(measured: Sequence[Mapping[str, Any]], primary: str, most: float) -> str:
    """That nothing fast kept the budget, and by how much the nearest missed it."""
    why = f"of what drops by at most {most:g} top-1 on val, which decides, nothing was measured faster than baseline"
    faster = [
        variant
        for variant in measured
        if variant["val_top1_drop"] is not None
        and variant["speedup"].get(primary, {}).get("verdict") == "faster"
    ]
    if not faster:
        return why
    nearest = min(faster, key=lambda variant: variant["val_top1_drop"])
    return f"{why}; {nearest['name']} was, and drops by {nearest['val_top1_drop']:.4f} there"


def _data(figures: Figures) -> dict[str, Any] | None:
    if figures.inputs.data is None:
        return None
    from deploycnn.data.summary import describe

    described = describe(figures.inputs.data.dataset)
    kept = {name: described[name] for name in ("name", "classes", "fingerprint", "skipped")}
    preprocessing = figures.inputs.data.preprocessing.to_json()
    return {**kept, "counts": described["images"], "preprocessing": preprocessing}


def _warnings(figures: Figures) -> list[str]:
    # Failed variants and unavailable runtimes are told where their figures would stand.
    found = [f"{name} on {spec}: {why}" for (name, spec), why in figures.measured.failures.items()]
    found += _of_steps(figures.inputs.entries)
    for timing in figures.measured.timings:
        words = {row.disturbance.words for row in timing.rows if row.disturbance and row.disturbance.words}
        found += [
            f"{measure.timing_title(timing.batch_size, timing.threads)}: {text}" for text in sorted(words)
        ]
    if figures.inputs.data is not None and figures.inputs.data.dataset.skipped:
        found.append(f"{len(figures.inputs.data.dataset.skipped)} unusable files were skipped")
    return found


def _of_steps(entries: Sequence[Entry]) -> list[str]:
    """What passes warned of, and goals that they did not reach, each with the variants that go on from there."""
    variants: dict[str, list[str]] = {}
    for entry in entries:
        for step in entry.provenance:
            for text in step["warnings"]:
                variants.setdefault(f"{step['pass']}: {text}", []).append(entry.name)
            latency = step["record"].get("pruning", {}).get("latency", {})
            if latency.get("met") is False:
                variants.setdefault(f"latency_ratio: {latency['words']}", []).append(entry.name)
            int8 = step["record"].get("int8", {})
            if int8.get("budget_met") is False:
                judged = int8["judged"]
                words = (
                    f"int8: top-1 drops by {judged['top1_drop']:.4f} on {judged['images']} val images, more than "
                    f"max_top1_drop {int8['max_top1_drop']:g}"
                )
                variants.setdefault(words, []).append(entry.name)
    return [f"{', '.join(dict.fromkeys(names))}: {words}" for words, names in variants.items()]


def _method(figures: Figures) -> dict[str, Any]:
    from deploycnn.profiling import statistics

    rows = [row for row in figures.primary().rows if row.measured]
    if not rows:
        return {"confidence": statistics.CONFIDENCE}
    blocks = rows[0].samples_ms
    return {
        "confidence": statistics.CONFIDENCE,
        "sessions": len(blocks),
        "blocks": len(blocks[0]),
        "runs_per_block": len(blocks[0][0]),
        "warmup_runs": rows[0].warmup_runs,
        "resamples": statistics.RESAMPLES,
    }
