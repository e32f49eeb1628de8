"""The one exception the demo turns into a message instead of a traceback."""

from __future__ import annotations


class DemoError(Exception):
    """Something the user can do something about; the text says what."""
