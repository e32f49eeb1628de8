"""Where the parameters' memory is: as it lies, in flat buffers, or spread over processes. One protocol, three files."""

from __future__ import annotations

from .flat import Flat
from .in_place import InPlace, Member, ProcessGroups
from .sharded import Sharded, is_dtensor, sharded

__all__ = ["Flat", "InPlace", "Member", "ProcessGroups", "Sharded", "is_dtensor", "sharded"]
