// The element types: how their bits widen to the arithmetic's type and narrow again, and how sixteen bytes of them move.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../rounding.h"
#include "../table.h"

namespace sam::cuda {

template <class Float>
struct Native {
  using Bits = Float;
  using Compute = Float;
  static __device__ __forceinline__ Compute widen(Bits b) { return b; }
  static __device__ __forceinline__ Bits narrow(Compute x) { return x; }
};
using f32 = Native<float>;
using f64 = Native<double>;

struct bf16 {
  using Bits = uint16_t;
  using Compute = float;
  static __device__ __forceinline__ Compute widen(Bits b) { return __bfloat162float(__ushort_as_bfloat16(b)); }
  static __device__ __forceinline__ Bits narrow(Compute x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
  static __device__ __forceinline__ Bits round(uint32_t value, uint32_t random) { return static_cast<Bits>(round_bf16(value, random)); }
};

struct f16 {
  using Bits = uint16_t;
  using Compute = float;
  static __device__ __forceinline__ Compute widen(Bits b) { return __half2float(__ushort_as_half(b)); }
  static __device__ __forceinline__ Bits narrow(Compute x) { return __half_as_ushort(__float2half_rn(x)); }
  static __device__ __forceinline__ Bits round(uint32_t value, uint32_t random) { return static_cast<Bits>(round_f16(value, random)); }
};

// A 16-bit format into which new weights are rounded stochastically; all else is as in the format itself.
template <class Format>
struct Stochastic : Format {};

template <class T>
constexpr bool kStochastic = false;
template <class Format>
constexpr bool kStochastic<Stochastic<Format>> = true;

// Where a run of elements begins in the bucket, and the operation's key: what the random bits are made of.
struct Dice {
  uint32_t key;
  uint32_t index;
};

// The bits of a new weight, element i of the run.
template <class T>
__device__ __forceinline__ typename T::Bits narrow_weight(typename T::Compute x, [[maybe_unused]] const Dice& dice, [[maybe_unused]] int i) {
  if constexpr (kStochastic<T>) {
    const uint32_t value = __float_as_uint(x);
    return T::round(value, random_bits(dice.index + static_cast<uint32_t>(i), value, dice.key));
  } else {
    return T::narrow(x);
  }
}

// call(T{}) for the format of a dtype, and of the rounding of its new weights.
template <class Call>
auto with_format(DType dtype, const Rounding& rounding, const Call& call) {
  switch (dtype) {
    case DType::f64: return call(f64{});
    case DType::bf16: return rounding.stochastic ? call(Stochastic<bf16>{}) : call(bf16{});
    case DType::f16: return rounding.stochastic ? call(Stochastic<f16>{}) : call(f16{});
    default: return call(f32{});
  }
}

constexpr int kVectorBytes = 16;  // the widest access that every architecture has

// Sixteen bytes of elements.
template <class Bits>
struct alignas(kVectorBytes) Vector {
  static constexpr int kSize = kVectorBytes / static_cast<int>(sizeof(Bits));
  Bits element[kSize];
};

// Loads and stores go through intrinsics: the addresses come out of a table as integers, and plain accesses through them would be generic, or
// split into narrower ones. Everything here is touched once: L1 is bypassed. Last: L2 need not keep these bytes either.
template <bool Last, class Unit>
__device__ __forceinline__ Unit load(const Unit* p) {
  return Last ? __ldcs(p) : __ldcg(p);
}

template <bool Last, class Unit>
__device__ __forceinline__ void store(Unit* p, Unit value) {
  if constexpr (Last) __stcs(p, value);
  else __stcg(p, value);
}

// p is aligned to 16 bytes.
template <bool Last, class Bits>
__device__ __forceinline__ Vector<Bits> load_vector(const Bits* p) {
  const uint4 raw = load<Last>(reinterpret_cast<const uint4*>(p));
  Vector<Bits> v;
  memcpy(&v, &raw, sizeof(v));
  return v;
}

template <bool Last, class Bits>
__device__ __forceinline__ void store_vector(Bits* p, const Vector<Bits>& v) {
  uint4 raw;
  memcpy(&raw, &v, sizeof(v));
  store<Last>(reinterpret_cast<uint4*>(p), raw);
}

}  // namespace sam::cuda
