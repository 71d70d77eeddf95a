// fastlora._C: raw addresses, strides and a stream; no libtorch, so one build serves every torch version.
#include "fields.h"
#include "launch.h"

namespace fastlora {

namespace {

// What `body` returns, or null with the exception set in Python that it threw.
template <class Body>
PyObject* guarded(Body body) noexcept {
  try {
    return body().release();
  } catch (const PythonError&) {
  } catch (const TypeError& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const OperandNameError& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// An object of a type of this module: what every Python object begins with, and what it is about.
template <class Value>
struct Object {
  PyObject_HEAD Value* value;
};

template <class Value>
Value& value_of(PyObject* object) {
  return *reinterpret_cast<Object<Value>*>(object)->value;
}

template <class Value>
Ref make(PyTypeObject* type, Value value) {
  Ref object(reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc))(type, 0));
  reinterpret_cast<Object<Value>*>(object.get())->value = new Value(std::move(value));
  return object;
}

template <class Value>
void deallocate(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  delete reinterpret_cast<Object<Value>*>(object)->value;
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(object);
  Py_DECREF(type);  // which an object of a type made at run time holds
}

template <class Range, class Convert>
Ref list_of(const Range& range, Convert convert) {
  Ref list(PyList_New(0));
  for (const auto& item : range) {
    if (PyList_Append(list.get(), Ref(convert(item)).get()) < 0) throw PythonError();
  }
  return list;
}

PyObject* as_dict(const Variant& v) {
  return Py_BuildValue(
      "{s:s, s:i, s:N, s:s, s:N, s:N, s:N, s:N, s:N, s:N, s:N, s:N, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i}",  //
      "name", v.name, "arch", v.arch, "backward", PyBool_FromLong(v.backward), "dtype", v.fp16 ? "float16" : "bfloat16",
      "transposed", PyBool_FromLong(v.transposed), "decodes", PyBool_FromLong(v.decodes), "in_loop",
      PyBool_FromLong(v.in_loop), "segments", PyBool_FromLong(v.segments), "shared", PyBool_FromLong(v.shared),
      "dropout", PyBool_FromLong(v.dropout), "splits", PyBool_FromLong(v.splits), "fuses", PyBool_FromLong(v.fuses),
      "cluster", v.cluster, "threads", v.threads, "block_m", v.block_m, "block_n", v.block_n, "block_k", v.block_k,
      "rank", v.rank, "shared_bytes", v.shared_bytes, "gradient_columns", v.gradient_columns, "split_partial_floats",
      v.split_partial_floats, "gradient_partial_floats", v.gradient_partial_floats);
}

PyObject* as_dict(const MapSpec& map) {
  return Py_BuildValue("{s:n, s:K, s:K, s:K, s:K, s:(II), s:I, s:K, s:K}", "offset", Py_ssize_t(map.offset), "address",
                       map.address, "columns", map.columns, "rows", map.rows, "stride_bytes", map.stride_bytes, "box",
                       map.box_rows, map.box_columns, "swizzle", map.swizzle, "matrices", map.matrices,
                       "matrix_stride_bytes", map.matrix_stride_bytes);
}

void refuse_positional(const char* function, PyObject* arguments) {
  if (PyTuple_Size(arguments)) throw TypeError(std::string(function) + "() takes its arguments by name");
}

// A plan and the operands of its launches: some by name once and for all, the others in every call.
struct Launcher {
  Plan plan;
  Operands operands;
  std::vector<const Field<Operands>*> in_calls;
};

PyTypeObject* launcher_type = nullptr;

constexpr int kBeforeOperands = 2;  // arguments of a call: the device and the stream

PyObject* call_launcher(PyObject* self, PyObject* arguments, PyObject*) {
  return guarded([&] {
    const Launcher& launcher = value_of<Launcher>(self);
    const size_t given = PyTuple_Size(arguments), wanted = launcher.in_calls.size() + kBeforeOperands;
    if (given != wanted) {
      throw TypeError("a launch takes " + std::to_string(wanted) + " arguments, got " + std::to_string(given));
    }
    const int64_t device = PyLong_AsLongLong(PyTuple_GetItem(arguments, 0));
    const uint64_t stream = PyLong_AsUnsignedLongLong(PyTuple_GetItem(arguments, 1));
    if (PyErr_Occurred()) throw PythonError();
    Operands operands = launcher.operands;
    for (size_t i = 0; i < launcher.in_calls.size(); ++i) {
      const Field<Operands>& field = *launcher.in_calls[i];
      PyObject* value = PyTuple_GetItem(arguments, Py_ssize_t(i) + kBeforeOperands);
      if (!field.read_call(value, operands)) throw unfit("launch", field.name, value);
    }
    {
      const Unlocked unlocked;
      launcher.plan.launch(operands, int(device), stream);
    }
    return none();
  });
}

PyObject* bind(PyObject* self, PyObject* arguments, PyObject* named) {
  return guarded([&] {
    PyObject* names;
    if (!PyArg_ParseTuple(arguments, "O!:bind", &PyTuple_Type, &names)) throw PythonError();
    Launcher launcher{value_of<Plan>(self), {}, {}};
    read_named("bind", operand_fields(), named, launcher.operands);
    for (Py_ssize_t i = 0; i < PyTuple_Size(names); ++i) {
      launcher.in_calls.push_back(&find_field("bind", operand_fields(), PyTuple_GetItem(names, i)));
    }
    check_required("bind", operand_fields(), {names, named});
    return make(launcher_type, std::move(launcher));
  });
}

PyObject* parameters(PyObject* self, PyObject* arguments, PyObject* named) {
  return guarded([&] {
    refuse_positional("parameters", arguments);
    Operands operands;
    read_named("parameters", operand_fields(), named, operands);
    check_required("parameters", operand_fields(), {named});
    std::vector<MapSpec> maps;
    return value_of<Plan>(self).with_parameters(operands, maps, [&](const auto& params) {
      const Ref described = list_of(maps, [](const MapSpec& map) { return as_dict(map); });
      return Ref(Py_BuildValue("(y#O)", &params, Py_ssize_t(sizeof params), described.get()));
    });
  });
}

PyObject* queue(PyObject* self, PyObject*) {
  return guarded([&] {
    return list_of(value_of<Plan>(self).queue(),
                   [](const Tile& t) { return Py_BuildValue("(iiii)", t.row, t.column, t.split, t.gradient); });
  });
}

PyObject* new_plan(PyTypeObject* type, PyObject* arguments, PyObject* named) {
  return guarded([&] {
    refuse_positional("Plan", arguments);
    Problem problem;
    read_named("Plan", problem_fields(), named, problem);
    check_required("Plan", problem_fields(), {named});
    return make(type, Plan(problem));
  });
}

template <int64_t (Plan::*count)() const>
PyObject* number(PyObject* self, void*) {
  return PyLong_FromLongLong((value_of<Plan>(self).*count)());
}

PyObject* variant_of(PyObject* self, void*) { return as_dict(value_of<Plan>(self).variant()); }

PyTypeObject* make_plan_type() {
  static PyMethodDef methods[] = {
      {"bind", reinterpret_cast<PyCFunction>(bind), METH_VARARGS | METH_KEYWORDS,
       "bind(names, **operands): a launcher, called with device, stream and the operands of these names in their "
       "order. Of a matrix, (address, row stride) here, a call takes the address"},
      {"parameters", reinterpret_cast<PyCFunction>(parameters), METH_VARARGS | METH_KEYWORDS,
       "parameters(**operands): what a launch would pass to the kernel: its bytes, and what its tensor maps describe"},
      {"queue", queue, METH_NOARGS,
       "(row block, column, split, gradient tile or -1) of the cluster's tiles, as claimed"},
      {}};
  static PyGetSetDef properties[] = {
      {"variant", variant_of, nullptr, "The kernel", nullptr},
      {"ctas", number<&Plan::ctas>, nullptr, nullptr, nullptr},
      {"s_rows", number<&Plan::s_rows>, nullptr, "Rows of the S that a launch makes", nullptr},
      {"workspace_words", number<&Plan::workspace_words>, nullptr, nullptr, nullptr},
      {"gradient_partial_floats", number<&Plan::gradient_partial_floats>, nullptr, nullptr, nullptr},
      {"split_partial_floats", number<&Plan::split_partial_floats>, nullptr, nullptr, nullptr},
      {"decode_tiles", number<&Plan::decode_tiles>, nullptr, "The cluster's tiles in front of the queue", nullptr},
      {}};
  static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(new_plan)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(deallocate<Plan>)},
                                {Py_tp_methods, methods},
                                {Py_tp_getset, properties},
                                {0, nullptr}};
  static PyType_Spec spec = {"fastlora._C.Plan", sizeof(Object<Plan>), 0, Py_TPFLAGS_DEFAULT, slots};
  return reinterpret_cast<PyTypeObject*>(Ref(PyType_FromSpec(&spec)).release());
}

