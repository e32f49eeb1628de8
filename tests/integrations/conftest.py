"""Prepares the environment before any framework is imported."""

import environment  # noqa: F401
