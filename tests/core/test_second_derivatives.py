"""Gradients of gradients: what the layer composed of torch's operators gives in fp64, with the fused layer's mask."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.autograd import functional

import fastlora
from fastlora import LoRALinear, lora_linear, ops
from fastlora.philox import draw_seed, inverse_keep, keep_mask
from tests.support import numerics

SCALING = 1.7
NAMES = ("x", "lora_a", "lora_b", "bias")
SUBSETS = [s for n in range(1, 5) for s in itertools.combinations(NAMES, n)]


TOKENS, IN_FEATURES, OUT_FEATURES = 12, 5, 4  # the most that a test has


def draw(shape=(2, 3, 5), n=4, r=2, dtype=torch.float64, adapter_dtype=None):
    case = numerics.draw_case(math.prod(shape[:-1]), n, shape[-1], r, dtype, adapter_dtype=adapter_dtype)
    tensors = dict(zip(NAMES, (case.x.view(shape), case.lora_a, case.lora_b, case.bias), strict=True))
    return case.weight, tensors


def composition(weight, x, lora_a, lora_b, bias, dropout_p=0.0):
    """The layer that PEFT computes, with the mask that fastlora draws from torch's generator."""
    seen = x
    if dropout_p > 0.0:
        mask = keep_mask(draw_seed(x.device), dropout_p, x.shape[:-1].numel(), x.shape[-1]).view(x.shape)
        seen = x * mask * inverse_keep(dropout_p)
    branch = (seen.to(lora_a.dtype) @ lora_a.t() @ lora_b.t() * SCALING).to(x.dtype)
    return nn.functional.linear(x, weight, bias) + branch


def fused(weight, x, lora_a, lora_b, bias, dropout_p=0.0):
    return lora_linear(x, weight, lora_a, lora_b, SCALING, bias, dropout_p=dropout_p)


@pytest.fixture(params=["cpu", "as on a GPU"])
def path(request, monkeypatch):
    """Both ways to a backend: called directly, and through the ops, as every device but the CPU goes."""
    if request.param != "cpu":
        monkeypatch.setattr(ops, "_skips_ops", lambda tensor: False)
    fastlora.reset_dispatch_counts()


def derivatives(layer, weight, tensors, wanted, dropout_p):
    """Three orders: each the gradients of a sum over functions of those before, in all that requires a gradient."""
    leaves = {k: t.clone().requires_grad_(k in wanted) for k, t in tensors.items()}
    inputs = [leaves[name] for name in wanted]
    torch.manual_seed(0)
    y = layer(weight, **leaves, dropout_p=dropout_p)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).requires_grad_()
    first = torch.autograd.grad(y, inputs, dy, create_graph=True)
    inputs.append(dy)
    orders = [first]
    for _ in range(2):
        total = sum((g * g.detach().cos() + g.square()).sum() for g in orders[-1] if g is not None)
        orders.append(torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True))
    return orders


def close(ours, theirs):
    """Two orders of summation; the longest sums are over all tokens, and features of both sides. None where a
    derivative is of nothing."""
    assert (ours is None) == (theirs is None) and (ours is None or ours.shape == theirs.shape)
    if theirs is not None and theirs.numel():
        numerics.assert_reordered([ours], [theirs], TOKENS * (IN_FEATURES + OUT_FEATURES))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
@pytest.mark.usefixtures("path")
def test_three_orders_of_every_subset(wanted, dropout_p):
    weight, tensors = draw()
    got = derivatives(fused, weight, tensors, wanted, dropout_p)
    expected = derivatives(composition, weight, tensors, wanted, dropout_p)
    for ours, theirs in zip(itertools.chain(*got), itertools.chain(*expected), strict=True):
        close(ours, theirs)
    counts = fastlora.dispatch_counts()
    assert counts["fallbacks"].keys() == {"create_graph=True"} and counts["reference"] == 1


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
@pytest.mark.usefixtures("path")
def test_gradgradcheck(wanted, dropout_p):
    weight, tensors = draw(shape=(3, 4), n=3)

    def layer(*given):
        torch.manual_seed(0)
        return fused(weight, **(tensors | dict(zip(wanted, given, strict=True))), dropout_p=dropout_p)

    assert torch.autograd.gradgradcheck(layer, [tensors[name].clone().requires_grad_() for name in wanted])


