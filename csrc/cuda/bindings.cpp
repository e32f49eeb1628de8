// sam_fast._cuda: addresses of tables (table.h), the device and its current stream come in; sam_fast/backends has
// checked what they point to.
#include "../bindings.h"

#include "kernels.h"
#include "launch.h"

namespace py = pybind11;
using sam::pointer;

namespace {

bool large_arguments = true;

// 32 KB of kernel arguments need a driver of CUDA 12.1 or newer.
sam::cuda::Launch on(uint64_t stream) {
  static const int driver = [] {
    int version = 0;
    sam::cuda::check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
    return version;
  }();
  return {pointer<std::remove_pointer_t<cudaStream_t>>(stream), large_arguments && driver >= 12010};
}

using StepFunction = int64_t (*)(const sam::Bucket&, const void*, const sam::cuda::StepArgs&, sam::cuda::Launch);

#define SAM_STEP_FUNCTION(name, Step) sam::cuda::step<sam::Step>,
constexpr StepFunction kStepFunctions[] = {SAM_STEPS(SAM_STEP_FUNCTION)};

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "sam_fast's CUDA kernels. Use sam_fast.backends, which checks tensors before it takes their addresses.";

  m.def("probe", [](int device) {
    const sam::cuda::DeviceGuard guard(device);
    sam::cuda::probe();
  });

  m.def("grad_norm_blocks", [](int device, uint64_t bucket) {
    const sam::cuda::DeviceGuard guard(device);
    return sam::cuda::grad_norm_blocks(sam::bucket(bucket));
  });

  m.def("grad_norm",
        [](int device, uint64_t stream, uint64_t bucket, uint64_t options, uint64_t partials, int num_partials) {
          py::gil_scoped_release release;
          const sam::cuda::DeviceGuard guard(device);
          sam::cuda::grad_norm(sam::bucket(bucket), pointer<const sam::Group>(options), pointer<double>(partials),
                               num_partials, on(stream));
        });

  m.def("perturb", [](int device, uint64_t stream, uint64_t bucket, uint64_t options, uint64_t partials,
                      int num_partials, double eps, uint64_t norm, bool reverse, std::optional<uint32_t> rounding_key) {
    py::gil_scoped_release release;
    const sam::cuda::DeviceGuard guard(device);
    return sam::cuda::perturb(sam::bucket(bucket), pointer<const sam::Group>(options), pointer<const double>(partials),
                              num_partials, eps, pointer<double>(norm), reverse, sam::rounding(rounding_key),
                              on(stream));
  });

  m.def("backup", [](int device, uint64_t stream, uint64_t bucket) {
    py::gil_scoped_release release;
    const sam::cuda::DeviceGuard guard(device);
    sam::cuda::backup(sam::bucket(bucket), on(stream));
  });

  m.def("restore", [](int device, uint64_t stream, uint64_t bucket, bool release_saved) {
    py::gil_scoped_release release;
    const sam::cuda::DeviceGuard guard(device);
    sam::cuda::restore(sam::bucket(bucket), release_saved, on(stream));
  });

  m.def("step",
        [](int index, int device, uint64_t stream, uint64_t bucket, uint64_t options, uint64_t grad_scale,
           uint64_t found_inf, uint64_t learning_rates, bool device_counters, std::optional<uint32_t> rounding_key) {
          sam::check_step(index);
          py::gil_scoped_release release;
          const sam::cuda::DeviceGuard guard(device);
          const sam::cuda::StepArgs args{pointer<const float>(grad_scale), pointer<const float>(found_inf),
                                         pointer<const sam::LearningRate>(learning_rates), device_counters,
                                         sam::rounding(rounding_key)};
          return kStepFunctions[index](sam::bucket(bucket), pointer<const void>(options), args, on(stream));
        });

  m.def(
      "use_large_arguments", [](bool use) { large_arguments = use; }, py::arg("use"),
      "False: kernel arguments of 4 KB even where 32 KB are possible (for tests and benchmarks).");

  m.attr("steps") = sam::steps();
  m.attr("compiler") = SAM_CUDA_COMPILER;
  m.attr("architectures") = SAM_CUDA_ARCHITECTURES;
  m.attr("device_type") = SAM_CUDA_DEVICE_TYPE;
}
