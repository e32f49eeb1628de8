// Shared by the bindings of both native modules: turns the numbers that Python passes into what kernels take.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "steps.h"
#include "table.h"

namespace sam {

template <class T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

inline const Bucket& bucket(uint64_t address) { return *pointer<const Bucket>(address); }

inline Rounding rounding(std::optional<uint32_t> key) { return {key.has_value(), key.value_or(0)}; }

template <size_t N>
pybind11::tuple as_tuple(const char* const (&names)[N]) {
  pybind11::tuple tuple(N);
  for (size_t i = 0; i < N; ++i) tuple[i] = pybind11::str(names[i]);
  return tuple;
}

// name -> (index, names of the options, names of the state, whether it counts steps), as in SAM_STEPS.
inline pybind11::dict steps() {
  pybind11::dict found;
#define SAM_DESCRIBE_STEP(name, Step) \
  found[#name] = pybind11::make_tuple(found.size(), as_tuple(Step::kOptions), as_tuple(Step::kStates), Step::kCounts);
  SAM_STEPS(SAM_DESCRIBE_STEP)
#undef SAM_DESCRIBE_STEP
  return found;
}

inline void check_step(int index) {
  if (index < 0 || index >= kNumSteps) throw pybind11::index_error("there is no step " + std::to_string(index));
}

}  // namespace sam
