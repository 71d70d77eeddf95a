// fastlora._C: raw addresses, strides and a stream; no libtorch, so one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <set>

#include "launch.h"
#include "plan.h"

namespace py = pybind11;
using fastlora::Matrix;
using fastlora::Operands;
using fastlora::Plan;
using fastlora::Problem;

namespace {

// Named arguments of a call: each is read once; an unknown or a missing name, or a value of another type, is a
// TypeError that names it.
class Named {
 public:
  Named(const char* function, const py::kwargs& given) : function_(function), given_(given) { known_.reserve(32); }

  template <class T>
  void required(const char* name, T& value) {
    if (!optional(name, value)) throw py::type_error(std::string(function_) + "() misses the argument '" + name + "'");
  }

  template <class T>
  bool optional(const char* name, T& value) {
    known_.push_back(name);
    PyObject* found = PyDict_GetItemString(given_.ptr(), name);
    if (!found) return false;
    ++read_;
    try {
      read(py::handle(found), value);
    } catch (const py::cast_error&) {
      throw py::type_error(std::string(function_) + "() cannot take " + std::string(py::repr(py::handle(found))) +
                           " as the argument '" + name + "'");
    }
    return true;
  }

  void no_others() const {
    if (read_ == given_.size()) return;
    const std::set<std::string> known(known_.begin(), known_.end());
    for (const auto& item : given_) {
      const auto name = item.first.cast<std::string>();
      if (!known.count(name)) throw py::type_error(std::string(function_) + "() has no argument '" + name + "'");
    }
  }

 private:
  template <class T>
  static void read(py::handle given, T& value) {
    value = given.cast<T>();
  }
  static void read(py::handle given, Matrix& value) {
    const auto [address, stride] = given.cast<std::pair<uintptr_t, int64_t>>();
    value = {address, stride};
  }

