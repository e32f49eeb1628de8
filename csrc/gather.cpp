#include "gather_detail.h"

namespace sam {

Gather::Gather(PyObject* exchange, PyObject* tensor_class, PyObject* tensors, PyObject* params, PyObject* groups) {
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
  Owned torch_dispatch(checked(PyUnicode_InternFromString("__torch_dispatch__")));
  Owned dispatch(checked(PyObject_GetAttr(tensor_class, torch_dispatch.get())));
  Owned local_tensor(checked(PyUnicode_InternFromString("_local_tensor")));
  Owned spec(checked(PyUnicode_InternFromString("_spec")));
  Owned placements(checked(PyUnicode_InternFromString("placements")));
  if (Py_TYPE(grad.get())->tp_descr_get == nullptr) {
    PyErr_SetString(PyExc_TypeError, "tensor_class must be torch.Tensor, whose grad is a descriptor");
    throw PythonError{};
  }
  if (!PyList_Check(tensors) || !PyList_Check(params) || !PyList_Check(groups)) {
    PyErr_SetString(PyExc_TypeError, "tensors, params and groups must be lists");
    throw PythonError{};
  }
  const Py_ssize_t n = PyList_GET_SIZE(tensors);
  if (PyList_GET_SIZE(params) != n || PyList_GET_SIZE(groups) != n) {
    PyErr_SetString(PyExc_ValueError, "tensors, params and groups must have the same length");
    throw PythonError{};
  }
  records_.reserve(static_cast<size_t>(n));
  for (Py_ssize_t i = 0; i < n; ++i) {
    DlTensor t;
    if (exchange_->view(PyList_GET_ITEM(tensors, i), &t) != 0) throw PythonError{};
    Record record{t.kind, false, {}, {}};
    for (int32_t d = 0; d < t.kind.ndim; ++d) {
      record.empty = record.empty || t.shape[d] == 0;
      record.shape.push_back(t.shape[d]);
      record.strides.push_back(t.strides[d]);
    }
    records_.push_back(std::move(record));
    if (!PyObject_TypeCheck(PyList_GET_ITEM(params, i), reinterpret_cast<PyTypeObject*>(tensor_class))) {
      PyErr_SetString(PyExc_TypeError, "params must be a list of tensors");
      throw PythonError{};
    }
    groups_.push_back(PyLong_AsLongLong(PyList_GET_ITEM(groups, i)));
    if (PyErr_Occurred() == nullptr && groups_.back() < 0)
      PyErr_SetString(PyExc_ValueError, "groups must not be negative");
    if (PyErr_Occurred() != nullptr) throw PythonError{};
  }
  has_grad_.resize(records_.size());
  alike_.resize(records_.size());
  entries_.resize(records_.size());
  Owned counters(checked(PyList_New(0)));
  Owned own_tensors(checked(PyList_GetSlice(tensors, 0, n)));  // lists of our own: nobody else can shorten them
  params_ = checked(PyList_GetSlice(params, 0, n));
  counters_ = counters.release();
  tensors_ = own_tensors.release();
  grad_ = grad.release();
  is_neg_ = is_neg.release();
  is_conj_ = is_conj.release();
  torch_dispatch_ = torch_dispatch.release();
  dispatch_ = dispatch.release();
  local_tensor_ = local_tensor.release();
  spec_ = spec.release();
  placements_ = placements.release();
  if (Py_TYPE(grad_) == &PyGetSetDescr_Type) get_grad_ = reinterpret_cast<PyGetSetDescrObject*>(grad_)->d_getset;
  if (Py_TYPE(is_neg_) == &PyMethodDescr_Type) {
    const PyMethodDef* method = reinterpret_cast<PyMethodDescrObject*>(is_neg_)->d_method;
    if (method->ml_flags == METH_NOARGS) call_is_neg_ = method->ml_meth;
  }
}

Gather::~Gather() {
  for (const Class& known : classes_) {
    Py_DECREF(known.type);
    Py_XDECREF(known.local_tensor);
    Py_XDECREF(known.spec);
  }
  for (PyObject* object : {tensors_, params_, grad_, is_neg_, is_conj_, torch_dispatch_, dispatch_, local_tensor_,
                           spec_, placements_, counters_})
    Py_XDECREF(object);
  for (const Alike& alike : alike_) {
    Py_XDECREF(alike.of_grad);
    Py_XDECREF(alike.of_param);
  }
}

PyObject* Gather::param(size_t i) const { return PyList_GET_ITEM(params_, static_cast<Py_ssize_t>(i)); }

const Gather::Class& Gather::class_of(PyObject* tensor) const {
  PyTypeObject* type = Py_TYPE(tensor);
  for (const Class& known : classes_)
    if (type == known.type) return known;
  const auto of_class = [type](PyObject* name) {
    PyObject* found = PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name);
    if (found == nullptr) PyErr_Clear();
    return found;
  };
  const auto slot = [&](PyObject* name) {
    Owned found(type->tp_getattro == PyObject_GenericGetAttr ? of_class(name) : nullptr);
    return found.get() != nullptr && Py_TYPE(found.get()) == &PyMemberDescr_Type ? found.release() : nullptr;
  };
  const Owned dispatch(of_class(torch_dispatch_));
  Py_INCREF(type);
  classes_.push_back({type, dispatch.get() == dispatch_, slot(local_tensor_), slot(spec_)});
  return classes_.back();
}

