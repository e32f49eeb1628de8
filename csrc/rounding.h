// Stochastic rounding to the 16-bit formats, stated once for every native backend. sam_fast/rounding.py and
// kernels/rounding.py have the same bits.
//
// A value between two neighbours of the format goes to either, with a probability that makes the result right on
// average; a value that the format has stays. Rounding is counter-based (Salmon et al.,
// https://doi.org/10.1145/2063384.2063405): the random bits are a function of a key, the same for all elements of one
// operation, of the element's position in the bucket, and of the value. The value matters where the key cannot change:
// when a CUDA graph is replayed.
//
// U is an unsigned 32-bit integer or a SIMD vector of them.
#pragma once

#include <cstdint>

#include "sam_math.h"

namespace sam {
#ifdef SAM_ISA
inline namespace SAM_ISA {
#endif

// A bijection that changes every bit of the result with every bit of x: two multiplications by odd numbers between
// shifts (a finalizer in the manner of MurmurHash3; constants of Christopher Wellons's "lowbias32").
template <class U>
SAM_HD U mixed(U x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// index: the element's position in the bucket, modulo 2^32. value: its float32 bits before rounding.
template <class U>
SAM_HD U random_bits(U index, U value, uint32_t key) {
  return mixed(index ^ (value * 0x9e3779b9u) ^ key);
}

// The bfloat16 (in the low half) for a float32's bits. NaN stays NaN, infinity stays infinity.
template <class U>
SAM_HD U round_bf16(U value, U random) {
  const U rounded = (value + (random >> 16)) >> 16;
  return (value & 0x7fffffffu) > 0x7f800000u ? (value >> 16) | 0x40u : rounded;
}

// The float16 (in the low half) for a float32's bits. From 65504, the largest number, on: to nearest.
template <class U>
SAM_HD U round_f16(U value, U random) {
  const U magnitude = value & 0x7fffffffu;
  const U normal =
      ((magnitude + (random >> 19)) >> 13) - 0x1c000u;  // 13 bits go; the exponent is re-biased by 15 - 127
  // Below 2^-14: significand * 2^(exponent - 150) is rounded to a whole number of units of 2^-24. Bits below 2^-31 of a
  // unit are dropped first.
  const U exponent = magnitude >> 23;
  const U significand = (magnitude & 0x7fffffu) | 0x800000u;
  const U drop = 126u - (exponent < 113u ? exponent : U{} + 112u);
  const U over = drop > 31u ? drop - 31u : U{};
  const U shift = drop - over;
  const U kept = significand >> (over < 24u ? over : U{} + 24u);
  const U subnormal = (kept + (random >> (32u - shift))) >> shift;
  const U large = magnitude > 0x7f800000u ? U{} + 0x7e00u : (magnitude < 0x477ff000u ? U{} + 0x7bffu : U{} + 0x7c00u);
  const U finite = magnitude < 0x38800000u ? subnormal : normal;
  return (magnitude < 0x477fe000u ? finite : large) | ((value >> 16) & 0x8000u);
}

#ifdef SAM_ISA
}  // namespace SAM_ISA
#endif
}  // namespace sam