  const char* function_;
  const py::kwargs& given_;
  std::vector<const char*> known_;
  size_t read_ = 0;
};

Problem problem(const py::kwargs& given) {
  Problem p;
  Named named("Plan", given);
  named.required("backward", p.backward);
  named.required("fp16", p.fp16);
  named.required("dropout", p.dropout);
  named.required("block_m", p.block_m);
  named.required("block_n", p.block_n);
  named.required("m", p.m);
  named.required("n", p.n);
  named.required("k", p.k);
  named.required("r", p.r);
  named.required("group_m", p.group_m);
  named.required("splits", p.splits);
  named.required("fused", p.fused);
  named.required("ctas", p.ctas);
  named.optional("gradients_last", p.gradients_last);
  named.optional("makes_out", p.makes_out);
  named.optional("grad_a", p.grad_a);
  named.optional("grad_b", p.grad_b);
  named.optional("grad_bias", p.grad_bias);
  named.no_others();
  return p;
}

// All optional here: the plan checks which operands a launch needs.
Operands operands(const char* function, const py::kwargs& given) {
  Operands o;
  Named named(function, given);
  named.optional("act", o.act);
  named.optional("weight", o.weight);
  named.optional("lora_a", o.lora_a);
  named.optional("lora_b", o.lora_b);
  named.optional("out", o.out);
  named.optional("layer_input", o.layer_input);
  named.optional("saved_s", o.saved_s);
  named.optional("bias", o.bias);
  named.optional("s", o.s);
  named.optional("grad_a", o.grad_a);
  named.optional("grad_b", o.grad_b);
  named.optional("grad_bias", o.grad_bias);
  named.optional("workspace", o.workspace);
  named.optional("gradient_partials", o.gradient_partials);
  named.optional("split_partials", o.split_partials);
  named.optional("seed_address", o.seed_address);
  named.optional("seed", o.seed);
  named.required("scale_in_s", o.scale_in_s);
  named.optional("scale_on_branch", o.scale_on_branch);
  named.optional("inverse_keep", o.inverse_keep);
  named.optional("drop_threshold", o.drop_threshold);
  named.optional("fp32_grads", o.fp32_grads);
  named.no_others();
  return o;
}

py::dict as_dict(const fastlora::Variant& v) {
  using py::operator""_a;
  return py::dict(
      "name"_a = v.name, "arch"_a = v.arch, "backward"_a = v.backward, "dtype"_a = v.fp16 ? "float16" : "bfloat16",
      "dropout"_a = v.dropout, "splits"_a = v.splits, "fuses"_a = v.fuses, "cluster"_a = v.cluster,
      "threads"_a = v.threads, "block_m"_a = v.block_m, "block_n"_a = v.block_n, "block_k"_a = v.block_k,
      "rank"_a = v.rank, "shared_bytes"_a = v.shared_bytes, "gradient_columns"_a = v.gradient_columns,
      "split_partial_floats"_a = v.split_partial_floats, "gradient_partial_floats"_a = v.gradient_partial_floats);
}

py::list variants() {
  py::list list;
  for (const auto& variant : fastlora::variants()) list.append(as_dict(variant));
  return list;
}

py::list queue(const Plan& plan) {
  py::list list;
  for (const fastlora::Tile& t : plan.queue()) list.append(py::make_tuple(t.row, t.column, t.split, t.gradient));
  return list;
}

// What a launch would pass to the kernel: its bytes, and what its tensor maps describe. For running it elsewhere.
py::tuple parameters(const Plan& plan, const py::kwargs& given) {
  using py::operator""_a;
  std::vector<fastlora::MapSpec> maps;
  const fastlora::Params p = plan.parameters(operands("parameters", given), maps);
  py::list described;
  for (const auto& map : maps) {
    described.append(py::dict("offset"_a = map.offset, "address"_a = map.address, "columns"_a = map.columns,
                              "rows"_a = map.rows, "stride_bytes"_a = map.stride_bytes,
                              "box"_a = py::make_tuple(map.box_rows, map.box_columns), "swizzle"_a = map.swizzle));
  }
  return py::make_tuple(py::bytes(reinterpret_cast<const char*>(&p), sizeof p), described);
}

void launch(const Plan& plan, int device, uintptr_t stream, const py::kwargs& given) {
  const Operands read = operands("launch", given);
  const py::gil_scoped_release unlocked;
  plan.launch(read, device, stream);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of fastlora; see fastlora/backends/cuda/launch.py";
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      std::rethrow_exception(error);
    } catch (const fastlora::OperandNameError& unfit) {
      PyErr_SetString(PyExc_TypeError, unfit.what());
    }
  });
  m.def("device_count", [] { return fastlora::devices().count; }, "CUDA devices; 0 where none can be used");
  m.def("device_error", [] { return fastlora::devices().error; }, "Why no CUDA device can be used, or nothing");
#ifdef FASTLORA_SPIN_LIMIT
  m.attr("spin_limit") = FASTLORA_SPIN_LIMIT;  // tries after which a wait of this debug build traps
#else
  m.attr("spin_limit") = py::none();
#endif
  m.def("variants", &variants, "The compiled kernels");
  py::class_<Plan>(m, "Plan", py::module_local())
      .def(py::init([](const py::kwargs& given) { return Plan(problem(given)); }))
      .def_property_readonly("variant", [](const Plan& plan) { return as_dict(plan.variant()); })
      .def_property_readonly("ctas", &Plan::ctas)
      .def_property_readonly("workspace_words", &Plan::workspace_words)
      .def_property_readonly("gradient_partial_floats", &Plan::gradient_partial_floats)
      .def_property_readonly("split_partial_floats", &Plan::split_partial_floats)
      .def("queue", &queue, "(row block, column, split, gradient tile or -1) of the cluster's tiles, as claimed")
      .def("parameters", &parameters)
      .def("launch", &launch, py::arg("device"), py::arg("stream"));
}
