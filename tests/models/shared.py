"""Real third-party files, where the tester has them."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ["DEPLOYCNN_SHARED"]) if os.environ.get("DEPLOYCNN_SHARED") else None

needs_shared = pytest.mark.skipif(SHARED is None, reason="DEPLOYCNN_SHARED is not set")
