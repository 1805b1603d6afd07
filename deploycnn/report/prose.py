"""What a report says in sentences; HTML, Markdown and terminal only lay it out."""

from __future__ import annotations

from deploycnn.report import words
from deploycnn.report.schema import Report, Variant


def variant_named(report: Report, name: str) -> Variant:
    """The variant called ``name``; ``validate`` has made sure that it is there."""
    return next(variant for variant in report["variants"] if variant["name"] == name)


def test_images(report: Report) -> int | None:
    """How many images accuracy was measured on."""
    return report["data"]["counts"].get("test") if report["data"] else None


def created(report: Report) -> str:
    """When the report was made: "2026-11-24 12:46:03 UTC"."""
    day, _, time = report["created"].partition("T")
    return f"{day} {time.removesuffix('Z').removesuffix('+00:00')} UTC" if time else day


def setting(report: Report) -> str:
    """The primary setting in words: "batch 1, 1 thread"."""
    primary = report["primary"]
    return f"batch {primary['batch_size']}, {words.plural(primary['threads'], 'thread')}"


def speed_words(report: Report, variant: Variant) -> str:
    """How fast it is: "is 3.1x faster (2.9–3.3) than fp32 on onnxruntime:cpu at batch 1, 1 thread"."""
    baseline = report["baseline"]
    speedup = variant["speedup"].get(str(report["primary"]["batch_size"]))
    where = f"{variant['runtime']} at {setting(report)}"
    if speedup is None:
        return f"was not timed at {setting(report)}"
    if speedup["verdict"] == "baseline":
        return f"is the baseline, on {where}"
    than = baseline["variant"]
    if variant["runtime"] != baseline["runtime"]:
        than = f"{than} (on {baseline['runtime']})"
    value, low, high, word = speedup["ratio"], speedup["low"], speedup["high"], "faster"
    if speedup["verdict"] == "indistinguishable":
        bounds = words.ratio_interval(value, low, high)
        return f"cannot be told apart in speed from {than} (ratio {bounds}) on {where}"
    if speedup["verdict"] == "slower":
        value, low, high, word = 1 / value, 1 / high, 1 / low, "slower"
    bounds = words.ratio_interval(value, low, high)
    return f"is {words.ratio(value)} {word} ({bounds}) than {than} on {where}"


def accuracy_words(report: Report, variant: Variant) -> str:
    """How good it is: "top-1 −0.2 points (−0.9 … +0.5), n = 450 test images"; empty without data."""
    images = test_images(report)
    if variant["top1"] is None:
        return ""
    decimals = words.point_decimals(images)
    n = f", n = {images} test images" if images is not None else ""
    if variant["top1_drop"] is None or variant["name"] == report["baseline"]["variant"]:
        return f"top-1 {words.percent(variant['top1'], decimals)}{n}"
    bounds = variant["top1_drop_interval"]
    interval = f" ({words.change_interval(bounds, decimals)})" if bounds else ""
    return f"top-1 {words.change(variant['top1_drop'], decimals)} points{interval}{n}"


def budget_words(variant: Variant) -> str:
    """Whether the variant keeps to the budget; empty without one."""
    return {
        True: "within budget",
        False: "over budget",
        "unproven": "within budget, but the interval reaches beyond it",
        None: "",
    }[variant["within_budget"]]


def limits(report: Report) -> str:
    """The budget in words; empty without one."""
    budget = report["budget"] or {}
    parts = []
    if "max_top1_drop" in budget:
        parts.append(f"top-1 drop at most {words.points(budget['max_top1_drop'])}")
    if "max_size_bytes" in budget:
        parts.append(f"size at most {words.scaled(budget['max_size_bytes'], 'B')}")
    if "max_latency_ms" in budget:
        parts.append(f"latency at most {words.milliseconds(budget['max_latency_ms'])}")
    return ", ".join(parts)


def headline(report: Report) -> str:
    """The result in one sentence."""
    winner = report["winner"]
    if winner is None:
        return f"No variant wins: {report['why_no_winner'] or 'none was measured'}"
    variant = variant_named(report, winner["variant"])
    tail = (accuracy_words(report, variant), budget_words(variant))
    first = f"{variant['name']} {speed_words(report, variant)}"
    return "; ".join(part for part in (first, *tail) if part)


def level(report: Report) -> str:
    """The confidence of the intervals: "95%"."""
    return f"{100 * report.get('method', {}).get('confidence', 0.95):g}%"


def method(report: Report) -> list[str]:
    """How the numbers came about, one paragraph each."""
    how = report.get("method", {})
    confidence = level(report)
    counts = [
        (
            how.get("sessions"),
            "{} sessions of each variant, created anew (the session, not the run, is what varies)",
        ),
        (how.get("blocks"), "{} blocks in each"),
        (how.get("runs_per_block"), "{} timed runs in a block"),
        (how.get("warmup_runs"), "{} warm-up runs after every switch, discarded"),
    ]
    known = [template.format(value) for value, template in counts if value is not None]
    drawn = f" ({how['resamples']} resamples)" if "resamples" in how else ""
    here = f" Here: {', '.join(known)}." if known else ""
    told = [
        (
            "Latency: the variants of one setting were timed interleaved, in blocks of runs, round-robin in "
            "random order over sessions that stay open side by side, so that a busy moment hits all of them "
            f"alike.{here}"
        ),
        (
            f"Speed-up is baseline latency / variant latency. Its {confidence} interval is a "
            f"bootstrap{drawn} over blocks and sessions; where it cannot exclude \u201cthe same\u201d, the "
            "verdict is indistinguishable."
        ),
        "Quantiles are of the raw samples, kept beside this report. Throughput is batch size / median.",
    ]
    if report["data"] is not None:
        told.append(
            "Accuracy: top-1 on the test split, which nothing was chosen on. The change is paired: the same "
            "images through baseline and variant, McNemar\u2019s test on those that changed sides. "
            f"Intervals are {confidence}."
        )
    return told
