"""``deploycnn passes`` and ``inspect`` fit a terminal of 80 columns."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from deploycnn import registry
from deploycnn.cli import inspect, passes

NAMES = [
    *(name for kind in registry.KINDS for name in registry.names(kind)),
    "profile",
    "preprocessing",
    "augment",
]


@pytest.mark.parametrize("arguments", [[], *([name] for name in NAMES)])
def test_lines_fit_and_every_option_is_told(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(passes.command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert max(len(line) for line in result.output.splitlines()) <= 80
    words = result.output.split()
    assert set(arguments or NAMES) <= set(words)


@pytest.mark.parametrize(
    "model", ["zoo:resnet20", "torchvision:densenet121", "torchvision:mobilenet_v3_small"]
)
def test_long_names_of_layers_fit(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(inspect.command, [model], catch_exceptions=False)
    assert result.exit_code == 0
    assert max(len(line) for line in result.output.splitlines()) <= 80
