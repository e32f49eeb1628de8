"""sam_fast: Sharpness-Aware Minimization for PyTorch with fused kernels.

``from sam_fast import SAM`` replaces the reference implementation; see :class:`SAM`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .batchnorm import disable_running_stats, enable_running_stats, frozen_running_stats
from .norm_layers import norm_layers_only
from .sam import SAM
from .schedule import Schedule
from .snapshot import BatchNormSnapshot
from .train_step import StepResult, TrainStep
from .unwrapping import unwrap

if TYPE_CHECKING:
    from . import sharpness as sharpness
else:

    def __getattr__(name: str) -> Any:
        if name == "sharpness":  # imported when it is used: most programs only train
            return import_module(".sharpness", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), "sharpness"})


__version__ = "0.2.0"

__all__ = [
    "SAM",
    "BatchNormSnapshot",
    "Schedule",
    "StepResult",
    "TrainStep",
    "disable_running_stats",
    "enable_running_stats",
    "frozen_running_stats",
    "norm_layers_only",
    "unwrap",
]
