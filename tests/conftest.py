"""Fixtures that several rooms share."""

from __future__ import annotations

from tests.fakes import fake_components

__all__ = ["fake_components"]
