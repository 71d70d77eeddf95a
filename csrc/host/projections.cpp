// Several projections of one input in one launch: each is planned and checked as the layer that it would be alone, and
// the launch has their tiles in one queue.
#include <algorithm>

#include "plan.h"

namespace fastlora {

namespace {

// What `make` returns, or throws with the number of its projection in front.
template <class Make>
auto of_projection(size_t number, Make make) {
  constexpr size_t kPrefix = sizeof("fastlora: ") - 1;
  const auto text = [=](const std::exception& error) {
    return "fastlora: projection " + std::to_string(number) + ": " + std::string(error.what()).substr(kPrefix);
  };
  try {
    return make();
  } catch (const OperandNameError& error) {
    throw OperandNameError(text(error));
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(text(error));
  }
}

}  // namespace

// The columns and gradient tiles of the schedule, and where among them those of each projection begin.
void Plan::plan_projections() {
  const auto require = [&](bool holds, const std::string& what) {
    if (!holds) throw std::invalid_argument("fastlora: " + what);
  };
  const std::vector<Projection>& projections = problem_.projections;
  require(projections.size() <= kMaxProjections,
          "a launch takes " + std::to_string(kMaxProjections) + " projections at most");
  const auto has_adapter = [](const Projection& each) { return each.r > 0; };
  require(std::is_partitioned(projections.begin(), projections.end(), has_adapter),
          "projections without an adapter come last");
  for (size_t i = 0; i < projections.size(); ++i) {
    const Projection& each = projections[i];
    Problem layer = problem_;
    layer.projections.clear();
    (problem_.backward ? layer.k : layer.n) = each.out_features;
    layer.r = each.r;
    layer.grad_a = each.grad_a;
    layer.grad_b = each.grad_b;
    layer.grad_bias = each.grad_bias;
    require(each.r > 0 || !(each.grad_a || each.grad_b || each.grad_bias),
            "no kernel makes gradients of a projection without an adapter");
    layers_.push_back(of_projection(i, [&] { return Plan(layer, variant_); }));
  }

  Schedule& s = base_.schedule;
  if (!problem_.backward) {
    shrink_columns_ = int(std::count_if(projections.begin(), projections.end(), has_adapter));
    s.columns = shrink_columns_;
  }
  s.gradient_tiles = 0;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Schedule& own = layers_[i].base_.schedule;
    if (!problem_.backward) {
      first_column_[i] = s.columns;
      // Its own schedule counts a column that makes S besides, where that is not fused.
      s.columns += own.columns - has_adapter(projections[i]);
    }
    first_gradient_[i] = s.gradient_tiles;
    s.gradient_tiles += own.gradient_tiles;
    if (has_adapter(projections[i]) && (problem_.makes_out || projections[i].grad_a)) last_shrunk_ = int(i);
  }
}

SharedParams Plan::shared_parameters(const Operands& o, std::vector<MapSpec>& specs) const {
  SharedParams p{};
  static_cast<Params&>(p) = base_;
  p.count = int(layers_.size());
  p.shrink_columns = shrink_columns_;
  p.last_shrunk = last_shrunk_;
  p.workspace = reinterpret_cast<int*>(o.workspace);
  p.gradient_partials = reinterpret_cast<float*>(o.gradient_partials);
  check_no_projections(o, layers_.size());
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Plan& layer = layers_[i];
    Operands own;
    static_cast<LayerOperands&>(own) = o.projections[i];
    if (problem_.backward) {
      own.out = o.out;
      if (layer.problem_.grad_a) own.layer_input = o.layer_input;
    } else {
      own.act = o.act;
    }
    own.workspace = o.workspace;
    if (layer.gradient_partial_floats_) own.gradient_partials = o.gradient_partials;
    own.fp32_grads = o.fp32_grads;
    const size_t first = specs.size();
    p.layers[i] = of_projection(i, [&] { return layer.parameters(own, specs); });
    const size_t offset = reinterpret_cast<char*>(&p.layers[i]) - reinterpret_cast<char*>(&p);
    for (size_t j = first; j < specs.size(); ++j) specs[j].offset += offset;
    p.first_column[i] = first_column_[i];
    p.first_gradient[i] = first_gradient_[i];
  }
  return p;
}

}  // namespace fastlora
