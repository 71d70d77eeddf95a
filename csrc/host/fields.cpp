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

// A list of (out_features, rank, grad_a, grad_b, grad_bias).
bool read(PyObject* value, std::vector<Projection>& field) {
  field.clear();
  for (Py_ssize_t i = 0; PyList_Check(value) && i < PyList_Size(value); ++i) {
    PyObject* given = PyList_GetItem(value, i);
    Projection each;
    if (!PyTuple_Check(given) || PyTuple_Size(given) != 5 || !read(PyTuple_GetItem(given, 0), each.out_features) ||
        !read(PyTuple_GetItem(given, 1), each.r) || !read(PyTuple_GetItem(given, 2), each.grad_a) ||
        !read(PyTuple_GetItem(given, 3), each.grad_b) || !read(PyTuple_GetItem(given, 4), each.grad_bias)) {
      return false;
    }
    field.push_back(each);
  }
  return PyList_Check(value);
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
#define FASTLORA_FIELD_AT(place, name, required)                                                   \
  {#place #name, required, [](PyObject* v, Operands& owner) { return read(v, owner.place name); }, \
   [](PyObject* v, Operands& owner) { return read_call(v, owner.place name); }}

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
      FASTLORA_FIELD(Problem, projections, false),
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

// What a launch has of a layer, or of one of several projections: PLACE is then "projections[0]." or so.
#define FASTLORA_LAYER_FIELDS(PLACE, required)                                                          \
  FASTLORA_FIELD_AT(PLACE, act, false), FASTLORA_FIELD_AT(PLACE, weight, false),                        \
      FASTLORA_FIELD_AT(PLACE, lora_a, false), FASTLORA_FIELD_AT(PLACE, lora_b, false),                 \
      FASTLORA_FIELD_AT(PLACE, out, false), FASTLORA_FIELD_AT(PLACE, layer_input, false),               \
      FASTLORA_FIELD_AT(PLACE, saved_s, false), FASTLORA_FIELD_AT(PLACE, bias, false),                  \
      FASTLORA_FIELD_AT(PLACE, s, false), FASTLORA_FIELD_AT(PLACE, grad_a, false),                      \
      FASTLORA_FIELD_AT(PLACE, grad_b, false), FASTLORA_FIELD_AT(PLACE, grad_bias, false),              \
      FASTLORA_FIELD_AT(PLACE, seed_address, false), FASTLORA_FIELD_AT(PLACE, seed, false),             \
      FASTLORA_FIELD_AT(PLACE, scale_in_s, required), FASTLORA_FIELD_AT(PLACE, scale_on_branch, false), \
      FASTLORA_FIELD_AT(PLACE, inverse_keep, false), FASTLORA_FIELD_AT(PLACE, drop_threshold, false)

// Those of projections are named "projections[0].weight" and so on. But for the scaling all are optional here: the plan
// checks which of them a launch needs.
const std::vector<Field<Operands>>& operand_fields() {
  static const std::vector<Field<Operands>> fields = {
      FASTLORA_LAYER_FIELDS(, true),
      FASTLORA_LAYER_FIELDS(projections[0]., false),
      FASTLORA_LAYER_FIELDS(projections[1]., false),
      FASTLORA_LAYER_FIELDS(projections[2]., false),
      FASTLORA_LAYER_FIELDS(projections[3]., false),
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
      FASTLORA_FIELD(Operands, fp32_grads, false),
  };
  return fields;
}

#undef FASTLORA_LAYER_FIELDS
#undef FASTLORA_FIELD_AT
#undef FASTLORA_FIELD

}  // namespace fastlora
