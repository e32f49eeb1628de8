// The element types: how their bits widen to the arithmetic's type and narrow again, and how sixteen bytes of them
// move.
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
  static __device__ __forceinline__ Bits round(uint32_t value, uint32_t random) {
    return static_cast<Bits>(round_bf16(value, random));
  }
};

struct f16 {
  using Bits = uint16_t;
  using Compute = float;
  static __device__ __forceinline__ Compute widen(Bits b) { return __half2float(__ushort_as_half(b)); }
  static __device__ __forceinline__ Bits narrow(Compute x) { return __half_as_ushort(__float2half_rn(x)); }
  static __device__ __forceinline__ Bits round(uint32_t value, uint32_t random) {
    return static_cast<Bits>(round_f16(value, random));
  }
};

// A 16-bit format into which new weights are rounded stochastically; all else is as in the format itself.
template <class Format>
struct Stochastic : Format {};

template <class T>
constexpr bool kStochastic = false;
template <class Format>
constexpr bool kStochastic<Stochastic<Format>> = true;

// Where a run of elements begins in the bucket, and the operation's key: what the random bits are made of.
struct RoundingBits {
  uint32_t key;
  uint32_t index;
};

// The bits of a new weight, element i of the run.
template <class T>
__device__ __forceinline__ typename T::Bits narrow_weight(typename T::Compute x,
                                                          [[maybe_unused]] const RoundingBits& random,
                                                          [[maybe_unused]] int i) {
  if constexpr (kStochastic<T>) {
    const uint32_t value = __float_as_uint(x);
    return T::round(value, random_bits(random.index + static_cast<uint32_t>(i), value, random.key));
  } else {
    return T::narrow(x);
  }
}

// call(T{}) for the format of a dtype.
template <class Call>
auto with_dtype(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::f64:
      return call(f64{});
    case DType::bf16:
      return call(bf16{});
    case DType::f16:
      return call(f16{});
    default:
      return call(f32{});
  }
}

// call(T{}) for the format of a dtype and the rounding of its new weights.
template <class Call>
auto with_format(DType dtype, const Rounding& rounding, const Call& call) {
  if (rounding.stochastic && dtype == DType::bf16) return call(Stochastic<bf16>{});
  if (rounding.stochastic && dtype == DType::f16) return call(Stochastic<f16>{});
  return with_dtype(dtype, call);
}

constexpr int kVectorBytes = 16;  // the widest access that every architecture has

// Elements that move in one access of `Bytes` bytes.
template <class Bits, int Bytes>
struct alignas(Bytes) Unit {
  static constexpr int kBytes = Bytes;
  static constexpr int kSize = Bytes / static_cast<int>(sizeof(Bits));
  Bits element[kSize];
};
template <class Bits>
using Vector = Unit<Bits, kVectorBytes>;
template <class Bits>
using Single = Unit<Bits, static_cast<int>(sizeof(Bits))>;

// What the machine moves at once.
template <int Bytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<1> {
  using type = unsigned char;
};

// Loads and stores go through intrinsics: the addresses come out of a table as integers, and plain accesses through
// them would be generic, or split into narrower ones. Everything here is touched once: L1 is bypassed. Last: L2 need
// not keep these bytes either.
template <bool Last, class Word>
__device__ __forceinline__ Word load(const Word* p) {
  return Last ? __ldcs(p) : __ldcg(p);
}

template <bool Last, class Word>
__device__ __forceinline__ void store(Word* p, Word value) {
  if constexpr (Last) __stcs(p, value);
  else __stcg(p, value);
}

// p is aligned to a unit.
template <bool Last, class U, class Bits>
__device__ __forceinline__ U load_unit(const Bits* p) {
  const auto word = load<Last>(reinterpret_cast<const typename WordOf<U::kBytes>::type*>(p));
  U unit;
  memcpy(&unit, &word, sizeof(unit));
  return unit;
}

template <bool Last, class U, class Bits>
__device__ __forceinline__ void store_unit(Bits* p, const U& unit) {
  typename WordOf<U::kBytes>::type word;
  memcpy(&word, &unit, sizeof(word));
  store<Last>(reinterpret_cast<decltype(word)*>(p), word);
}

// Calls part(U{}, 0, whole) for the widest unit U that suits all of `addresses` (or-ed together) and the whole units
// among `count` elements, then part(Single{}, whole, count) for the rest.
template <class Bits, class Part>
__device__ __forceinline__ void in_widest_units(uint64_t addresses, int count, const Part& part) {
  constexpr int kBytes = static_cast<int>(sizeof(Bits));
  if constexpr (kBytes == 8) {  // one or the other: both in a row would take too many registers
    if (addresses % 16 == 0 && count % 2 == 0) part(Vector<Bits>{}, 0, count);
    else part(Single<Bits>{}, 0, count);
  } else {
    int whole = 0;
    const auto take = [&](auto unit) {
      whole = count / decltype(unit)::kSize * decltype(unit)::kSize;
      part(unit, 0, whole);
    };
    if (addresses % 16 == 0) {
      take(Unit<Bits, 16>{});
    } else if (addresses % 8 == 0) {
      take(Unit<Bits, 8>{});
    } else if (kBytes < 4 && addresses % 4 == 0) {
      if constexpr (kBytes < 4) take(Unit<Bits, 4>{});
    } else if (kBytes < 2 && addresses % 2 == 0) {
      if constexpr (kBytes < 2) take(Unit<Bits, 2>{});
    }
    part(Single<Bits>{}, whole, count);
  }
}

}  // namespace sam::cuda
