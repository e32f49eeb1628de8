// sam_fast._cuda: addresses, sizes, dtype codes, the device and its current stream come in; sam_fast/backends/cuda.py has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "kernels.h"
#include "launch.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

sam::cuda::Bucket<sam::Group> bucket(uint64_t rows, int64_t num_rows, uint64_t groups = 0) {
  return {pointer<const sam::Row>(rows), num_rows, pointer<const sam::Group>(groups)};
}

sam::Rounding rounding(std::optional<uint32_t> key) {
  return {key.has_value(), key.value_or(0)};
}

bool large_arguments = true;

// 32 KB of kernel arguments need a driver of CUDA 12.1 or newer.
sam::cuda::Place place(uint64_t stream) {
  static const int driver = [] {
    int version = 0;
    sam::cuda::check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
    return version;
  }();
  return {pointer<std::remove_pointer_t<cudaStream_t>>(stream), large_arguments && driver >= 12010};
}

sam::cuda::UpdateArgs update(uint64_t stream, int dtype, uint64_t rows, int64_t num_rows, uint64_t weights, uint64_t grads, uint64_t saved, uint64_t flat,
                             uint64_t grad_scale, uint64_t found_inf, uint64_t learning_rates, std::optional<uint32_t> rounding_key) {
  return {static_cast<sam::DType>(dtype), pointer<const sam::Row>(rows), num_rows, pointer<const uint64_t>(weights), pointer<const uint64_t>(grads),
          pointer<uint64_t>(saved), pointer<const void>(flat), pointer<const float>(grad_scale), pointer<const float>(found_inf),
          pointer<const sam::LearningRate>(learning_rates), rounding(rounding_key), place(stream)};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "sam_fast's CUDA kernels. Use sam_fast.backends, which checks tensors before it takes their addresses.";

  m.def("probe", [](int device) {
    const sam::cuda::DeviceGuard guard(device);
    sam::cuda::probe();
  });

  m.def("grad_norm_blocks", [](int device, int dtype, uint64_t rows, int64_t num_rows) {
    const sam::cuda::DeviceGuard guard(device);
    return sam::cuda::grad_norm_blocks(static_cast<sam::DType>(dtype), pointer<const sam::Row>(rows), num_rows);
  });

  m.def("grad_norm", [](int device, uint64_t stream, int dtype, uint64_t rows, int64_t num_rows, uint64_t weights, uint64_t grads, uint64_t groups,
                        uint64_t partials, int num_partials) {
    py::gil_scoped_release release;
    const sam::cuda::DeviceGuard guard(device);
    sam::cuda::grad_norm(static_cast<sam::DType>(dtype), bucket(rows, num_rows, groups), pointer<const uint64_t>(weights),
                         pointer<const uint64_t>(grads), pointer<double>(partials), num_partials, place(stream));
  });

  m.def("perturb", [](int device, uint64_t stream, int dtype, uint64_t rows, int64_t num_rows, uint64_t weights, uint64_t grads, uint64_t saved,
                      uint64_t groups, uint64_t partials, int num_partials, double eps, uint64_t norm, uint64_t flat, bool reverse,
                      std::optional<uint32_t> rounding_key) {
    py::gil_scoped_release release;
    const sam::cuda::DeviceGuard guard(device);
    return sam::cuda::perturb(static_cast<sam::DType>(dtype), bucket(rows, num_rows, groups), pointer<const uint64_t>(weights),
                              pointer<const uint64_t>(grads), pointer<uint64_t>(saved), pointer<const double>(partials), num_partials, eps,
                              pointer<double>(norm), pointer<void>(flat), reverse, rounding(rounding_key), place(stream));
  });

  m.def("backup", [](int device, uint64_t stream, int itemsize, uint64_t rows, int64_t num_rows, uint64_t weights, uint64_t saved, uint64_t flat) {
    py::gil_scoped_release release;
    const sam::cuda::DeviceGuard guard(device);
    sam::cuda::backup(itemsize, bucket(rows, num_rows), pointer<const uint64_t>(weights), pointer<uint64_t>(saved), pointer<void>(flat),
                      place(stream));
  });

  m.def("restore", [](int device, uint64_t stream, int itemsize, uint64_t rows, int64_t num_rows, uint64_t weights, uint64_t saved, uint64_t flat,
                      bool release_saved) {
    py::gil_scoped_release release;
    const sam::cuda::DeviceGuard guard(device);
    sam::cuda::restore(itemsize, bucket(rows, num_rows), pointer<const uint64_t>(weights), pointer<uint64_t>(saved), pointer<const void>(flat),
                       release_saved, place(stream));
  });

  m.def("restore_sgd", [](int device, uint64_t stream, int dtype, uint64_t rows, int64_t num_rows, uint64_t weights, uint64_t grads, uint64_t saved,
                          uint64_t flat, uint64_t grad_scale, uint64_t found_inf, uint64_t learning_rates, std::optional<uint32_t> rounding_key,
                          uint64_t groups, uint64_t momentum_buffers) {
    py::gil_scoped_release release;
    const sam::cuda::DeviceGuard guard(device);
    return sam::cuda::restore_sgd({update(stream, dtype, rows, num_rows, weights, grads, saved, flat, grad_scale, found_inf, learning_rates,
                                          rounding_key),
                                   pointer<const sam::SgdGroup>(groups), pointer<const uint64_t>(momentum_buffers)});
  });

  m.def("restore_adam", [](int device, uint64_t stream, int dtype, uint64_t rows, int64_t num_rows, uint64_t weights, uint64_t grads, uint64_t saved,
                           uint64_t flat, uint64_t grad_scale, uint64_t found_inf, uint64_t learning_rates, std::optional<uint32_t> rounding_key,
                           uint64_t groups, bool device_steps, uint64_t steps, uint64_t exp_avgs, uint64_t exp_avg_sqs, uint64_t max_exp_avg_sqs) {
    py::gil_scoped_release release;
    const sam::cuda::DeviceGuard guard(device);
    return sam::cuda::restore_adam({update(stream, dtype, rows, num_rows, weights, grads, saved, flat, grad_scale, found_inf, learning_rates,
                                           rounding_key),
                                    pointer<const sam::AdamGroup>(groups), device_steps, pointer<const uint64_t>(steps),
                                    pointer<const uint64_t>(exp_avgs), pointer<const uint64_t>(exp_avg_sqs),
                                    pointer<const uint64_t>(max_exp_avg_sqs)});
  });

  m.def("use_large_arguments", [](bool use) { large_arguments = use; }, py::arg("use"),
        "False: kernel arguments of 4 KB even where 32 KB are possible (for tests and benchmarks).");

  m.attr("compiler") = SAM_CUDA_COMPILER;
  m.attr("architectures") = SAM_CUDA_ARCHITECTURES;
  m.attr("device_type") = SAM_CUDA_DEVICE_TYPE;
}
