// Shared by the two files of Gather.
#pragma once

#include "gather.h"

#include <cstring>
#include <utility>

namespace sam {

// ---- DLPack, as far as it is needed (https://dmlc.github.io/dlpack/latest/c_api.html, version 1.x) ------------------

// Where a tensor is and what its elements are: members of DLTensor, compared as bytes.
struct DlKind {
  struct {
    int32_t type;
    int32_t id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
  } dtype;
};
static_assert(sizeof(DlKind) == 16, "no padding");

struct DlTensor {
  void* data;
  DlKind kind;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DlpackExchange {
  struct {
    uint32_t major;
    uint32_t minor;
  } version;
  DlpackExchange* older;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*view)(void* object, DlTensor* out);  // borrows; no synchronization, no reference is taken
  void* current_stream;
};

constexpr uint8_t kFloat = 2, kComplex = 5;  // DLDataTypeCode
constexpr int32_t kHost = 1;                 // DLDeviceType

struct Gather::Record {
  DlKind kind;
  bool empty;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
};

// A tensor's class.
struct Gather::Class {
  PyTypeObject* type;
  bool is_plain;  // its tensors' values are what their memory holds
  // The slots of a wrapper's attributes, null where these are not in slots. They are read directly: looking attributes
  // up costs several times as much.
  PyObject* local_tensor;
  PyObject* spec;
};

// An attribute of `object`; null where it has none, with an exception set.
inline PyObject* attribute(PyObject* object, PyObject* slot, PyObject* name) {
  return slot == nullptr ? PyObject_GetAttr(object, name) : Py_TYPE(slot)->tp_descr_get(slot, object, nullptr);
}

// A reference that this owns, null where Python raised.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {}
  ~Owned() { Py_XDECREF(object_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

inline PyObject* checked(PyObject* object) {
  if (object == nullptr) throw Gather::PythonError{};
  return object;
}

// A tensor, or in place of a wrapper the tensor that has its elements.
class Gather::Local {
 public:
  Local(const Gather& gather, PyObject* tensor) : tensor_(tensor) {
    const Class& of_tensor = gather.class_of(tensor);
    is_plain_ = of_tensor.is_plain;
    if (is_plain_) return;
    owned_ = attribute(tensor, of_tensor.local_tensor, gather.local_tensor_);
    if (owned_ == nullptr) {
      PyErr_Clear();
      return;
    }
    tensor_ = owned_;
    is_plain_ = gather.class_of(owned_).is_plain;
  }
  ~Local() { Py_XDECREF(owned_); }
  Local(const Local&) = delete;
  Local& operator=(const Local&) = delete;
  PyObject* get() const { return tensor_; }
  bool is_plain() const { return is_plain_; }
  bool is_wrapped() const { return owned_ != nullptr; }

 private:
  PyObject* tensor_;
  PyObject* owned_ = nullptr;
  bool is_plain_;
};

// Access to a buffer of n 64-bit numbers, for as long as this lives.
class Numbers {
 public:
  Numbers(PyObject* object, size_t n, int flags, const char* what) {
    if (PyObject_GetBuffer(object, &view_, flags) != 0) throw Gather::PythonError{};
    if (static_cast<size_t>(view_.len) != n * sizeof(uint64_t)) {
      PyBuffer_Release(&view_);
      PyErr_Format(PyExc_ValueError, "%s must hold one 64-bit number for each of %zu", what, n);
      throw Gather::PythonError{};
    }
  }
  ~Numbers() { PyBuffer_Release(&view_); }
  Numbers(const Numbers&) = delete;
  Numbers& operator=(const Numbers&) = delete;
  uint64_t& operator[](size_t i) const { return static_cast<uint64_t*>(view_.buf)[i]; }

 private:
  Py_buffer view_;
};

// The addresses of a column.
class Addresses : public Numbers {
 public:
  Addresses(PyObject* object, size_t n) : Numbers(object, n, PyBUF_WRITABLE, "addresses") {}
};

}  // namespace sam