bool Gather::is_lazy(PyObject* tensor, const Record& record) const {
  PyObject* negated = call_is_neg_ != nullptr ? call_is_neg_(tensor, nullptr) : PyObject_CallOneArg(is_neg_, tensor);
  Py_DECREF(checked(negated));
  if (negated != Py_False) return true;
  if (record.kind.dtype.code != kComplex) return false;
  const Owned conjugated(checked(PyObject_CallOneArg(is_conj_, tensor)));
  return conjugated.get() != Py_False;
}

bool Gather::matches(const Local& local, const Record& record, uint64_t known, uint64_t* address) const {
  *address = 0;
  if (!local.is_plain()) return false;
  DlTensor t;
  if (exchange_->view(local.get(), &t) != 0) {
    PyErr_Clear();  // not in strided memory: Python's side reports what it is
    return false;
  }
  bool same = std::memcmp(&t.kind, &record.kind, sizeof(DlKind)) == 0;
  for (size_t d = 0; same && d < record.shape.size(); ++d) {
    // The stride of a dimension of size 1 is never used and may be anything.
    same = t.shape[d] == record.shape[d] && (t.strides[d] == record.strides[d] || t.shape[d] == 1 || record.empty);
  }
  if (!same || record.empty) return same;
  if (t.data == nullptr) return false;  // its storage was resized to nothing
  const uint64_t found = reinterpret_cast<uint64_t>(t.data) + t.byte_offset;
  if (found != known && is_lazy(local.get(), record)) return false;
  *address = found;
  return true;
}

bool Gather::placed_alike(size_t i, PyObject* grad, PyObject* param) {
  const Owned spec_of_grad(attribute(grad, class_of(grad).spec, spec_));
  const Owned spec_of_param(attribute(param, class_of(param).spec, spec_));
  PyErr_Clear();
  const bool have_specs = spec_of_grad.get() != nullptr && spec_of_param.get() != nullptr;
  if (have_specs && spec_of_grad.get() == spec_of_param.get()) return true;  // with FSDP2 both have the same
  // DTensor.placements is the spec's, but reading it there calls into Python.
  Owned of_grad(checked(PyObject_GetAttr(have_specs ? spec_of_grad.get() : grad, placements_)));
  Owned of_param(checked(PyObject_GetAttr(have_specs ? spec_of_param.get() : param, placements_)));
  if (of_grad.get() == alike_[i].of_grad && of_param.get() == alike_[i].of_param) return true;
  const int same = PyObject_RichCompareBool(of_grad.get(), of_param.get(), Py_EQ);
  if (same < 0) throw PythonError{};
  if (same == 1 && PyTuple_CheckExact(of_grad.get()) && PyTuple_CheckExact(of_param.get())) {
    Py_XDECREF(std::exchange(alike_[i].of_grad, of_grad.release()));
    Py_XDECREF(std::exchange(alike_[i].of_param, of_param.release()));
  }
  return same == 1;
}

