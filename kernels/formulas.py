"""The per-element formulas of SAM and ASAM, as in csrc/sam_math.h, and what every formula needs.

Compile with ``enable_fp_fusion=False`` where the CPU kernels' bits are wanted.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def asam_t(w, eta):
    """ASAM's normalization operator T."""
    return tl.abs(w) + eta


@triton.jit
def norm_term(g):
    """The term whose square is summed into the squared norm."""
    return g


@triton.jit
def norm_term_adaptive(w, g, eta):
    return asam_t(w, eta) * g


@triton.jit
def perturbed(w, g, scale):
    """w + e, given scale = rho / (||T g|| + eps)."""
    return w + g * scale


@triton.jit
def perturbed_adaptive(w, g, eta, scale):
    t = asam_t(w, eta)
    return w + ((t * g) * scale) * t


@triton.jit
def can_perturb(norm):
    """True if a first pass with this norm may perturb: an infinite or NaN norm has no direction."""
    return norm < float("inf")


@triton.jit
def perturb_scale(norm, rho, eps, COMPUTE: tl.constexpr):
    """rho / (norm + eps) in the arithmetic's dtype.

    0 where norm and eps are both 0; at most that dtype's largest finite number.
    """
    most: tl.constexpr = 3.4028234663852886e38 if COMPUTE == tl.float32 else 1.7976931348623157e308
    divisor = norm + eps
    scale = tl.where(divisor > 0.0, rho, 0.0) / tl.where(divisor > 0.0, divisor, 1.0)
    return tl.where(scale > most, most, tl.where(scale < -most, -most, scale)).to(COMPUTE)


@triton.jit
def widen(x, COMPUTE: tl.constexpr):
    """``x`` in the dtype of the arithmetic; exact."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        # The interpreter's own conversions of bfloat16 are wrong for subnormal numbers, and truncate in the other
        # direction.
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(COMPUTE)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """``x`` in the tensors' dtype, rounded to nearest, ties to even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def load(pointers, mask, COMPUTE: tl.constexpr):
    """A block in the dtype of the arithmetic."""
    return widen(tl.load(pointers, mask=mask), COMPUTE)


@triton.jit
def store(pointers, mask, x):
    """A block in the dtype of its tensor, rounded to nearest."""
    tl.store(pointers, narrow(x, pointers.dtype.element_ty), mask=mask)


@triton.jit
def divide(x, y):
    """x / y, correctly rounded; the plain quotient of float32 is not."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def root(x):
    """The correctly rounded square root."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def lerp(a, b, weight):
    """torch.lerp, which starts from the nearer end."""
    from_a = weight < 0.5
    return tl.fma(tl.where(from_a, weight, weight - 1.0), b - a, tl.where(from_a, a, b))
