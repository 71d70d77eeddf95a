// What Python gives by name: the fields of a Problem and of Operands.
#pragma once
#include "python.h"
// Python.h comes first.
#include <algorithm>
#include <initializer_list>
#include <vector>

#include "plan.h"

namespace fastlora {

// A field of Owner. Both readers return whether the value has the field's type.
template <class Owner>
struct Field {
  const char* name;
  bool required;
  bool (*read)(PyObject* value, Owner& owner);       // all of it
  bool (*read_call)(PyObject* value, Owner& owner);  // what changes from call to call: of a matrix the address alone
};

const std::vector<Field<Problem>>& problem_fields();
const std::vector<Field<Operands>>& operand_fields();

inline TypeError unfit(const char* function, const char* name, PyObject* value) {
  return TypeError(std::string(function) + "() cannot take " + repr(value) + " as the argument '" + name + "'");
}

template <class Owner>
const Field<Owner>& find_field(const char* function, const std::vector<Field<Owner>>& fields, PyObject* name) {
  const std::string wanted = text_of(name);
  for (const Field<Owner>& field : fields) {
    if (wanted == field.name) return field;
  }
  throw TypeError(std::string(function) + "() has no argument '" + wanted + "'");
}

// Stores the values of `given`, a dict or null, in their fields.
template <class Owner>
void read_named(const char* function, const std::vector<Field<Owner>>& fields, PyObject* given, Owner& owner) {
  PyObject *name, *value;
  Py_ssize_t position = 0;
  while (given && PyDict_Next(given, &position, &name, &value)) {
    const Field<Owner>& field = find_field(function, fields, name);
    if (!field.read(value, owner)) throw unfit(function, field.name, value);
  }
}

// Throws where none of `given`, each a dict, a tuple or null, has the name of a required field, or that of the first of
// several projections.
template <class Owner>
void check_required(const char* function, const std::vector<Field<Owner>>& fields,
                    std::initializer_list<PyObject*> given) {
  for (const Field<Owner>& field : fields) {
    if (!field.required) continue;
    const Ref name(PyUnicode_FromString(field.name)), of_first(PyUnicode_FromFormat("projections[0].%s", field.name));
    const bool found = std::any_of(given.begin(), given.end(), [&](PyObject* names) {
      return names && (PySequence_Contains(names, name.get()) == 1 || PySequence_Contains(names, of_first.get()) == 1);
    });
    if (!found) throw TypeError(std::string(function) + "() misses the argument '" + field.name + "'");
  }
}

}  // namespace fastlora
