"""Frameworks are imported after this."""

import environment  # noqa: F401
