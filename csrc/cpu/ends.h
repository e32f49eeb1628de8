// Access to whole vectors, and to what is left of one at the end of a tensor.
#pragma once

#include "simd.h"

namespace sam {
inline namespace SAM_ISA {

// Whole: a whole vector. First: its first elements, at the end of a tensor; the others are read as zero.
struct Whole {
  template <class V>
  inline V load(const void* p) const {
    return sam::load<V>(p);
  }
  template <class V>
  inline void store(void* p, V v) const {
    sam::store(p, v);
  }
};

// With masks if the instruction set has them: copying a few bytes and reading them as a vector would wait until the
// bytes are in memory.
struct First {
  int64_t count;  // may be negative, or more than a vector has

  template <class V>
  inline V load(const void* p) const {
    const size_t bytes = size<V>();
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) return bit_cast<V>(_mm512_maskz_loadu_epi8(mask(bytes), p));
    if constexpr (sizeof(V) == 32) return bit_cast<V>(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(mask(bytes)), p));
    if constexpr (sizeof(V) == 16) return bit_cast<V>(_mm_maskz_loadu_epi8(static_cast<__mmask16>(mask(bytes)), p));
#endif
    V v{};
    std::memcpy(&v, p, bytes);
    return v;
  }

  template <class V>
  inline void store(void* p, V v) const {
    const size_t bytes = size<V>();
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) return _mm512_mask_storeu_epi8(p, mask(bytes), bit_cast<__m512i>(v));
    if constexpr (sizeof(V) == 32)
      return _mm256_mask_storeu_epi8(p, static_cast<__mmask32>(mask(bytes)), bit_cast<__m256i>(v));
#endif
    std::memcpy(p, &v, bytes);
  }

 private:
  template <class V>
  inline size_t size() const {
    constexpr auto element = static_cast<int64_t>(sizeof(V{}[0])), all = static_cast<int64_t>(sizeof(V));
    const int64_t bytes = count * element;
    return static_cast<size_t>(bytes < 0 ? 0 : bytes > all ? all : bytes);
  }
  static inline uint64_t mask(size_t bytes) { return bytes == 64 ? ~uint64_t{0} : (uint64_t{1} << bytes) - 1; }
};

}  // namespace SAM_ISA
}  // namespace sam
