// For tests only, see cuda_runtime.h: IEEE half precision through the compiler's own _Float16.
#pragma once

#include "cuda_runtime.h"

struct __half {
  _Float16 value;
};

inline __half __ushort_as_half(unsigned short bits) {
  __half h;
  std::memcpy(&h, &bits, sizeof(h));
  return h;
}
inline unsigned short __half_as_ushort(__half h) {
  unsigned short bits;
  std::memcpy(&bits, &h, sizeof(bits));
  return bits;
}
inline float __half2float(__half h) { return static_cast<float>(h.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
