"""A pytest plugin that puts the emulated CUDA module where ``sam_fast._cuda`` is looked for: the ``cuda`` backend then
takes CPU tensors.

cd tests && SAM_FAST_EMULATED_CUDA=/path/to/_cuda.so python -m pytest -p cuda_emulation.plugin kernels
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
PATH = os.environ["SAM_FAST_EMULATED_CUDA"]
_spec = importlib.util.spec_from_file_location("sam_fast._cuda", PATH)
assert _spec is not None
assert _spec.loader is not None
# found by `from .. import _cuda` before it looks for a file
sys.modules["sam_fast._cuda"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["sam_fast._cuda"])


def share(path: str) -> int:
    """Tell the emulation where the __shared__ variables are, which are static there, so that it can poison them.

    Returns their number.
    """
    names = {
        name for source in CSRC.iterdir() for name in re.findall(r"__shared__ [\w<>: ]+ (\w+)\[", source.read_text())
    }
    listed = subprocess.run(["nm", "--print-size", path], capture_output=True, text=True, check=True).stdout
    symbols = {
        name: (int(address, 16), int(size, 16))
        for address, size, name in re.findall(r"^(\w+) (\w+) \w (\S+)$", listed, re.M)
    }
    library = ctypes.CDLL(path)
    library.sam_emulation_share.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    anchor = "sam_emulation_launches"
    base = ctypes.addressof(ctypes.c_int64.in_dll(library, anchor)) - symbols[anchor][0]
    found = [
        symbol
        for name, symbol in symbols.items()
        if re.match(r"_ZZN", name) and re.search(rf"E\d+({'|'.join(names)})$", name)
    ]
    for address, size in found:
        library.sam_emulation_share(base + address, size)
    return len(found)


SHARED = 0 if os.environ.get("SAM_FAST_EMULATED_SHARED") == "kept" else share(PATH)
"""How many variables are poisoned. Each operation, dtype and size of arguments has variables of its own.

``SAM_FAST_EMULATED_SHARED=kept``: none.
"""
