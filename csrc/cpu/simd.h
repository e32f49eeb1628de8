// Vectors of one instruction set. This file is compiled once per instruction set, in a namespace of its own (SAM_ISA).
//
// The GCC/Clang vector extensions give arithmetic, comparison and conversion; intrinsics serve only what they lack
// (streaming stores, fp16 conversion).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../rounding.h"
#include "../table.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace sam {
inline namespace SAM_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int64_t kLineBytes = 64;  // of a cache line: the least that is prefetched

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Vec = typename VectorOf<T, N>::type;

// Storage types of the 16-bit formats: bits only, so that no compiler converts them behind our back.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

// ---- float -> double, N lanes at a time -----------------------------------------------------------------------------

template <int N>
inline Vec<double, N> to_double(Vec<double, N> v) {
  return v;
}

// Intrinsics: GCC's conversion of a generic vector goes by halves.
template <int N>
inline Vec<double, N> to_double(Vec<float, N> v) {
#if defined(__AVX512F__)
  if constexpr (N == 8) return bit_cast<Vec<double, N>>(_mm512_maskz_cvtps_pd(0xff, bit_cast<__m256>(v)));
#endif
#if defined(__AVX2__)
  if constexpr (N == 4) return bit_cast<Vec<double, N>>(_mm256_cvtps_pd(bit_cast<__m128>(v)));
#endif
  return __builtin_convertvector(v, Vec<double, N>);
}

// ---- Elementwise functions ------------------------------------------------------------------------------------------

// a * b + c, rounded once where the instruction set can (as PyTorch's own kernels do there), else twice.
struct MultiplyAdd {
  template <class V>
  static inline V madd(V a, V b, V c) {
    using Element = std::remove_reference_t<decltype(a[0])>;
    [[maybe_unused]] constexpr bool single = std::is_same_v<Element, float>;
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64 && single)
      return bit_cast<V>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
    if constexpr (sizeof(V) == 64 && !single)
      return bit_cast<V>(_mm512_fmadd_pd(bit_cast<__m512d>(a), bit_cast<__m512d>(b), bit_cast<__m512d>(c)));
#endif
#if defined(__FMA__)
    if constexpr (sizeof(V) == 32 && single)
      return bit_cast<V>(_mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
    if constexpr (sizeof(V) == 32 && !single)
      return bit_cast<V>(_mm256_fmadd_pd(bit_cast<__m256d>(a), bit_cast<__m256d>(b), bit_cast<__m256d>(c)));
#endif
#if defined(__aarch64__)
    V sum;
    for (size_t i = 0; i < sizeof(V) / sizeof(Element); ++i) {
      if constexpr (single) sum[i] = __builtin_fmaf(a[i], b[i], c[i]);
      else sum[i] = __builtin_fma(a[i], b[i], c[i]);
    }
    return sum;
#else
    return a * b + c;
#endif
  }
};

// The correctly rounded square root, as the hardware gives it.
template <int N>
inline Vec<float, N> root(Vec<float, N> v) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return bit_cast<Vec<float, N>>(_mm512_maskz_sqrt_ps(0xffff, bit_cast<__m512>(v)));
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) return bit_cast<Vec<float, N>>(_mm256_sqrt_ps(bit_cast<__m256>(v)));
#endif
#if defined(__x86_64__)
  if constexpr (N == 4) return bit_cast<Vec<float, N>>(_mm_sqrt_ps(bit_cast<__m128>(v)));
#endif
  for (int i = 0; i < N; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
template <int N>
inline Vec<double, N> root(Vec<double, N> v) {
#if defined(__AVX512F__)
  if constexpr (N == 8) return bit_cast<Vec<double, N>>(_mm512_maskz_sqrt_pd(0xff, bit_cast<__m512d>(v)));
#endif
#if defined(__AVX2__)
  if constexpr (N == 4) return bit_cast<Vec<double, N>>(_mm256_sqrt_pd(bit_cast<__m256d>(v)));
#endif
#if defined(__x86_64__)
  if constexpr (N == 2) return bit_cast<Vec<double, N>>(_mm_sqrt_pd(bit_cast<__m128d>(v)));
#endif
  for (int i = 0; i < N; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
}

// ---- 16-bit formats <-> float, N lanes at a time --------------------------------------------------------------------

// Intrinsics where GCC's conversion of a generic vector goes by halves.
template <int N>
inline Vec<uint32_t, N> to_uint32(Vec<uint16_t, N> v) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return bit_cast<Vec<uint32_t, N>>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(v)));
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) return bit_cast<Vec<uint32_t, N>>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(v)));
  if constexpr (N == 4)
    return bit_cast<Vec<uint32_t, N>>(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(bit_cast<long long>(v))));
