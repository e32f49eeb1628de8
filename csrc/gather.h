// Reads and checks the addresses of a bucket's tensors, without libtorch.
#pragma once

#include <Python.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace sam {

struct DlpackExchange;  // the part of DLPack's C exchange interface that is used, see gather.cpp

// The tensors of one bucket as they were when it was built. Every step compares the tensors with this record before
// their addresses are handed to a kernel: a tensor that changed its dtype, device, shape or strides, or whose memory is
// not its value, is reported, never used.
//
// Columns (weights, gradients, a direction, one kind of the base optimizer's state) are arrays with one address per
// tensor, 0 where there is none: writable buffers of 64-bit numbers, array("Q") in Python. Methods that read one return
// the tensors, by number, that do not match the record; their address is 0.
//
// A parameter may be a wrapper (a DTensor). Its elements are then those of another tensor, its attribute _local_tensor.
//
// Throws PythonError with a Python exception set.
class Gather {
 public:
  struct PythonError {};

  // exchange: the capsule torch.Tensor.__dlpack_c_exchange_api__; tensor_class: torch.Tensor. Lists of one length:
  // tensors, strided; params, whose .grad is the gradient and which are the keys of the base optimizer's state; groups,
  // the number of each one's parameter group.
  Gather(PyObject* exchange, PyObject* tensor_class, PyObject* tensors, PyObject* params, PyObject* groups);
  ~Gather();
  Gather(const Gather&) = delete;
  Gather& operator=(const Gather&) = delete;

  // A tensor that still lies where `addresses` says is not asked again whether its memory is its value (is_neg).
  std::vector<int64_t> weights(PyObject* addresses);

  // weights() and the gradients in one walk; a gradient's address is 0 where it is None. wanted: one byte per group, 0
  // where gradients are not looked at; or None. A gradient whose placement over processes is not its parameter's does
  // not match.
  struct Odd {
    std::vector<int64_t> weights;
    std::vector<int64_t> grads;
  };
  Odd collect(PyObject* weights, PyObject* grads, PyObject* wanted);

  // Of the last collect() or weights(): whether a tensor lay elsewhere than `weights` said.
  bool moved() const { return moved_; }

  // Of the last collect(): how many tensors had a gradient, and a byte for each that says whether.
  int64_t num_grads() const { return num_grads_; }
  const std::vector<char>& has_grad() const { return has_grad_; }

  // tensors: a list with a tensor or None for each tensor of the bucket.
  std::vector<int64_t> read(PyObject* tensors, PyObject* addresses) const;

  // What is wrong with the base optimizer's state.
  enum class Wrong { nothing, missing, odd };
  struct Found {
    Wrong wrong = Wrong::nothing;
    int64_t tensor = -1;
    int64_t name = -1;
  };

  // columns[k] = the addresses of state[param][names[k]], for the params that had a gradient at the last collect() and
  // whose group's entry in `masks` has bit k; 0 for the others. state: the base optimizer's, a dict; names: a tuple;
  // masks: a buffer of one 64-bit number per group; columns: a tuple.
  Found states(PyObject* state, PyObject* names, PyObject* masks, PyObject* columns);

  // The same for step counters, tensors of one element. kind: their dtype and whether they are on the host.
  enum class Counters { none, host_float32, host_float64, device_float32 };
  Found counters(PyObject* state, PyObject* name, uint64_t bit, PyObject* masks, PyObject* addresses, Counters* kind);

  // The counters that the last counters() found: one list, which every call fills anew, so that none has to allocate.
  PyObject* found_counters() const { return counters_; }

 private:
  struct Record;
  struct Class;
  class Local;
  bool weight(size_t i, uint64_t* address);
  bool grad(size_t i, uint64_t* address);
  bool matches(const Local& local, const Record& record, uint64_t known, uint64_t* address) const;
  const Class& class_of(PyObject* tensor) const;
  bool is_lazy(PyObject* tensor, const Record& record) const;
  bool placed_alike(size_t i, PyObject* grad, PyObject* param);
  void find_entries(PyObject* state);
  PyObject* param(size_t i) const;

  const DlpackExchange* exchange_ = nullptr;
  PyObject* tensors_ = nullptr;
  PyObject* params_ = nullptr;
  PyObject* grad_ = nullptr;  // attributes of torch.Tensor
  PyObject* is_neg_ = nullptr;
  // The C functions behind grad_ and is_neg_, null if there are none. Every parameter and every new gradient is asked:
  // looking the attributes up, or the descriptors' checks, would cost several percent of that.
  const PyGetSetDef* get_grad_ = nullptr;
  PyCFunction call_is_neg_ = nullptr;
  PyObject* is_conj_ = nullptr;
  PyObject* dispatch_ = nullptr;        // torch.Tensor's __torch_dispatch__; a wrapper's class has another one
  PyObject* torch_dispatch_ = nullptr;  // names
  PyObject* local_tensor_ = nullptr;
  PyObject* spec_ = nullptr;
  PyObject* placements_ = nullptr;
  PyObject* counters_ = nullptr;
  struct Alike {
    PyObject* of_grad;
    PyObject* of_param;
  };
  std::vector<Alike> alike_;  // for each tensor the last placements that were equal, but not one tuple; or null
  mutable std::deque<Class> classes_;  // of the tensors seen so far
  std::vector<Record> records_;
  std::vector<int64_t> groups_;
  std::vector<char> has_grad_;
  int64_t num_grads_ = 0;
  bool moved_ = false;
  std::vector<PyObject*>
      keys_;  // of the base optimizer's state, in order, when it was last read; only compared, never dereferenced
  std::vector<int64_t> places_;     // the tensor of each of them, -1 for none
  std::vector<PyObject*> entries_;  // each tensor's entry, null for none
};

}  // namespace sam
