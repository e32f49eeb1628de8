#include "gather.h"

#include <utility>

namespace sam {

// ---- DLPack, as far as it is needed (https://dmlc.github.io/dlpack/latest/c_api.html, version 1.x) --------------------------------------

struct DlTensor {
  void* data;
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

// ---- Gather -----------------------------------------------------------------------------------------------------------------------------

constexpr uint8_t kComplex = 5;  // DLDataTypeCode

struct Gather::Record {
  int32_t device_type;
  int32_t device_id;
  uint8_t dtype_code;
  uint8_t dtype_bits;
  bool empty;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
};

namespace {

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

PyObject* checked(PyObject* object) {
  if (object == nullptr) throw Gather::PythonError{};
  return object;
}

}  // namespace

Gather::Gather(PyObject* exchange, PyObject* tensor_class, PyObject* rows) {
  const auto* found = static_cast<const DlpackExchange*>(PyCapsule_GetPointer(exchange, "dlpack_exchange_api"));
  if (found == nullptr) throw PythonError{};
  while (found != nullptr && found->version.major != 1) found = found->older;
  if (found == nullptr || found->view == nullptr) {
    PyErr_SetString(PyExc_RuntimeError, "this PyTorch offers no DLPack 1.x tensor view");
    throw PythonError{};
  }
  exchange_ = found;
  Owned grad(checked(PyObject_GetAttrString(tensor_class, "grad")));
  Owned is_neg(checked(PyObject_GetAttrString(tensor_class, "is_neg")));
  Owned is_conj(checked(PyObject_GetAttrString(tensor_class, "is_conj")));
  Owned dispatch(checked(PyObject_GetAttrString(tensor_class, "__torch_dispatch__")));
  if (Py_TYPE(grad.get())->tp_descr_get == nullptr) {
    PyErr_SetString(PyExc_TypeError, "tensor_class must be torch.Tensor, whose grad is a descriptor");
    throw PythonError{};
  }
  if (!PyList_Check(rows)) {
    PyErr_SetString(PyExc_TypeError, "rows must be a list of tensors");
    throw PythonError{};
  }
  const Py_ssize_t n = PyList_GET_SIZE(rows);
  records_.reserve(static_cast<size_t>(n));
  for (Py_ssize_t i = 0; i < n; ++i) {
    DlTensor t;
    if (exchange_->view(PyList_GET_ITEM(rows, i), &t) != 0) throw PythonError{};
    Record record{t.device.type, t.device.id, t.dtype.code, t.dtype.bits, false, {}, {}};
    for (int32_t d = 0; d < t.ndim; ++d) {
      record.empty = record.empty || t.shape[d] == 0;
      record.shape.push_back(t.shape[d]);
      record.strides.push_back(t.strides[d]);
    }
    records_.push_back(record);
  }
  rows_ = checked(PyList_GetSlice(rows, 0, n));  // a list of our own: nobody else can shorten it
  grad_ = grad.release();
  is_neg_ = is_neg.release();
  is_conj_ = is_conj.release();
  dispatch_ = dispatch.release();
}

Gather::~Gather() {
  Py_XDECREF(plain_type_);
  for (PyObject* object : {rows_, grad_, is_neg_, is_conj_, dispatch_}) Py_XDECREF(object);
}

bool Gather::has_plain_type(PyObject* tensor) const {
  PyTypeObject* type = Py_TYPE(tensor);
  if (type == plain_type_) return true;
  Owned dispatch(PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__torch_dispatch__"));
  if (dispatch.get() == nullptr) PyErr_Clear();
  if (dispatch.get() != dispatch_) return false;
  Py_INCREF(type);
  Py_XDECREF(plain_type_);
  plain_type_ = type;
  return true;
}

bool Gather::is_lazy(PyObject* tensor, const Record& record) const {
  for (PyObject* asks : {is_neg_, record.dtype_code == kComplex ? is_conj_ : nullptr}) {
    if (asks == nullptr) continue;
    Owned answer(checked(PyObject_CallOneArg(asks, tensor)));
    if (answer.get() != Py_False) return true;
  }
  return false;
}

bool Gather::matches(PyObject* tensor, const Record& record, uint64_t known, uint64_t* address) const {
  *address = 0;
  if (!has_plain_type(tensor)) return false;
  DlTensor t;
  if (exchange_->view(tensor, &t) != 0) {
    PyErr_Clear();  // no strided memory: Python says what it is
    return false;
  }
  bool same = t.device.type == record.device_type && t.device.id == record.device_id && t.dtype.code == record.dtype_code &&
              t.dtype.bits == record.dtype_bits && t.dtype.lanes == 1 && static_cast<size_t>(t.ndim) == record.shape.size();
  for (size_t d = 0; same && d < record.shape.size(); ++d) {
    // The stride of a dimension of size 1 is never used and may be anything.
    same = t.shape[d] == record.shape[d] && (t.strides[d] == record.strides[d] || t.shape[d] == 1 || record.empty);
  }
  if (!same || record.empty) return same;
  if (t.data == nullptr) return false;  // its storage was resized to nothing
  const uint64_t found = reinterpret_cast<uint64_t>(t.data) + t.byte_offset;
  if (found != known && is_lazy(tensor, record)) return false;
  *address = found;
  return true;
}

namespace {

// A writable buffer of n 64-bit numbers, for as long as this lives.
class Addresses {
 public:
  Addresses(PyObject* object, size_t n) {
    if (PyObject_GetBuffer(object, &view_, PyBUF_WRITABLE) != 0) throw Gather::PythonError{};
    if (static_cast<size_t>(view_.len) != n * sizeof(uint64_t)) {
      PyBuffer_Release(&view_);
      PyErr_Format(PyExc_ValueError, "addresses must hold one 64-bit number for each of the %zu rows", n);
      throw Gather::PythonError{};
    }
  }
  ~Addresses() { PyBuffer_Release(&view_); }
  Addresses(const Addresses&) = delete;
  Addresses& operator=(const Addresses&) = delete;
  uint64_t& operator[](size_t i) { return static_cast<uint64_t*>(view_.buf)[i]; }

 private:
  Py_buffer view_;
};

}  // namespace

std::vector<int64_t> Gather::weights(PyObject* table) const {
  Addresses addresses(table, records_.size());
  std::vector<int64_t> changed;
  for (size_t i = 0; i < records_.size(); ++i) {
    PyObject* row = PyList_GET_ITEM(rows_, static_cast<Py_ssize_t>(i));
    if (!matches(row, records_[i], addresses[i], &addresses[i])) changed.push_back(static_cast<int64_t>(i));
  }
  return changed;
}

std::vector<int64_t> Gather::grads(PyObject* table) const {
  Addresses addresses(table, records_.size());
  std::vector<int64_t> odd;
  const descrgetfunc get = Py_TYPE(grad_)->tp_descr_get;
  for (size_t i = 0; i < records_.size(); ++i) {
    addresses[i] = 0;
    PyObject* row = PyList_GET_ITEM(rows_, static_cast<Py_ssize_t>(i));
    PyObject* grad = get(grad_, row, reinterpret_cast<PyObject*>(Py_TYPE(row)));  // row.grad without the search for the attribute
    if (grad == nullptr) throw PythonError{};
    Owned kept(grad);  // by the row as well
    if (grad != Py_None && !matches(grad, records_[i], 0, &addresses[i])) odd.push_back(static_cast<int64_t>(i));
  }
  return odd;
}

}  // namespace sam
