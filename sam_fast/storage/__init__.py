"""Where the parameters are: in their own memory, in flat buffers, or spread over processes. One protocol, 3 files."""

from __future__ import annotations

from .flat import Flat
from .in_place import InPlace, Member, ProcessGroups
from .sharded import Sharded, is_dtensor, sharded_storage

__all__ = ["Flat", "InPlace", "Member", "ProcessGroups", "Sharded", "is_dtensor", "sharded_storage"]
