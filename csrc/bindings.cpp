// fastlora._C: raw addresses, strides and a stream; no libtorch, so one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "lora.h"

namespace py = pybind11;
using fastlora::Matrix;
using fastlora::Operands;
using fastlora::Plan;

namespace {

Matrix matrix(const py::kwargs& arguments, const char* name) {
  if (!arguments.contains(name)) return {};
  const auto [address, stride] = arguments[name].cast<std::pair<uintptr_t, int64_t>>();
  return {address, stride};
}

template <class T>
void read(const py::kwargs& arguments, const char* name, T& value) {
  if (arguments.contains(name)) value = arguments[name].cast<T>();
}

Operands operands(const py::kwargs& arguments) {
  Operands o;
  o.u = matrix(arguments, "u");
  o.v = matrix(arguments, "v");
  o.a = matrix(arguments, "a");
  o.b = matrix(arguments, "b");
  o.c = matrix(arguments, "c");
  o.x = matrix(arguments, "x");
  o.saved = matrix(arguments, "saved");
  read(arguments, "bias", o.bias);
  read(arguments, "s", o.s);
  read(arguments, "grad_a", o.grad_a);
  read(arguments, "grad_b", o.grad_b);
  read(arguments, "grad_bias", o.grad_bias);
  read(arguments, "workspace", o.workspace);
  read(arguments, "gradient_sums", o.gradient_sums);
  read(arguments, "tile_parts", o.tile_parts);
  read(arguments, "seed_address", o.seed_address);
  read(arguments, "seed", o.seed);
  read(arguments, "scale_s", o.scale_s);
  read(arguments, "branch_scale", o.branch_scale);
  read(arguments, "inverse_keep", o.inverse_keep);
  read(arguments, "drop_threshold", o.drop_threshold);
  read(arguments, "fp32_grads", o.fp32_grads);
  return o;
}

py::dict as_dict(const fastlora::Variant& v) {
  py::dict d;
  d["name"] = v.name;
  d["backward"] = v.backward;
  d["half"] = v.half;
  d["dropout"] = v.dropout;
  d["split"] = v.split;
  d["fuses"] = v.fuses;
  d["cluster"] = v.cluster;
  d["block_m"] = v.block_m;
  d["block_n"] = v.block_n;
  d["rank"] = v.rank;
  d["shared_bytes"] = v.shared_bytes;
  return d;
}

// What a launch would pass to the kernel: its bytes, and what its tensor maps describe. For running it elsewhere.
py::tuple parameters(const Plan& plan, const py::kwargs& arguments) {
  std::vector<fastlora::MapSpec> maps;
  const fastlora::Params p = plan.parameters(operands(arguments), maps);
  py::list described;
  for (const auto& map : maps) {
    py::dict d;
    d["offset"] = map.offset;
    d["address"] = map.address;
    d["columns"] = map.columns;
    d["rows"] = map.rows;
    d["stride_bytes"] = map.stride_bytes;
    d["box"] = py::make_tuple(map.box_rows, map.box_columns);
    d["swizzle"] = map.swizzle;
    described.append(d);
  }
  return py::make_tuple(py::bytes(reinterpret_cast<const char*>(&p), sizeof p), described);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Hopper kernels of fastlora; see fastlora/backends/cuda/launch.py";
  m.def("device_count", &fastlora::device_count, "CUDA devices; 0 without a driver");
  m.def(
      "variants",
      [] {
        py::list list;
        for (const auto& variant : fastlora::variants()) list.append(as_dict(variant));
        return list;
      },
      "The compiled kernels");
  py::class_<Plan>(m, "Plan")
      .def(py::init<bool, bool, bool, int, int, int64_t, int64_t, int64_t, int64_t, int, int, bool, int, bool, bool,
                    bool, bool>(),
           py::kw_only(), py::arg("backward"), py::arg("half"), py::arg("dropout"), py::arg("block_m"),
           py::arg("block_n"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("r"), py::arg("group_m"),
           py::arg("splits"), py::arg("fused"), py::arg("ctas"), py::arg("makes_c") = true, py::arg("grad_a") = false,
           py::arg("grad_b") = false, py::arg("grad_bias") = false)
      .def_property_readonly("variant", [](const Plan& plan) { return as_dict(plan.variant()); })
      .def_property_readonly("ctas", &Plan::ctas)
      .def_property_readonly("words", &Plan::words)
      .def_property_readonly("gradient_floats", &Plan::gradient_floats)
      .def_property_readonly("part_floats", &Plan::part_floats)
      .def("queue", &Plan::queue)
      .def("parameters", &parameters)
      .def(
          "launch",
          [](const Plan& plan, int device, uintptr_t stream, const py::kwargs& arguments) {
            const Operands given = operands(arguments);
            const py::gil_scoped_release unlocked;
            plan.launch(given, device, stream);
          },
          py::arg("device"), py::arg("stream"));
}