PyTypeObject* make_launcher_type() {
  static PyType_Slot slots[] = {{Py_tp_call, reinterpret_cast<void*>(call_launcher)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(deallocate<Launcher>)},
                                {0, nullptr}};
  static PyType_Spec spec = {"fastlora._C.Launcher", sizeof(Object<Launcher>), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
  return reinterpret_cast<PyTypeObject*>(Ref(PyType_FromSpec(&spec)).release());
}

PyObject* device_count(PyObject*, PyObject*) { return PyLong_FromLong(devices().count); }

PyObject* device_error(PyObject*, PyObject*) { return PyUnicode_FromString(devices().error.c_str()); }

PyObject* list_variants(PyObject*, PyObject*) {
  return guarded([] { return list_of(variants(), [](const Variant& variant) { return as_dict(variant); }); });
}

void add(PyObject* module, const char* name, PyObject* value) {
  if (PyModule_AddObjectRef(module, name, value) < 0) throw PythonError();
}

PyObject* make_module() {
  static PyMethodDef functions[] = {
      {"device_count", device_count, METH_NOARGS, "CUDA devices; 0 where none can be used"},
      {"device_error", device_error, METH_NOARGS, "Why no CUDA device can be used, or nothing"},
      {"variants", list_variants, METH_NOARGS, "The compiled kernels"},
      {}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C",
                                   "CUDA kernels of fastlora; see fastlora/backends/cuda/launch.py", -1, functions};
  return guarded([] {
    Ref module(PyModule_Create(&definition));
    add(module.get(), "Plan", reinterpret_cast<PyObject*>(make_plan_type()));
    launcher_type = make_launcher_type();
#ifdef FASTLORA_SPIN_LIMIT
    // Tries after which a wait of this debug build traps.
    add(module.get(), "spin_limit", Ref(PyLong_FromLongLong(FASTLORA_SPIN_LIMIT)).get());
#else
    add(module.get(), "spin_limit", Py_None);
#endif
    return module;
  });
}

}  // namespace

}  // namespace fastlora

PyMODINIT_FUNC PyInit__C() { return fastlora::make_module(); }
