"""Fixtures of this folder."""

from tests.model.accelerator import accelerator

__all__ = ["accelerator"]
