"""Every test has a cache of its own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")  # beside tmp_path, which tests use as a dataset's root
    monkeypatch.setenv("DEPLOYCNN_CACHE", str(folder))
    return folder
