// Reads and checks the addresses of a bucket's tensors, without libtorch.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

namespace sam {

struct DlpackExchange;  // the part of DLPack's C exchange interface that is used, see gather.cpp

// The tensors of one bucket as they were when it was built. Every step compares the tensors with this record before their addresses are
// handed to a kernel: a tensor that changed its dtype, device, shape or strides is reported, never used.
//
// Throws PythonError with a Python exception set.
class Gather {
 public:
  struct PythonError {};

  // `exchange`: the capsule torch.Tensor.__dlpack_c_exchange_api__; `grad`: the descriptor torch.Tensor.grad; `rows`: a list of strided
  // tensors, kept alive by this object.
  Gather(PyObject* exchange, PyObject* grad, PyObject* rows);
  ~Gather();
  Gather(const Gather&) = delete;
  Gather& operator=(const Gather&) = delete;

  // `addresses`: a writable buffer of one 64-bit number per row, an array("Q").
  // addresses[i] = address of row i, 0 for a row without elements. Returns the rows that are no longer what was recorded (their address is 0).
  std::vector<int64_t> weights(PyObject* addresses) const;

  // addresses[i] = address of row i's .grad, 0 where it is None. Returns the rows whose gradient is not laid out as its row is (sparse, other
  // dtype, device, shape or strides): their address is 0.
  std::vector<int64_t> grads(PyObject* addresses) const;

 private:
  struct Record;
  bool matches(PyObject* tensor, const Record& record, uint64_t* address) const;

  const DlpackExchange* exchange_;
  PyObject* rows_;
  PyObject* grad_;
  std::vector<Record> records_;
};

}  // namespace sam
