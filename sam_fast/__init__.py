"""sam_fast: Sharpness-Aware Minimization for PyTorch with fused kernels.

``from sam_fast import SAM`` replaces the reference implementation; see :class:`SAM`.
"""

from .batchnorm import disable_running_stats, enable_running_stats, frozen_running_stats
from .sam import SAM
from .snapshot import BatchNormSnapshot

__version__ = "0.1.0"

__all__ = ["SAM", "BatchNormSnapshot", "disable_running_stats", "enable_running_stats", "frozen_running_stats"]
