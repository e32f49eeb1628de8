// sam_fast._cpu: addresses of tables (table.h) come in; sam_fast/backends has checked what they point to.
#include "../bindings.h"

#include <stdexcept>

#include "../gather.h"
#include "kernels.h"

namespace py = pybind11;
using sam::pointer;

namespace {

const sam::Kernels* active = sam::select_kernels();

py::list as_list(const std::vector<int64_t>& indices) {
  py::list list;
  for (int64_t index : indices) list.append(index);
  return list;
}

// None where nothing is wrong; else whether it is missing, which tensor's it is, and its name's number.
py::object found_as_tuple(const sam::Gather::Found& found) {
  if (found.wrong == sam::Gather::Wrong::nothing) return py::none();
  return py::make_tuple(found.wrong == sam::Gather::Wrong::missing, found.tensor, found.name);
}

// Passes a Python exception on, as pybind11's error_already_set.
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
  if (kernels == nullptr)
    throw std::invalid_argument("isa '" + isa + "' is unknown or not supported by this processor");
  active = kernels;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "sam_fast's CPU kernels. Use sam_fast.backends, which checks tensors before it takes their addresses.";

  py::class_<sam::Gather>(m, "Gather")
      .def(py::init([](py::object exchange, py::object tensor_class, py::object tensors, py::object params,
                       py::object groups) {
             return translated([&] {
               return std::make_unique<sam::Gather>(exchange.ptr(), tensor_class.ptr(), tensors.ptr(), params.ptr(),
                                                    groups.ptr());
             });
           }),
           py::arg("exchange"), py::arg("tensor_class"), py::arg("tensors"), py::arg("params"), py::arg("groups"))
      .def(
          "weights",
          [](sam::Gather& self, py::handle addresses) {
            return translated([&] { return as_list(self.weights(addresses.ptr())); });
          },
          py::arg("addresses"))
      .def(
          "collect",
          [](sam::Gather& self, py::handle weights, py::handle grads, py::handle wanted) {
            const sam::Gather::Odd odd =
                translated([&] { return self.collect(weights.ptr(), grads.ptr(), wanted.ptr()); });
            return py::make_tuple(as_list(odd.weights), as_list(odd.grads));
          },
          py::arg("weights"), py::arg("grads"), py::arg("wanted") = py::none())
      .def(
          "read",
          [](const sam::Gather& self, py::handle tensors, py::handle addresses) {
            return translated([&] { return as_list(self.read(tensors.ptr(), addresses.ptr())); });
          },
          py::arg("tensors"), py::arg("addresses"))
      .def_property_readonly("moved", &sam::Gather::moved)
      .def_property_readonly("num_grads", &sam::Gather::num_grads)
      .def_property_readonly(
          "has_grad", [](const sam::Gather& self) { return py::bytes(self.has_grad().data(), self.has_grad().size()); })
      .def(
          "states",
          [](sam::Gather& self, py::handle state, py::handle names, py::handle masks, py::handle columns) {
            return translated(
                [&] { return found_as_tuple(self.states(state.ptr(), names.ptr(), masks.ptr(), columns.ptr())); });
          },
          py::arg("state"), py::arg("names"), py::arg("masks"), py::arg("columns"))
      .def(
          "counters",
          [](sam::Gather& self, py::handle state, py::handle name, uint64_t bit, py::handle masks,
             py::handle addresses) {
            sam::Gather::Counters kind = sam::Gather::Counters::none;
            const py::object wrong = translated([&] {
              return found_as_tuple(self.counters(state.ptr(), name.ptr(), bit, masks.ptr(), addresses.ptr(), &kind));
            });
            return py::make_tuple(wrong, py::reinterpret_borrow<py::list>(self.found_counters()),
                                  static_cast<int>(kind));
          },
          py::arg("state"), py::arg("name"), py::arg("bit"), py::arg("masks"), py::arg("addresses"));

  m.def(
      "same_objects",
      [](py::handle a, py::handle b) {
        if (!PyList_Check(a.ptr()) || !PyList_Check(b.ptr())) throw py::type_error("same_objects takes two lists");
        const Py_ssize_t size = PyList_GET_SIZE(a.ptr());
        bool same = PyList_GET_SIZE(b.ptr()) == size;
        for (Py_ssize_t i = 0; same && i < size; ++i) same = PyList_GET_ITEM(a.ptr(), i) == PyList_GET_ITEM(b.ptr(), i);
        return same;
      },
      py::arg("a"), py::arg("b"), "Whether two lists hold the same objects.");

  m.def("grad_norm", [](uint64_t bucket, uint64_t options, uint64_t partials, int threads) {
    py::gil_scoped_release release;
    active->grad_norm(sam::bucket(bucket), pointer<const sam::Group>(options), pointer<double>(partials), threads);
  });

  m.def("perturb", [](uint64_t bucket, uint64_t options, uint64_t partials, int64_t num_partials, double eps,
                      uint64_t norm, std::optional<uint32_t> rounding_key, int threads) {
    py::gil_scoped_release release;
    return active->perturb(sam::bucket(bucket), pointer<const sam::Group>(options), pointer<const double>(partials),
                           num_partials, eps, pointer<double>(norm), sam::rounding(rounding_key), threads);
  });

  m.def("backup", [](uint64_t bucket, int threads) {
    py::gil_scoped_release release;
    active->backup(sam::bucket(bucket), threads);
  });

  m.def("restore", [](uint64_t bucket, bool release_saved, int threads) {
    py::gil_scoped_release release;
    active->restore(sam::bucket(bucket), release_saved, threads);
  });

  m.def("step", [](int index, uint64_t bucket, uint64_t options, double grad_scale,
                   std::optional<uint32_t> rounding_key, int threads) {
    sam::check_step(index);
    py::gil_scoped_release release;
    return active->steps[index](sam::bucket(bucket), pointer<const void>(options), grad_scale,
                                sam::rounding(rounding_key), threads);
  });

  m.def("isa", [] { return active->isa; }, "The instruction set in use: baseline, avx2 or avx512.");
  m.def("use_isa", &use_isa, py::arg("isa"),
        "Use another instruction set that this processor supports (for tests and benchmarks).");

  m.attr("steps") = sam::steps();
#define SAM_FIELD_NAME(type, name) #name,
  m.attr("bucket_fields") = sam::as_tuple({SAM_BUCKET(SAM_FIELD_NAME) "states[0]", "states[1]", "states[2]"});
  m.attr("compiler") = SAM_COMPILER;
  m.attr("sanitizer") = SAM_SANITIZER;
  m.attr("openmp") =
#ifdef _OPENMP
      true;
#else
      false;
#endif
}
