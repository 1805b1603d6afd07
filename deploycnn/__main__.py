"""``python -m deploycnn``."""

from deploycnn.cli import entry

entry()