@pytest.mark.parametrize("shape", [(5,), (2, 0, 5), (2, 2, 3, 5)], ids=str)
def test_any_number_of_dimensions(shape):
    weight, tensors = draw(shape)
    got, expected = (derivatives(layer, weight, tensors, NAMES, 0.3) for layer in (fused, composition))
    for ours, theirs in zip(itertools.chain(*got), itertools.chain(*expected), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [NAMES, ("x", "lora_b")], ids="+".join)
@pytest.mark.usefixtures("path")
def test_second_order_in_bfloat16_is_as_accurate_as_eager(wanted, adapter_dtype):
    """Under autocast, float32 inputs reach a bfloat16 layer. With a frozen A and x the error of S alone matters."""
    weight, tensors = draw(shape=(24, 16), n=12, r=4, dtype=torch.bfloat16, adapter_dtype=adapter_dtype)
    exact = derivatives(composition, weight.double(), {k: t.double() for k, t in tensors.items()}, wanted, 0.3)
    floats = {k: t if k.startswith("lora") else t.float() for k, t in tensors.items()}

    def eager(weight, x, lora_a, lora_b, bias, dropout_p):
        return composition(weight.bfloat16(), x.bfloat16(), lora_a, lora_b, bias.bfloat16(), dropout_p)

    with torch.autocast("cpu", torch.bfloat16):
        got = derivatives(fused, weight.float(), floats, wanted, 0.3)[1]
    theirs = derivatives(eager, weight.float(), floats, wanted, 0.3)[1]
    for ours, eagers, true in zip(got, theirs, exact[1], strict=True):
        if true is not None:
            error, allowed = ((g.double() - true).square().mean().sqrt() for g in (ours, eagers))
            ulp = torch.finfo(torch.bfloat16).eps * true.abs().max()
            assert error <= 1.25 * allowed + ulp


def test_float16_scales_where_the_composed_layer_does():
    """A frozen A and a scaling above 1: what S holds of it in float16 is part of the derivative by x."""
    weight, tensors = draw(shape=(6, 8), n=4, dtype=torch.float16)
    global SCALING
    kept, SCALING = SCALING, 24.0
    try:
        got = derivatives(fused, weight, tensors, ("x", "lora_b"), 0.0)[:2]
        exact = derivatives(
            composition, weight.double(), {k: t.double() for k, t in tensors.items()}, ("x", "lora_b"), 0.0
        )[:2]
    finally:
        SCALING = kept
    for ours, true in zip(itertools.chain(*got), itertools.chain(*exact), strict=True):
        assert (ours.double() - true).norm() <= 32 * torch.finfo(torch.float16).eps * true.norm()


