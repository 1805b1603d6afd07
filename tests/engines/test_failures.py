"""What TensorRT says, cut down to what a user can act on."""

from __future__ import annotations

import pytest

from deploycnn.engines.failures import essence


@pytest.mark.parametrize(
    ("said", "left"),
    [
        (
            "IBuilder::build: Error Code 10: Internal Error (no implementation for node conv1. In f at /src/opt.cpp:4)",
            "Internal Error (no implementation for node conv1.)",
        ),
        (
            "Assertion failed (In parse at /src/ModelImporter.cpp:77): no inputs",
            "Assertion failed: no inputs",
        ),
        ("out of memory at /src/device.cpp:9", "out of memory"),
        ("[network.cpp::addPadding::1520] Error: negative padding.", "Error: negative padding"),
    ],
)
def test_source_locations_go_and_brackets_stay_in_pairs(said: str, left: str) -> None:
    assert essence(said) == left


def test_a_long_message_says_that_it_was_cut() -> None:
    assert essence("x" * 300, 100) == "x" * 97 + "..."
