"""A pytest plugin that puts the emulated CUDA module in the place of ``sam_fast._cuda``: the ``cuda`` backend then takes CPU tensors.

cd tests && SAM_FAST_EMULATED_CUDA=/path/to/_cuda.so python -m pytest -p cuda_emulation.plugin kernels
"""

from __future__ import annotations

import importlib.util
import os
import sys

PATH = os.environ["SAM_FAST_EMULATED_CUDA"]
_spec = importlib.util.spec_from_file_location("sam_fast._cuda", PATH)
assert _spec is not None
assert _spec.loader is not None
sys.modules["sam_fast._cuda"] = importlib.util.module_from_spec(_spec)  # found by `from .. import _cuda` before it looks for a file
_spec.loader.exec_module(sys.modules["sam_fast._cuda"])
