"""Provenance: what passes recorded, as people read it."""

from __future__ import annotations

from deploycnn.report import provenance
from deploycnn.report.html import render_html
from deploycnn.report.markdown import render_markdown
from deploycnn.report.schema import Step
from tests.report.example import example_report


def test_widths_are_output_channels_that_changed() -> None:
    steps = example_report()["variants"][3]["provenance"]
    (found,) = [widths for step in steps if (widths := provenance.widths(step["record"]))]
    assert [(width.before, width.after) for width in found] == [(16, 8)] * 3 + [(32, 16)] * 3 + [(64, 40)] * 3
    assert [(width.before_share, width.kept_share) for width in found[::4]] == [
        (25.0, 50.0),
        (50.0, 50.0),
        (100.0, 62.5),
    ]
    assert not [width for width in found if width.layer == "fc"], "it only reads fewer channels"
    assert "layer3.2.conv1: 64 → 40 channels" in render_html(example_report())


def test_what_is_drawn_is_not_listed_again() -> None:
    step: Step = {
        "pass": "distill",
        "key": "k",
        "options": {},
        "seconds": None,
        "record": {
            "new_thing": {"deep": [1, 2.5, None, True]},
            "training": {"epochs": [{"epoch": 1, "loss": 1.0}], "stopped": "finished"},
            "pruning": {"widths": {}, "macs_ratio": 0.39},
        },
        "warnings": [],
    }
    assert provenance.step_facts(step) == [
        ("training", "stopped: finished"),
        ("pruning", "macs_ratio: 0.39"),
        ("new thing", "deep: 1, 2.5, –, yes"),
    ]


def test_long_records_are_told_key_by_key() -> None:
    inner = {f"layer{index}": "a long reason to be left alone" for index in range(6)}
    found = provenance.nested_facts({"int8": {"method": "minmax", "kept_fp32": inner}, "isa": {"vnni": True}})
    assert found[0] == ("int8: method", "minmax")
    assert found[1] == ("int8: kept fp32: layer0", "a long reason to be left alone")
    assert found[-1] == ("isa", "vnni: yes")


def test_shared_steps_are_told_by_their_first_variant() -> None:
    report = example_report()
    first = provenance.first_use(report)
    pruned, pruned_int8 = report["variants"][2], report["variants"][3]
    assert [first[step["key"]] for step in pruned_int8["provenance"]] == [
        "fp32",
        *["pruned"] * 3,
        "pruned_int8",
    ]
    assert pruned["provenance"] == pruned_int8["provenance"][:4]


def test_flipped_images_beyond_the_list_are_counted() -> None:
    variant = example_report()["variants"][3]
    assert variant["flipped"] is not None
    variant["flipped"]["right_to_wrong"]["count"] = 50
    (first, second) = provenance.flips(variant)
    assert (first[0], len(first[1]), first[2]) == ("50 test images right before, wrong now", 7, 43)
    assert (second[0], second[2]) == ("3 test images wrong before, right now", 0)


def recorded() -> Step:
    from deploycnn.core import Histogram, Table

    table = Table(
        title="layers",
        columns=("layer", "SQNR, dB", "fused", "MACs"),
        rows=(("stem <conv>", 31.256, True, 1_234_567), ("head", None, False, 10)),
    )
    histogram = Histogram(title="stem", start=-2.0, stop=6.0, counts=(1, 0, 16, 1), low=-1.0, high=9.0)
    record = {"tables": [table.to_json()], "histograms": [histogram.to_json()], "scheme": "U8S8"}
    return {"pass": "int8", "key": "k", "options": {}, "seconds": None, "record": record, "warnings": []}


def test_tables_and_histograms_of_any_pass_are_drawn_and_not_listed() -> None:
    step = recorded()
    (table,) = provenance.tables(step["record"])
    assert table.rows == (("stem <conv>", "31.3", "yes", "1,234,567"), ("head", "–", "no", "10"))
    assert table.numeric == (False, True, False, True)
    (histogram,) = provenance.histograms(step["record"])
    # A quarter of the way is left of the range; beyond the last bin it ends with the drawing.
    assert (histogram.low_at, histogram.high_at) == (12.5, 100)
    assert histogram.bars == ((0.0, 25.0, 50.0), (50.0, 25.0, 100.0), (75.0, 25.0, 50.0))
    assert provenance.step_facts(step) == [("scheme", "U8S8")]
    report = example_report()
    report["variants"][1]["provenance"].append(step)
    page = render_html(report)
    assert "stem &lt;conv&gt;" in page
    assert '<td class="n">31.3</td>' in page
    assert "kept −1" in page or "kept -1" in page
    text = render_markdown(report)
    assert "#### layers" in text
    assert "| stem \\<conv\\>" in text
