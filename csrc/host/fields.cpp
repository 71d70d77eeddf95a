#include "fields.h"
// Python.h comes first.
#include <limits>

namespace fastlora {

namespace {

// Whether a conversion of Python's that may have failed has not.
bool converted() {
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

bool read(PyObject* value, bool& field) {
  field = value == Py_True;
  return field || value == Py_False;
}

bool read(PyObject* value, int64_t& field) {
  field = PyLong_AsLongLong(value);
  return converted();
}

bool read(PyObject* value, int& field) {
  int64_t wide;
  if (!read(value, wide) || wide != int(wide)) return false;
  field = int(wide);
  return true;
}

bool read(PyObject* value, uint64_t& field) {
  field = PyLong_AsUnsignedLongLong(value);
  return converted();
}

bool read(PyObject* value, uint32_t& field) {
  uint64_t wide;
  if (!read(value, wide) || wide > std::numeric_limits<uint32_t>::max()) return false;
  field = uint32_t(wide);
  return true;
}

bool read(PyObject* value, double& field) {
  field = PyFloat_AsDouble(value);
  return converted();
}

// Formats are given by their names.
template <class Format, int kCount>
bool read_name(PyObject* value, Format& field, const char* const (&names)[kCount]) {
  for (int i = 0; PyUnicode_Check(value) && i < kCount; ++i) {
    if (text_of(value) != names[i]) continue;
    field = Format(i);
    return true;
  }
  return false;
}

bool read(PyObject* value, CodeFormat& field) {
  return read_name(value, field, {"none", "nf4", "fp4", "int8", "float8_e4m3fn", "float8_e5m2"});
}

bool read(PyObject* value, ScaleFormat& field) {
  return read_name(value, field, {"float32", "float16", "bfloat16", "nested"});
}

bool read(PyObject* value, Matrix& field) {
  return PyTuple_Check(value) && PyTuple_Size(value) == 2 && read(PyTuple_GetItem(value, 0), field.address) &&
         read(PyTuple_GetItem(value, 1), field.stride);
}

template <class T>
bool read_call(PyObject* value, T& field) {
  return read(value, field);
}

bool read_call(PyObject* value, Matrix& field) { return read(value, field.address); }

}  // namespace

#define FASTLORA_FIELD(Owner, name, required)                                      \
  {#name, required, [](PyObject* v, Owner& owner) { return read(v, owner.name); }, \
   [](PyObject* v, Owner& owner) { return read_call(v, owner.name); }}

const std::vector<Field<Problem>>& problem_fields() {
  static const std::vector<Field<Problem>> fields = {
      FASTLORA_FIELD(Problem, backward, true),
      FASTLORA_FIELD(Problem, fp16, true),
      FASTLORA_FIELD(Problem, dropout, true),
      FASTLORA_FIELD(Problem, block_m, true),
      FASTLORA_FIELD(Problem, block_n, true),
      FASTLORA_FIELD(Problem, m, true),
      FASTLORA_FIELD(Problem, n, true),
      FASTLORA_FIELD(Problem, k, true),
      FASTLORA_FIELD(Problem, r, true),
      FASTLORA_FIELD(Problem, group_m, true),
      FASTLORA_FIELD(Problem, splits, true),
      FASTLORA_FIELD(Problem, fused, true),
      FASTLORA_FIELD(Problem, ctas, true),
      FASTLORA_FIELD(Problem, transposed, false),
      FASTLORA_FIELD(Problem, n_segments, false),
      FASTLORA_FIELD(Problem, n_weights, false),
      FASTLORA_FIELD(Problem, n_adapters, false),
      FASTLORA_FIELD(Problem, n_biases, false),
      FASTLORA_FIELD(Problem, gradients_last, false),
      FASTLORA_FIELD(Problem, makes_out, false),
      FASTLORA_FIELD(Problem, grad_a, false),
      FASTLORA_FIELD(Problem, grad_b, false),
      FASTLORA_FIELD(Problem, grad_bias, false),
      FASTLORA_FIELD(Problem, code_format, false),
      FASTLORA_FIELD(Problem, scale_format, false),
      FASTLORA_FIELD(Problem, block, false),
      FASTLORA_FIELD(Problem, nested_block, false),
      FASTLORA_FIELD(Problem, in_loop, false),
  };
  return fields;
}

// But for the scaling all are optional here: the plan checks which of them a launch needs.
const std::vector<Field<Operands>>& operand_fields() {
  static const std::vector<Field<Operands>> fields = {
      FASTLORA_FIELD(Operands, act, false),
      FASTLORA_FIELD(Operands, weight, false),
      FASTLORA_FIELD(Operands, lora_a, false),
      FASTLORA_FIELD(Operands, lora_b, false),
      FASTLORA_FIELD(Operands, out, false),
      FASTLORA_FIELD(Operands, layer_input, false),
      FASTLORA_FIELD(Operands, saved_s, false),
      FASTLORA_FIELD(Operands, bias, false),
      FASTLORA_FIELD(Operands, s, false),
      FASTLORA_FIELD(Operands, grad_a, false),
      FASTLORA_FIELD(Operands, grad_b, false),
      FASTLORA_FIELD(Operands, grad_bias, false),
      FASTLORA_FIELD(Operands, workspace, false),
      FASTLORA_FIELD(Operands, gradient_partials, false),
      FASTLORA_FIELD(Operands, split_partials, false),
      FASTLORA_FIELD(Operands, codes, false),
      FASTLORA_FIELD(Operands, scales, false),
      FASTLORA_FIELD(Operands, zeros, false),
      FASTLORA_FIELD(Operands, absmax2, false),
      FASTLORA_FIELD(Operands, code2, false),
      FASTLORA_FIELD(Operands, offset, false),
      FASTLORA_FIELD(Operands, ends, false),
      FASTLORA_FIELD(Operands, experts, false),
      FASTLORA_FIELD(Operands, adapters, false),
      FASTLORA_FIELD(Operands, scalings, false),
      FASTLORA_FIELD(Operands, kept_s, false),
      FASTLORA_FIELD(Operands, wide_experts, false),
      FASTLORA_FIELD(Operands, wide_adapters, false),
      FASTLORA_FIELD(Operands, weight_stride, false),
      FASTLORA_FIELD(Operands, seed_address, false),
      FASTLORA_FIELD(Operands, seed, false),
      FASTLORA_FIELD(Operands, scale_in_s, true),
      FASTLORA_FIELD(Operands, scale_on_branch, false),
      FASTLORA_FIELD(Operands, inverse_keep, false),
      FASTLORA_FIELD(Operands, drop_threshold, false),
      FASTLORA_FIELD(Operands, fp32_grads, false),
  };
  return fields;
}

#undef FASTLORA_FIELD

}  // namespace fastlora
