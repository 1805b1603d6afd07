"""Provenance: what passes recorded, as people read it."""

from __future__ import annotations

from deploycnn.report import provenance
from deploycnn.report.html import render_html
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
