"""The page: its numbers are the JSON's, nothing breaks out of it, and it loads nothing."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from deploycnn.errors import ArtifactError
from deploycnn.report.html import render_html
from tests.report.example import example_report
from tests.report.hostile import hostile_report

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, and the text of all of them; fails on badly nested tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self) -> str:
        return " ".join(" ".join(data for tag, data in self.texts if tag not in ("style", "script")).split())


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render_html(example_report()))


def test_the_headline_says_it_in_plain_words(page: Page) -> None:
    text = page.text()
    assert "pruned_int8 is 3.1x faster (2.9–3.3) than fp32 on onnxruntime:cpu at batch 1, 1 thread" in text
    assert "top-1 −0.9 points (−2.4 … +0.6), n = 450 test images; within budget, but" in text


def test_every_number_of_the_summary_is_the_one_in_the_json(page: Page) -> None:
    found: dict[str, dict[str, str]] = {}
    for tag, attributes in page.elements:
        if tag == "tr":
            row = found.setdefault(attributes.get("data-variant", ""), {})
        elif tag == "td" and "data-key" in attributes:
            row[attributes["data-key"]] = attributes["data-value"]
    for variant in example_report()["variants"]:
        if variant["status"] != "measured":
            continue
        row = found[variant["name"]]
        assert float(row["top1"]) == variant["top1"]
        assert float(row["change"]) == variant["top1_drop"]
        assert int(row["size"]) == variant["size_bytes"]
        assert int(row["macs"]) == variant["macs"]
        for batch in ("1", "64"):
            assert float(row[f"latency:{batch}"]) == variant["latency_ms"][batch]["median"]
            assert float(row[f"speedup:{batch}"]) == variant["speedup"][batch]["ratio"]


def test_every_measured_row_stands_there_with_its_exact_values(page: Page) -> None:
    found: dict[str, list[float]] = {}
    for tag, attributes in page.elements:
        if tag == "tr":
            row = found.setdefault(attributes.get("data-id", ""), [])
        elif tag == "td" and "data-value" in attributes and "data-key" not in attributes:
            row.append(float(attributes["data-value"]))
    measured = [row for row in example_report()["measurements"] if row["status"] == "measured"]
    assert measured
    for row in measured:
        keys = ("median_ms", "p90_ms", "p99_ms", "throughput_ips", "ratio")
        assert found[row["id"]] == [row[key] for key in keys]


def test_the_page_carries_the_whole_report(page: Page) -> None:
    payload = "".join(data for tag, data in page.texts if tag == "script")
    assert json.loads(payload) == example_report()


def test_what_was_not_measured_stands_there_with_its_reason(page: Page) -> None:
    text = page.text()
    assert "parity 0.31 exceeds the tolerance" in text
    assert "onnxruntime:cuda not measured CUDAExecutionProvider is not in this onnxruntime build" in text


@pytest.mark.parametrize("make", [example_report, hostile_report])
def test_the_page_loads_nothing_and_runs_nothing(make: Any) -> None:
    text = render_html(make())
    parsed = Page(text)
    assert not parsed.open
    policy = [a["content"] for tag, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    for tag, attributes in parsed.elements:
        assert tag not in {
            "img",
            "link",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
            "video",
            "audio",
            "a",
            "b0",
        }
        assert tag != "script" or attributes.get("type") == "application/json"
        assert not {name for name in attributes if name.startswith("on")}
        assert not {"src", "href", "srcset", "xlink:href", "data", "action"} & attributes.keys()
    style = "".join(data for tag, data in parsed.texts if tag == "style")
    assert "url(" not in style
    assert "@import" not in style


def test_hostile_strings_are_shown_not_obeyed() -> None:
    hostile = hostile_report()
    parsed = Page(render_html(hostile))
    assert sum(tag == "script" for tag, _ in parsed.elements) == 1
    assert not any("bold" in tag or "evil" in tag for tag, _ in parsed.elements)
    assert "<script>alert(1)</script>" in parsed.text()
    payload = "".join(data for tag, data in parsed.texts if tag == "script")
    assert json.loads(payload) == hostile


def test_a_page_without_data_budget_winner_and_samples_renders() -> None:
    report: Any = copy.deepcopy(dict(example_report()))
    report.update(data=None, budget=None, winner=None, why_no_winner="no data, so no accuracy", warnings=[])
    del report["method"], report["recipe"], report["command"]
    for variant in report["variants"]:
        for key in ("top1", "top1_interval", "top1_drop", "top1_drop_interval", "flipped", "within_budget"):
            variant[key] = None
    for row in report["measurements"]:
        row["samples"] = row["median_interval_ms"] = None
    parsed = Page(render_html(report))
    assert "No variant wins: no data, so no accuracy" in parsed.text()
    assert not any(attributes.get("id") == "pareto" for _, attributes in parsed.elements)
    assert not re.search(r"\bNone\b|\bnan\b", parsed.text())


def test_a_baseline_alone_renders() -> None:
    report: Any = copy.deepcopy(dict(example_report()))
    report["variants"] = report["variants"][:1]
    report["measurements"] = [row for row in report["measurements"] if row["variant"] == "fp32"][:1]
    report["winner"] = {"variant": "fp32", "runtime": "onnxruntime:cpu", "why": "there is no other"}
    assert "fp32 is the baseline, on onnxruntime:cpu at batch 1, 1 thread" in Page(render_html(report)).text()


def test_a_foreign_report_is_refused() -> None:
    with pytest.raises(ArtifactError, match="schema_version is 7"):
        render_html({"schema_version": 7})
