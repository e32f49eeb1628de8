"""How sharp is the minimum that a model is in: measured by SAM's own perturbation, by the Hessian, and as a picture.

Every function takes ``model``, ``loss_fn(model, *batch)`` as :class:`sam_fast.TrainStep` has it, and the batches, and
leaves no trace: weights, gradients, running statistics and random state end bit for bit as they were, whatever is
raised. docs/sharpness.md has the formulas and what each measure costs.
"""

from .ascent import Sharpness, rho_sharpness
from .hessian import Eigenvalue, Trace, hessian_eigenvalue, hessian_trace
from .landscape import Line, Plane, filter_normalized, landscape, loss_along, random_direction

__all__ = [
    "Eigenvalue",
    "Line",
    "Plane",
    "Sharpness",
    "Trace",
    "filter_normalized",
    "hessian_eigenvalue",
    "hessian_trace",
    "landscape",
    "loss_along",
    "random_direction",
    "rho_sharpness",
]
