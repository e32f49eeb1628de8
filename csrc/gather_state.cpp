// Gather reads the base optimizer's state.
#include "gather_detail.h"

namespace sam {
namespace {

// One 64-bit number per group.
class Masks {
 public:
  explicit Masks(PyObject* object) {
    if (PyObject_GetBuffer(object, &view_, PyBUF_SIMPLE) != 0) throw Gather::PythonError{};
  }
  ~Masks() { PyBuffer_Release(&view_); }
  Masks(const Masks&) = delete;
  Masks& operator=(const Masks&) = delete;
  uint64_t operator()(int64_t group) const {
    const auto size = static_cast<int64_t>(static_cast<size_t>(view_.len) / sizeof(uint64_t));
    return group < size ? static_cast<const uint64_t*>(view_.buf)[group] : 0;
  }

 private:
  Py_buffer view_;
};

void check_tuple(PyObject* object, const char* what) {
  if (PyTuple_Check(object)) return;
  PyErr_Format(PyExc_TypeError, "%s must be a tuple", what);
  throw Gather::PythonError{};
}

// The value of a state called `name`, borrowed; null where there is none.
PyObject* value_of(PyObject* entry, PyObject* name) {
  if (entry == nullptr || !PyDict_Check(entry)) return nullptr;
  PyObject* value = PyDict_GetItemWithError(entry, name);
  if (value == nullptr && PyErr_Occurred() != nullptr) throw Gather::PythonError{};
  return value;
}

// list[at] = item; `at` is at most the list's length.
void list_at(PyObject* list, Py_ssize_t at, PyObject* item) {
  if (at < PyList_GET_SIZE(list) && PyList_GET_ITEM(list, at) == item) return;
  const bool is_new = at == PyList_GET_SIZE(list);
  if (!is_new) Py_INCREF(item);  // PyList_SetItem takes it over
  if ((is_new ? PyList_Append(list, item) : PyList_SetItem(list, at, item)) != 0) throw Gather::PythonError{};
}

}  // namespace

void Gather::find_entries(PyObject* state) {
  if (!PyDict_Check(state)) {
    PyErr_SetString(PyExc_TypeError, "state must be a dict");
    throw PythonError{};
  }
  const auto size = static_cast<size_t>(PyDict_Size(state));
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  // The dict is walked: looking a tensor up in it would call the tensor's hash, in Python. Mostly the keys are those of
  // the step before, and the places of their tensors are known.
  bool known = size == keys_.size();
  for (size_t k = 0; known && PyDict_Next(state, &position, &key, &value); ++k) known = key == keys_[k];
  if (!known) {
    std::unordered_map<PyObject*, int64_t> numbers;
    for (size_t i = 0; i < records_.size(); ++i) numbers.emplace(param(i), static_cast<int64_t>(i));
    keys_.clear();
    places_.clear();
    for (position = 0; PyDict_Next(state, &position, &key, &value);) {
      keys_.push_back(key);
      const auto found = numbers.find(key);
      places_.push_back(found == numbers.end() ? -1 : found->second);
    }
  }
  entries_.assign(records_.size(), nullptr);
  position = 0;
  for (size_t k = 0; PyDict_Next(state, &position, &key, &value); ++k)
    if (places_[k] >= 0) entries_[static_cast<size_t>(places_[k])] = value;
}

Gather::Found Gather::states(PyObject* state, PyObject* names, PyObject* of_groups, PyObject* columns) {
  check_tuple(names, "names");
  check_tuple(columns, "columns");
  if (PyTuple_GET_SIZE(names) != PyTuple_GET_SIZE(columns)) {
    PyErr_SetString(PyExc_ValueError, "names and columns must have the same length");
    throw PythonError{};
  }
  const Masks masks(of_groups);
  find_entries(state);
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(names); ++k) {
    Addresses addresses(PyTuple_GET_ITEM(columns, k), records_.size());
    for (size_t i = 0; i < records_.size(); ++i) {
      const uint64_t known = std::exchange(addresses[i], 0);
      if (has_grad_[i] == 0 || (masks(groups_[i]) >> k & 1) == 0) continue;
      PyObject* value = value_of(entries_[i], PyTuple_GET_ITEM(names, k));
      if (value == nullptr) return {Wrong::missing, static_cast<int64_t>(i), k};
      const Local local(*this, value);
      if (!matches(local, records_[i], known, &addresses[i])) return {Wrong::odd, static_cast<int64_t>(i), k};
    }
  }
  return {};
}

Gather::Found Gather::counters(PyObject* state, PyObject* name, uint64_t bit, PyObject* of_groups, PyObject* column,
                               Counters* kind) {
  const Masks masks(of_groups);
  Addresses addresses(column, records_.size());
  find_entries(state);
  *kind = Counters::none;
  Py_ssize_t listed = 0;
  for (size_t i = 0; i < records_.size(); ++i) {
    addresses[i] = 0;
    if (has_grad_[i] == 0 || (masks(groups_[i]) & bit) == 0) continue;
    PyObject* value = value_of(entries_[i], name);
    if (value == nullptr) return {Wrong::missing, static_cast<int64_t>(i), 0};
    const Local local(*this, value);
    DlTensor t;
    const bool plain = local.is_plain() && exchange_->view(local.get(), &t) == 0;
    if (PyErr_Occurred() != nullptr) PyErr_Clear();
    const Found odd{Wrong::odd, static_cast<int64_t>(i), 0};
    if (!plain || t.data == nullptr || t.kind.dtype.code != kFloat || t.kind.dtype.lanes != 1) return odd;
    for (int32_t d = 0; d < t.kind.ndim; ++d)
      if (t.shape[d] != 1) return odd;
    const Record& record = records_[i];
    // The counter of a tensor on a device may lie on the host; that of a tensor on the host always does.
    const bool on_host = t.kind.device.type == kHost;
    const bool beside = t.kind.device.type == record.kind.device.type && t.kind.device.id == record.kind.device.id;
    Counters found = Counters::none;
    if (on_host && t.kind.dtype.bits == 32) found = Counters::host_float32;
    if (on_host && t.kind.dtype.bits == 64) found = Counters::host_float64;
    if (!on_host && beside && t.kind.dtype.bits == 32) found = Counters::device_float32;
    if (found == Counters::none || (*kind != Counters::none && *kind != found)) return odd;
    *kind = found;
    addresses[i] = reinterpret_cast<uint64_t>(t.data) + t.byte_offset;
    list_at(counters_, listed++, value);
  }
  if (PyList_SetSlice(counters_, listed, PyList_GET_SIZE(counters_), nullptr) != 0) throw PythonError{};
  return {};
}

}  // namespace sam
