"""Interrupting a call at any of the calls that the package makes, or that are made into it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from threading import Lock, RLock
from types import FrameType
from typing import Any

import sam_fast

PACKAGE = str(Path(sam_fast.__file__).parent)
EVENTS = ("call", "return", "c_call", "c_return")
LOCKS = (type(Lock()), type(RLock()))


class Boundaries:
    """Counts the boundaries that a call crosses, and raises ``error`` at the one numbered ``fail_at``."""

    def __init__(self, fail_at: int = -1, error: type[BaseException] = RuntimeError) -> None:
        self.fail_at = fail_at
        self.error = error
        self.crossed = 0
        self.failed = ""

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        inside = frame.f_code.co_filename.startswith(PACKAGE)
        # For Python functions that the package calls, its own and torch's, the calling frame is the package's. Native
        # functions are reported with the package's frame itself.
        if not inside and not (
            event in ("call", "return")
            and frame.f_back is not None
            and frame.f_back.f_code.co_filename.startswith(PACKAGE)
        ):
            return
        if event not in EVENTS or (event == "c_call" and isinstance(getattr(arg, "__self__", None), LOCKS)):
            return  # nothing comes between the end of a with block and the release of its lock
        number, self.crossed = self.crossed, self.crossed + 1
        if number == self.fail_at:
            sys.setprofile(None)
            self.failed = (
                f"{event} of {getattr(arg, '__name__', frame.f_code.co_name)} in {frame.f_code.co_name}, line "
                f"{frame.f_lineno}"
            )
            raise self.error(self.failed)

    def run(self, call: Callable[[], Any]) -> bool:
        """True if the call finished.

        A boundary may lie in a destructor or a callback, where Python reports an exception and goes on.
        """
        sys.setprofile(self._profile)
        try:
            call()
        except self.error as error:
            if str(error) != self.failed:
                raise
            return False
        finally:
            sys.setprofile(None)
        return True