def network(kind, dropout=0.0):
    """Two fused layers around a tanh, with the adapters of the stock network that it is compared with."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    config = peft.LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False, lora_dropout=dropout)
    stock = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    if kind == "stock":
        return stock
    if kind == "peft":
        fastlora.integrations.peft.patch(stock, strict=True)
        return stock
    layers = []
    for source in (base[0], base[2]):
        layer = LoRALinear.from_linear(source.base_layer, r=3, alpha=8)
        layer.lora_A.data, layer.lora_B.data = (
            source.lora_A["default"].weight.data,
            source.lora_B["default"].weight.data,
        )
        layers.append(layer)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def penalty(model, x):
    x = x.clone().requires_grad_()
    out = model(x).square().sum()
    (slope,) = torch.autograd.grad(out, x, create_graph=True)
    (out + slope.norm()).backward()
    return [x.grad, *(p.grad for p in trained(model))]


def named_inputs(model, x):
    x = x.clone().requires_grad_()
    some = trained(model)[1:3]
    slopes = torch.autograd.grad(model(x).square().sum(), [x, *some], create_graph=True)
    sum(s.square().sum() for s in slopes).backward(inputs=some)
    return [p.grad for p in some]


def maml(model, x):
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    parameters = dict(model.named_parameters())
    fast = [parameters[n] for n in names]
    for _ in range(2):
        loss = torch.func.functional_call(model, dict(zip(names, fast, strict=True)), (x,)).square().mean()
        fast = [p - 0.1 * g for p, g in zip(fast, torch.autograd.grad(loss, fast, create_graph=True), strict=True)]
    loss = torch.func.functional_call(model, dict(zip(names, fast, strict=True)), (x.flip(0),)).square().mean()
    return torch.autograd.grad(loss, trained(model))


def scalar(model):
    return lambda t: model(t).square().sum()


PROGRAMS = {
    "penalty": penalty,
    "backward(inputs=...)": named_inputs,
    "maml": maml,
    "hvp": lambda model, x: functional.hvp(scalar(model), x, x.cos()),
    "vhp": lambda model, x: functional.vhp(scalar(model), x, x.cos()),
    "jvp": lambda model, x: functional.jvp(model, x, x.cos()),
    "vjp": lambda model, x: functional.vjp(model, x, model(x).cos().detach(), create_graph=True),
    "hessian": lambda model, x: functional.hessian(scalar(model), x),
    "hessian, vectorized": lambda model, x: functional.hessian(scalar(model), x, vectorize=True),
    "jacobian, vectorized": lambda model, x: functional.jacobian(model, x, vectorize=True),
    "jacobian, forward": lambda model, x: functional.jacobian(model, x, vectorize=True, strategy="forward-mode"),
    "hessian, forward over reverse": lambda model, x: functional.hessian(
        scalar(model), x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "func.hessian": lambda model, x: torch.func.hessian(scalar(model))(x),
}


@pytest.mark.parametrize("kind", ["peft", "LoRALinear"])
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.usefixtures("path")
def test_programs_of_second_order(kind, program):
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = PROGRAMS[program](network("stock"), x)
    ours, theirs = (torch.utils._pytree.tree_leaves(each) for each in (PROGRAMS[program](network(kind), x), expected))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        close(one, other)
    assert any(t.abs().max() > 0.1 for t in theirs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.usefixtures("path")
def test_a_batch_of_gradients(dropout_p):
    """``is_grads_batched`` goes through the node with tensors of an older vmap."""
    weight, tensors = draw()
    results = []
    for layer in (fused, composition):
        leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
        torch.manual_seed(0)
        y = layer(weight, **leaves, dropout_p=dropout_p)
        batch = torch.linspace(-1, 1, 3 * y.numel(), dtype=y.dtype).view(3, *y.shape)
        results.append(torch.autograd.grad(y, list(leaves.values()), batch, is_grads_batched=True))
    numerics.assert_reordered(*results, TOKENS * (IN_FEATURES + OUT_FEATURES))


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_penalty_of_a_checkpointed_layer(reentrant):
    """Non-reentrant checkpointing can be differentiated twice; what is recomputed draws the same mask."""
    from torch.utils.checkpoint import checkpoint

    layer = LoRALinear(6, 5, r=2, dropout=0.5, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 6, dtype=torch.float64)

    def run(model):
        layer.zero_grad()
        torch.manual_seed(1)
        return penalty(model, x)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=reentrant)

    if reentrant:  # as for any layer
        with pytest.raises(RuntimeError, match="use_reentrant"):
            run(Checkpointed())
        return
    expected = [g.clone() for g in run(layer)]
    numerics.assert_reordered(run(Checkpointed()), expected, TOKENS * (IN_FEATURES + OUT_FEATURES))


def test_the_second_order_graph_is_freed():
    """What links S to x where A is frozen holds no cycle."""
    import gc
    import weakref

    weight, tensors = draw()
    x = tensors["x"].clone().requires_grad_()
    middle = x * 2
    reference = weakref.ref(middle)
    y = fused(weight, middle, tensors["lora_a"], tensors["lora_b"].clone().requires_grad_(), tensors["bias"])
    gc.disable()
    try:
        del middle, y
        assert reference() is None
    finally:
        gc.enable()


def test_backward_op_by_itself():
    """The op's own derivative, S being an operand like any other."""
    c = numerics.draw_case(5, 4, 6, 2, torch.float64)
    operands = [t.clone().requires_grad_() for t in (c.dy, c.x, c.lora_a, c.lora_b)]
    s = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)

    def op(dy, x, lora_a, lora_b, s):
        needs = [True] * 4
        return torch.ops.fastlora.lora_backward(
            dy, x, c.weight, lora_a, lora_b, s, SCALING, 0.3, torch.tensor(7), needs, None
        )

    assert torch.autograd.gradcheck(op, (*operands, s)) and torch.autograd.gradgradcheck(op, (*operands, s))