#endif
  return __builtin_convertvector(v, Vec<uint32_t, N>);
}

// The low halves; the high ones must be zero.
template <int N>
inline Vec<uint16_t, N> to_uint16(Vec<uint32_t, N> v) {
#if defined(__AVX2__)
  if constexpr (N == 8) {
    const __m256i wide = bit_cast<__m256i>(v);
    return bit_cast<Vec<uint16_t, N>>(
        _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
  }
#endif
#if defined(__AVX512F__)
  if constexpr (N == 16) return bit_cast<Vec<uint16_t, N>>(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(v)));
#endif
  return __builtin_convertvector(v, Vec<uint16_t, N>);
}

template <int N>
inline Vec<float, N> widen_bf16(Vec<uint16_t, N> h) {
  return bit_cast<Vec<float, N>>(to_uint32<N>(h) << 16);
}

// Round to nearest even; NaN stays NaN (a quiet one) instead of overflowing into infinity.
template <int N>
inline Vec<uint16_t, N> narrow_bf16(Vec<float, N> f) {
  const auto bits = bit_cast<Vec<uint32_t, N>>(f);
  const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto is_nan = f != f;
  return to_uint16<N>(is_nan ? (bits >> 16) | 0x40u : rounded);
}

template <int N>
inline Vec<float, N> widen_f16(Vec<uint16_t, N> h) {
#if defined(__F16C__)
  if constexpr (N == 8) return bit_cast<Vec<float, N>>(_mm256_cvtph_ps(bit_cast<__m128i>(h)));
  if constexpr (N == 4) return bit_cast<Vec<float, N>>(_mm_cvtph_ps(_mm_cvtsi64_si128(bit_cast<int64_t>(h))));
#endif
#if defined(__AVX512F__)
  if constexpr (N == 16) return bit_cast<Vec<float, N>>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(h)));
#endif
  using U = Vec<uint32_t, N>;
  const U wide = to_uint32<N>(h);
  const U magnitude = (wide & 0x7fffu) << 13;
  const U exponent = magnitude & 0x0f800000u;
  const U normal = magnitude + 0x38000000u;      // re-bias the exponent by 127 - 15
  const U inf_or_nan = magnitude + 0x70000000u;  // all exponent bits set
  // A subnormal half is an integer multiple of 2^-24: let the float unit normalize it.
  const U subnormal = bit_cast<U>(bit_cast<Vec<float, N>>(magnitude + 0x38800000u) - 6.103515625e-05f);
  const U quiet = exponent == 0x0f800000u ? inf_or_nan : normal;
  const U value = exponent == 0u ? subnormal : quiet;
  return bit_cast<Vec<float, N>>(value | ((wide & 0x8000u) << 16));
}

// Round to nearest even, gradual underflow, overflow to infinity.
template <int N>
inline Vec<uint16_t, N> narrow_f16(Vec<float, N> f) {
#if defined(__F16C__)
  if constexpr (N == 8)
    return bit_cast<Vec<uint16_t, N>>(_mm256_cvtps_ph(bit_cast<__m256>(f), _MM_FROUND_TO_NEAREST_INT));
  if constexpr (N == 4)
    return bit_cast<Vec<uint16_t, N>>(_mm_cvtsi128_si64(_mm_cvtps_ph(bit_cast<__m128>(f), _MM_FROUND_TO_NEAREST_INT)));
#endif
#if defined(__AVX512F__)
  if constexpr (N == 16)
    return bit_cast<Vec<uint16_t, N>>(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(f), _MM_FROUND_TO_NEAREST_INT));
#endif
  using U = Vec<uint32_t, N>;
  const U bits = bit_cast<U>(f);
  const U sign = bits & 0x80000000u;
  const U magnitude = bits ^ sign;
  // Adding 0.5 aligns a value below 2^-14 so that its last kept bit is the float's last bit: the float unit rounds it.
  const U subnormal = bit_cast<U>(bit_cast<Vec<float, N>>(magnitude) + 0.5f) - 0x3f000000u;
  const U normal = (magnitude + (0xfffu - 0x38000000u) + ((magnitude >> 13) & 1u)) >> 13;
  const U special = magnitude > 0x7f800000u ? U{} + 0x7e00u : U{} + 0x7c00u;
  const U finite = magnitude < 0x38800000u ? subnormal : normal;
  const U value = magnitude >= 0x47800000u ? special : finite;
  return to_uint16<N>(value | (sign >> 16));
}

