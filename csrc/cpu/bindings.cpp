// sam_fast._cpu: addresses, sizes and dtype codes come in; sam_fast/backends/cpu.py has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "../gather.h"
#include "kernels.h"

namespace py = pybind11;

namespace {

const sam::Kernels* active = sam::select_kernels();

template <class T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

sam::Chunks chunks(uint64_t address, int64_t size) {
  return {pointer<const sam::Chunk>(address), size};
}

sam::Rounding rounding(std::optional<uint32_t> key) {
  return {key.has_value(), key.value_or(0)};
}

sam::UpdateArgs update(int dtype, uint64_t chunk_table, int64_t num_chunks, int64_t num_rows, uint64_t weights, uint64_t grads, uint64_t saved,
                       uint64_t flat, double grad_scale, std::optional<uint32_t> rounding_key, int threads) {
  return {static_cast<sam::DType>(dtype), chunks(chunk_table, num_chunks), num_rows, pointer<const uint64_t>(weights),
          pointer<const uint64_t>(grads), pointer<uint64_t>(saved), pointer<const void>(flat), grad_scale, rounding(rounding_key), threads};
}

py::list as_list(const std::vector<int64_t>& rows) {
  py::list list;
  for (int64_t row : rows) list.append(row);
  return list;
}

// None where nothing is wrong; else whether it is missing, which tensor's it is, and its name's number.
py::object as_tuple(const sam::Gather::Found& found) {
  if (found.wrong == sam::Gather::Wrong::nothing) return py::none();
  return py::make_tuple(found.wrong == sam::Gather::Wrong::missing, found.tensor, found.name);
}

// Python's own exception goes on; pybind11 turns it into error_already_set.
template <class Call>
auto translated(const Call& call) {
  try {
    return call();
  } catch (const sam::Gather::PythonError&) {
    throw py::error_already_set();
  }
}

void use_isa(const std::string& isa) {
  const sam::Kernels* kernels = sam::select_kernels(isa.c_str());
  if (kernels == nullptr) throw std::invalid_argument("isa '" + isa + "' is unknown or not supported by this processor");
  active = kernels;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "sam_fast's CPU kernels. Use sam_fast.backends, which checks tensors before it takes their addresses.";

  py::class_<sam::Gather>(m, "Gather")
      .def(py::init([](py::object exchange, py::object tensor_class, py::object tensors, py::object params, py::object groups) {
             return translated([&] {
               return std::make_unique<sam::Gather>(exchange.ptr(), tensor_class.ptr(), tensors.ptr(), params.ptr(), groups.ptr());
             });
           }),
           py::arg("exchange"), py::arg("tensor_class"), py::arg("tensors"), py::arg("params"), py::arg("groups"))
      .def("weights", [](const sam::Gather& self, py::handle addresses) {
        return translated([&] { return as_list(self.weights(addresses.ptr())); });
      }, py::arg("addresses"))
      .def("collect", [](sam::Gather& self, py::handle weights, py::handle grads, py::handle wanted) {
        const sam::Gather::Odd odd = translated([&] { return self.collect(weights.ptr(), grads.ptr(), wanted.ptr()); });
        return py::make_tuple(as_list(odd.weights), as_list(odd.grads));
      }, py::arg("weights"), py::arg("grads"), py::arg("wanted") = py::none())
      .def("read", [](const sam::Gather& self, py::handle tensors, py::handle addresses) {
        return translated([&] { return as_list(self.read(tensors.ptr(), addresses.ptr())); });
      }, py::arg("tensors"), py::arg("addresses"))
      .def_property_readonly("num_grads", &sam::Gather::num_grads)
      .def_property_readonly("has_grad", [](const sam::Gather& self) { return py::bytes(self.has_grad().data(), self.has_grad().size()); })
      .def("states", [](sam::Gather& self, py::handle state, py::handle names, py::handle masks, py::handle columns) {
        return translated([&] { return as_tuple(self.states(state.ptr(), names.ptr(), masks.ptr(), columns.ptr())); });
      }, py::arg("state"), py::arg("names"), py::arg("masks"), py::arg("columns"))
      .def("counters", [](sam::Gather& self, py::handle state, py::handle name, uint64_t bit, py::handle masks, py::handle addresses) {
        py::list counters;
        sam::Gather::Counters kind = sam::Gather::Counters::none;
        const py::object wrong = translated([&] {
          return as_tuple(self.counters(state.ptr(), name.ptr(), bit, masks.ptr(), addresses.ptr(), counters.ptr(), &kind));
        });
        return py::make_tuple(wrong, counters, static_cast<int>(kind));
      }, py::arg("state"), py::arg("name"), py::arg("bit"), py::arg("masks"), py::arg("addresses"));

  m.def("same_objects", [](py::handle a, py::handle b) {
    if (!PyList_Check(a.ptr()) || !PyList_Check(b.ptr())) throw py::type_error("same_objects takes two lists");
    const Py_ssize_t size = PyList_GET_SIZE(a.ptr());
    bool same = PyList_GET_SIZE(b.ptr()) == size;
    for (Py_ssize_t i = 0; same && i < size; ++i) same = PyList_GET_ITEM(a.ptr(), i) == PyList_GET_ITEM(b.ptr(), i);
    return same;
  }, py::arg("a"), py::arg("b"), "Whether two lists hold the same objects.");

  m.def("grad_norm", [](int dtype, uint64_t chunk_table, int64_t num_chunks, uint64_t weights, uint64_t grads, uint64_t groups,
                        uint64_t partials, int threads) {
    py::gil_scoped_release release;
    active->grad_norm({static_cast<sam::DType>(dtype), chunks(chunk_table, num_chunks), pointer<const uint64_t>(weights),
                       pointer<const uint64_t>(grads), pointer<const sam::Group>(groups), pointer<double>(partials), threads});
  });

  m.def("perturb", [](int dtype, uint64_t chunk_table, int64_t num_chunks, uint64_t weights, uint64_t grads, uint64_t saved, uint64_t groups,
                      uint64_t partials, int64_t num_partials, double eps, uint64_t norm, uint64_t flat, std::optional<uint32_t> rounding_key, int threads) {
    py::gil_scoped_release release;
    return active->perturb({static_cast<sam::DType>(dtype), chunks(chunk_table, num_chunks), pointer<const uint64_t>(weights),
                     pointer<const uint64_t>(grads), pointer<uint64_t>(saved), pointer<const sam::Group>(groups),
                     pointer<const double>(partials), num_partials, eps, pointer<double>(norm), pointer<void>(flat), rounding(rounding_key),
                     threads});
  });

  m.def("backup", [](int64_t itemsize, uint64_t chunk_table, int64_t num_chunks, uint64_t rows, uint64_t saved, uint64_t flat, int threads) {
    py::gil_scoped_release release;
    active->backup({itemsize, chunks(chunk_table, num_chunks), pointer<const uint64_t>(rows), pointer<uint64_t>(saved), pointer<void>(flat),
                    false, threads});
  });

  m.def("restore", [](int64_t itemsize, uint64_t chunk_table, int64_t num_chunks, uint64_t rows, uint64_t saved, uint64_t flat,
                      bool release_saved, int threads) {
    py::gil_scoped_release release;
    active->restore({itemsize, chunks(chunk_table, num_chunks), pointer<const uint64_t>(rows), pointer<uint64_t>(saved), pointer<void>(flat),
                     release_saved, threads});
  });

  m.def("restore_sgd", [](int dtype, uint64_t chunk_table, int64_t num_chunks, int64_t num_rows, uint64_t weights, uint64_t grads, uint64_t saved,
                          uint64_t flat, double grad_scale, std::optional<uint32_t> rounding_key, uint64_t groups, uint64_t momentum_buffers,
                          int threads) {
    py::gil_scoped_release release;
    return active->restore_sgd({update(dtype, chunk_table, num_chunks, num_rows, weights, grads, saved, flat, grad_scale, rounding_key, threads),
                                pointer<const sam::SgdGroup>(groups), pointer<const uint64_t>(momentum_buffers)});
  });

  m.def("restore_adam", [](int dtype, uint64_t chunk_table, int64_t num_chunks, int64_t num_rows, uint64_t weights, uint64_t grads, uint64_t saved,
                           uint64_t flat, double grad_scale, std::optional<uint32_t> rounding_key, uint64_t groups, uint64_t steps, uint64_t exp_avgs, uint64_t exp_avg_sqs,
                           uint64_t max_exp_avg_sqs, int threads) {
    py::gil_scoped_release release;
    return active->restore_adam({update(dtype, chunk_table, num_chunks, num_rows, weights, grads, saved, flat, grad_scale, rounding_key, threads),
                                 pointer<const sam::AdamGroup>(groups), pointer<const uint64_t>(steps), pointer<const uint64_t>(exp_avgs),
                                 pointer<const uint64_t>(exp_avg_sqs), pointer<const uint64_t>(max_exp_avg_sqs)});
  });

  m.def("isa", [] { return active->isa; }, "The instruction set in use: baseline, avx2 or avx512.");
  m.def("use_isa", &use_isa, py::arg("isa"), "Use another instruction set that this processor supports (for tests and benchmarks).");

  m.attr("compiler") = SAM_COMPILER;
  m.attr("sanitizer") = SAM_SANITIZER;
  m.attr("openmp") =
#ifdef _OPENMP
      true;
#else
      false;
#endif
}
