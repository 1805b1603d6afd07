"""A report in which every text that comes from outside tries to break out of where it is put."""

from __future__ import annotations

import copy
from typing import Any

from deploycnn.report.schema import Report, validate
from tests.report.example import example_report

HTML = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'><b>"
MARKDOWN = "|**bold** [link](javascript:alert(1)) `code` <b>html</b> # title\n\n## heading\n| cell"
TERMINAL = "\x1b[31mred\x1b[0m\x07\x9b2J\r\nsecond line\u202e"
HOSTILE = f"{HTML}{MARKDOWN}{TERMINAL} https://evil.example/x www.evil.example"


def hostile_report() -> Report:
    """The example with hostile names, reasons, files, options, records, environment and recipe."""
    report: Any = copy.deepcopy(dict(example_report()))
    new = {variant["name"]: f"{variant['name']}{HOSTILE}" for variant in report["variants"]}
    for variant in report["variants"]:
        variant["name"] = new[variant["name"]]
        variant["passes"] = [f"{name}{HOSTILE}" for name in variant["passes"]]
        variant["why"] += HOSTILE if variant["status"] == "failed" else ""
        variant["precision"] = HOSTILE
        for step in variant["provenance"]:
            step["options"][HOSTILE] = HOSTILE
            step["record"][HOSTILE] = {HOSTILE: [HOSTILE]}
            step["pass"] += HOSTILE
            if "pruning" in step["record"]:
                step["record"]["pruning"]["widths"][HOSTILE] = {"before": [4, 4], "after": [4, 2]}
            for epoch in step["record"].get("training", {}).get("epochs", []):
                epoch[HOSTILE] = 1.0
        if variant["flipped"]:
            variant["flipped"]["right_to_wrong"] = {"count": 3, "names": [HOSTILE]}
    for row in report["measurements"]:
        row["variant"] = new[row["variant"]]
        row["why"] += HOSTILE if row["why"] else ""
        row["disturbance"] = HOSTILE
        row["precision"] = HOSTILE
    report["baseline"]["variant"] = new[report["baseline"]["variant"]]
    report["winner"] = {"variant": new["pruned_int8"], "runtime": "onnxruntime:cpu", "why": HOSTILE}
    report["name"] = report["created"] = HOSTILE
    report["data"]["classes"] = [HOSTILE]
    report["data"]["skipped"] = [{"path": HOSTILE, "why": HOSTILE}]
    report["environment"][HOSTILE] = HOSTILE
    report["warnings"] = [HOSTILE]
    report["recipe"] = f"```\n{HOSTILE}\n````\n"
    report["command"] = HOSTILE
    return validate(report)