// ---- Stochastic rounding --------------------------------------------------------------------------------------------

// The random bits of neighbouring elements, the first of which is number `index` in the bucket.
struct RoundingBits {
  uint32_t key;
  uint32_t index;
  RoundingBits at(int64_t i) const { return {key, index + static_cast<uint32_t>(i)}; }
  template <int N>
  Vec<uint32_t, N> draw(Vec<uint32_t, N> value) const {
    Vec<uint32_t, N> positions{};
    for (int i = 0; i < N; ++i) positions[i] = index + static_cast<uint32_t>(i);
    return random_bits(positions, value, key);
  }
};

// ---- Storage: how a dtype lies in memory and in which type it is computed -------------------------------------------

// Compute: the type of the per-element arithmetic. widen / narrow: N stored elements <-> N Compute lanes.
template <class T>
struct Storage;

template <>
struct Storage<float> {
  using Bits = float;
  using Compute = float;
  template <int N>
  static Vec<float, N> widen(Vec<float, N> v) {
    return v;
  }
  template <int N>
  static Vec<float, N> narrow(Vec<float, N> v) {
    return v;
  }
};

template <>
struct Storage<double> {
  using Bits = double;
  using Compute = double;
  template <int N>
  static Vec<double, N> widen(Vec<double, N> v) {
    return v;
  }
  template <int N>
  static Vec<double, N> narrow(Vec<double, N> v) {
    return v;
  }
};

template <>
struct Storage<bf16> {
  using Bits = uint16_t;
  using Compute = float;
  template <int N>
  static Vec<float, N> widen(Vec<uint16_t, N> v) {
    return widen_bf16<N>(v);
  }
  template <int N>
  static Vec<uint16_t, N> narrow(Vec<float, N> v) {
    return narrow_bf16<N>(v);
  }
  template <int N>
  static Vec<uint16_t, N> narrow(Vec<float, N> v, const RoundingBits& random) {
    const auto value = bit_cast<Vec<uint32_t, N>>(v);
    return to_uint16<N>(round_bf16(value, random.template draw<N>(value)));
  }
};

template <>
struct Storage<f16> {
  using Bits = uint16_t;
  using Compute = float;
  template <int N>
  static Vec<float, N> widen(Vec<uint16_t, N> v) {
    return widen_f16<N>(v);
  }
  template <int N>
  static Vec<uint16_t, N> narrow(Vec<float, N> v) {
    return narrow_f16<N>(v);
  }
  template <int N>
  static Vec<uint16_t, N> narrow(Vec<float, N> v, const RoundingBits& random) {
    const auto value = bit_cast<Vec<uint32_t, N>>(v);
    return to_uint16<N>(round_f16(value, random.template draw<N>(value)));
  }
};

template <class T>
constexpr bool kRounded = std::is_same_v<T, bf16> || std::is_same_v<T, f16>;

// call(T{}) for the type of this dtype.
template <class Call>
inline void with_dtype(int64_t dtype, const Call& call) {
  switch (static_cast<DType>(dtype)) {
    case DType::f32:
      return call(float{});
    case DType::f64:
      return call(double{});
    case DType::bf16:
      return call(bf16{});
    case DType::f16:
      return call(f16{});
  }
}

// ---- Streaming stores -----------------------------------------------------------------------------------------------

// Store past the caches: the line is neither read first nor kept. p must be aligned to sizeof(V). Order with
// stream_fence().
template <class V>
inline void stream(void* p, V v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, static_cast<V*>(p));
#elif defined(__x86_64__)
  if constexpr (sizeof(V) == 16) {
    _mm_stream_si128(static_cast<__m128i*>(p), bit_cast<__m128i>(v));
  } else if constexpr (sizeof(V) == 8) {
    _mm_stream_si64(static_cast<long long*>(p), bit_cast<long long>(v));
#if defined(__AVX2__)
  } else if constexpr (sizeof(V) == 32) {
    _mm256_stream_si256(static_cast<__m256i*>(p), bit_cast<__m256i>(v));
#endif
#if defined(__AVX512F__)
  } else if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512(static_cast<__m512i*>(p), bit_cast<__m512i>(v));
#endif
  } else {
    store(p, v);
  }
#else
  store(p, v);
#endif
}

// Buckets of at least this many bytes are written with streaming stores: their backup is next read after a whole
// forward and backward pass.
constexpr int64_t kStreamBytes = int64_t{1} << 20;

inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace SAM_ISA
}  // namespace sam
