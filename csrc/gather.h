// Reads and checks the addresses of a bucket's tensors, without libtorch.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

namespace sam {

struct DlpackExchange;  // the part of DLPack's C exchange interface that is used, see gather.cpp

// The tensors of one bucket as they were when it was built. Every step compares the tensors with this record before their addresses are
// handed to a kernel: a tensor that changed its dtype, device, shape or strides, or whose memory is not its value, is reported, never used.
//
// Throws PythonError with a Python exception set.
class Gather {
 public:
  struct PythonError {};

  // `exchange`: the capsule torch.Tensor.__dlpack_c_exchange_api__; `tensor_class`: torch.Tensor; `rows`: a list of strided tensors, kept
  // alive by this object.
  Gather(PyObject* exchange, PyObject* tensor_class, PyObject* rows);
  ~Gather();
  Gather(const Gather&) = delete;
  Gather& operator=(const Gather&) = delete;

  // `addresses`: a writable buffer of one 64-bit number per row, an array("Q").
  // addresses[i] = address of row i, 0 for a row without elements. Returns the rows that are no longer what was recorded (their address is 0).
  // A row that lies where `addresses` says already is not asked again whether its memory is its value.
  std::vector<int64_t> weights(PyObject* addresses) const;

  // addresses[i] = address of row i's .grad, 0 where it is None. Returns the rows whose gradient is not laid out as its row is (sparse, other
  // dtype, device, shape or strides) or whose memory is not its value (lazily negated, a wrapper subclass): their address is 0.
  std::vector<int64_t> grads(PyObject* addresses) const;

 private:
  struct Record;
  bool matches(PyObject* tensor, const Record& record, uint64_t known, uint64_t* address) const;
  bool has_plain_type(PyObject* tensor) const;
  bool is_lazy(PyObject* tensor, const Record& record) const;

  const DlpackExchange* exchange_ = nullptr;
  PyObject* rows_ = nullptr;
  PyObject* grad_ = nullptr;      // attributes of torch.Tensor
  PyObject* is_neg_ = nullptr;
  PyObject* is_conj_ = nullptr;
  PyObject* dispatch_ = nullptr;  // its __torch_dispatch__, that of every class whose tensors are their memory
  mutable PyTypeObject* plain_type_ = nullptr;  // the last class that was found to be one of these
  std::vector<Record> records_;
};

}  // namespace sam