namespace {

// One byte per group, or nothing.
class Wanted {
 public:
  explicit Wanted(PyObject* bytes) {
    if (bytes == Py_None) return;
    if (!PyBytes_Check(bytes)) {
      PyErr_SetString(PyExc_TypeError, "wanted must be None or bytes");
      throw Gather::PythonError{};
    }
    data_ = PyBytes_AS_STRING(bytes);
    size_ = PyBytes_GET_SIZE(bytes);
  }
  bool operator()(int64_t group) const { return data_ == nullptr || (group < size_ && data_[group] != 0); }

 private:
  const char* data_ = nullptr;
  Py_ssize_t size_ = 0;
};

}  // namespace

// Reads the address of one tensor; false if it does not match.
bool Gather::weight(size_t i, uint64_t* address) {
  PyObject* param = this->param(i);
  // A DTensor may have been given another local tensor; a flat buffer is its own parameter.
  PyObject* tensor = PyList_GET_ITEM(tensors_, static_cast<Py_ssize_t>(i));
  const Local local(*this, tensor == param || !class_of(param).is_plain ? param : tensor);
  const uint64_t known = *address;
  const bool same = matches(local, records_[i], known, address);
  moved_ = moved_ || *address != known;
  return same;
}

// Reads the address of one gradient; false if it does not match.
bool Gather::grad(size_t i, uint64_t* address) {
  *address = 0;
  has_grad_[i] = 0;
  PyObject* of = param(i);
  Owned grad(checked(get_grad_ != nullptr
                         ? get_grad_->get(of, get_grad_->closure)
                         : Py_TYPE(grad_)->tp_descr_get(grad_, of, reinterpret_cast<PyObject*>(Py_TYPE(of)))));
  if (grad.get() == Py_None) return true;
  has_grad_[i] = 1;
  ++num_grads_;
  const Local local(*this, grad.get());
  return (!local.is_wrapped() || placed_alike(i, grad.get(), of)) && matches(local, records_[i], 0, address);
}

std::vector<int64_t> Gather::weights(PyObject* column) {
  Addresses addresses(column, records_.size());
  std::vector<int64_t> changed;
  moved_ = false;
  for (size_t i = 0; i < records_.size(); ++i)
    if (!weight(i, &addresses[i])) changed.push_back(static_cast<int64_t>(i));
  return changed;
}

Gather::Odd Gather::collect(PyObject* weights, PyObject* grads, PyObject* wanted_groups) {
  Addresses of_weights(weights, records_.size());
  Addresses of_grads(grads, records_.size());
  const Wanted wanted(wanted_groups);
  Odd odd;
  num_grads_ = 0;
  moved_ = false;
  for (size_t i = 0; i < records_.size(); ++i) {
    if (!weight(i, &of_weights[i])) odd.weights.push_back(static_cast<int64_t>(i));
    if (!wanted(groups_[i])) of_grads[i] = 0, has_grad_[i] = 0;
    else if (!grad(i, &of_grads[i])) odd.grads.push_back(static_cast<int64_t>(i));
  }
  return odd;
}

std::vector<int64_t> Gather::read(PyObject* tensors, PyObject* column) const {
  if (!PyList_Check(tensors) || PyList_GET_SIZE(tensors) != static_cast<Py_ssize_t>(records_.size())) {
    PyErr_Format(PyExc_ValueError, "tensors must be a list with a tensor or None for each of %zu", records_.size());
    throw PythonError{};
  }
  Addresses addresses(column, records_.size());
  std::vector<int64_t> odd;
  for (size_t i = 0; i < records_.size(); ++i) {
    PyObject* tensor = PyList_GET_ITEM(tensors, static_cast<Py_ssize_t>(i));
    const uint64_t known = std::exchange(addresses[i], 0);
    if (tensor == Py_None) continue;
    const Local local(*this, tensor);
    if (!matches(local, records_[i], known, &addresses[i])) odd.push_back(static_cast<int64_t>(i));
  }
  return odd;
}

}  // namespace sam
