"""torch's modes and tools around a layer: selective checkpointing, FLOP counter, traces, exported programs."""

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora import LoRALinear, lora_linear
from fastlora.backends import reference
from tests.support import numerics
from tests.support.segments import by_loop, compute, draw_case

FORWARD = torch.ops.fastlora.lora_forward.default
PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def make(kind, dropout=0.0, dtype=torch.float32, adapter_dtype=None):
    """Stock PEFT, or the same numbers through patch or inject."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["up", "down"], init_lora_weights=False)
    config.lora_dropout = dropout
    model = peft.get_peft_model(
        Net().to(dtype), config, autocast_adapter_dtype=adapter_dtype == torch.float32 and dtype != torch.float32
    )
    net = model.base_model.model
    if kind == "peft":
        fastlora.integrations.peft.patch(net, strict=True)
    if kind == "inject":
        stock, net = net, Net().to(dtype)
        fastlora.inject(net, ["up", "down"], r=3, alpha=6, dropout=dropout, adapter_dtype=adapter_dtype)
        for name in ("up", "down"):
            source, layer = getattr(stock, name), getattr(net, name)
            layer.weight.data, layer.lora_A.data = source.base_layer.weight.data, source.lora_A["default"].weight.data
            layer.lora_B.data = source.lora_B["default"].weight.data
            if layer.bias is not None:
                layer.bias.data = source.base_layer.bias.data
    return net


def gradients(call, module, x):
    """dx and the adapters' gradients."""
    x = x.clone().requires_grad_()
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.autograd.grad(call(x).square().sum(), [x, *parameters])


INPUT = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def launches(monkeypatch):
    """The kernels' results as on a GPU: new tensors that no ATen call made under autograd."""
    for name in ("lora_forward", "lora_backward"):
        monkeypatch.setattr(reference, name, torch.no_grad()(getattr(reference, name)))


# Selective activation checkpointing


def save_fused(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op == FORWARD else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("kind", ["peft", "inject"])
@pytest.mark.parametrize("policy", [PRODUCTS, save_fused], ids=["products", "fused op"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_selective_checkpointing(kind, policy, dropout):
    net = make(kind, dropout)

    def selective(x):
        return checkpoint(net, x, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy))

    torch.manual_seed(4)
    expected = gradients(net, net, INPUT)
    fastlora.reset_dispatch_counts()
    torch.manual_seed(4)
    torch.testing.assert_close(gradients(selective, net, INPUT), expected)
    # Two layers, forward and backward; and once more forward where the op is not among what is saved.
    assert fastlora.dispatch_counts()["reference"] == (4 if policy is save_fused else 6)


@pytest.mark.parametrize("shape", [(4, 12), (2, 5, 12)], ids=str)
def test_a_saved_result_that_is_modified_is_noticed(shape):
    """By torch, which compares versions: the tensor that the caller gets is the one that was saved."""
    layer = LoRALinear(12, 12, r=2)
    context = partial(create_selective_checkpoint_contexts, save_fused)
    x = torch.randn(shape, requires_grad=True)
    y = checkpoint(lambda x: layer(x).relu_(), x, use_reentrant=False, context_fn=context)
    with pytest.raises(RuntimeError, match="has been mutated"):
        y.sum().backward()


# FLOPs


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["peft", "inject"])
@pytest.mark.parametrize("dtypes", [(torch.float32, None), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("x_trains", [True, False])
def test_flops_are_those_of_the_stock_layer(kind, dtypes, x_trains):
    x = INPUT.to(dtypes[0]).requires_grad_(x_trains)
    stock, fused = make("stock", 0.0, *dtypes), make(kind, 0.0, *dtypes)
    assert flops(lambda: fused(x)) == flops(lambda: stock(x)) > 0
    assert flops(lambda: fused(x).sum().backward()) == flops(lambda: stock(x).sum().backward())


def test_flops_of_an_exported_program():
    stock, fused = make("stock"), make("peft")
    (program,) = (torch.export.export(fused, (INPUT,)).module(),)
    assert flops(lambda: program(INPUT)) == flops(lambda: stock(INPUT))
    assert flops(lambda: program(INPUT).sum().backward()) == flops(lambda: stock(INPUT).sum().backward())


@pytest.mark.parametrize("options", [{}, {"transposed": True, "bias": "each"}, {"n_weights": 1}], ids=str)
def test_flops_of_rows_in_segments_are_those_of_the_loop(options):
    case = draw_case([3, 0, 7], 5, 9, 2, **options)
    assert flops(lambda: compute(case)) == flops(lambda: by_loop(case)) == 2 * 10 * (2 * 5 * 9 + 3 * 2 * (5 + 9))


@pytest.mark.parametrize(
    "imports", ["import fastlora, torch.utils.flop_counter", "import torch.utils.flop_counter, fastlora"]
)
def test_the_counter_may_be_imported_first_or_last(imports):
    code = f"""
import sys, torch
{imports}
op = torch.ops.fastlora.lora_forward
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    op(torch.ones(5, 7), torch.ones(3, 7), torch.ones(2, 7), torch.ones(3, 2), None, 1.0, 0.0, None, None)
assert counter.get_total_flops() == 2 * 5 * (3 * 7 + 2 * (3 + 7)), counter.get_total_flops()
op, given = torch.ops.fastlora.grouped_forward, [torch.ones(*s) for s in ((5, 7), (1, 3, 7), (1, 2, 7), (1, 3, 2))]
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    op(*given, None, 1.0, None, torch.tensor([5], dtype=torch.int32), None, None, False, 0.0, None, None)
assert counter.get_total_flops() == 2 * 5 * (3 * 7 + 2 * (3 + 7)), counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fastlora_does_not_import_the_counter():
    code = "import sys, fastlora; assert not {'torch.utils.flop_counter', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Traces and exported programs


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "error::torch.jit.TracerWarning")
def test_a_trace_is_saved_and_reloaded_without_fastlora(tmp_path, with_gradients):
    net = make("inject").eval()
    with torch.set_grad_enabled(with_gradients):
        traced = torch.jit.trace(net, INPUT)
    traced.save(tmp_path / "trace.pt")
    torch.save(INPUT[:, :3], tmp_path / "x.pt")
    code = """
import sys, torch
x = torch.load(sys.argv[1] + "/x.pt")
torch.save(torch.jit.load(sys.argv[1] + "/trace.pt")(x).detach(), sys.argv[1] + "/y.pt")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), net(INPUT[:, :3]))
    if with_gradients:
        torch.testing.assert_close(gradients(traced, traced, INPUT), gradients(net, net, INPUT))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["peft", "inject"])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_an_exported_program_trains(kind, strict, on_gpu, request, recwarn):
    if on_gpu:
        request.getfixturevalue("launches")
    net, stock = make(kind), make("stock")
    program = torch.export.export(net, (INPUT,), strict=strict).module()
    torch.testing.assert_close(program(INPUT), stock(INPUT))
    torch.testing.assert_close(gradients(program, program, INPUT), gradients(stock, stock, INPUT))
    assert not [w for w in recwarn if "autograd kernel" in str(w.message)]


@pytest.mark.parametrize("strict", [False, True])
def test_second_derivatives_of_an_exported_program(strict):
    for trains in (("up.lora_A", "up.lora_B", "down.lora_B"), ("up.lora_B", "down.lora_B")):
        net = make("inject").double()
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name in trains)
        x = INPUT.double()
        program = torch.export.export(net, (x,), strict=strict).module()

        def penalty(call, parameters, x=x):
            x = x.clone().requires_grad_()
            inputs = [x, *parameters]
            slopes = torch.autograd.grad(call(x).square().sum(), inputs, create_graph=True)
            return torch.autograd.grad(sum(s.square().sum() for s in slopes), inputs)

        def composed(x, net=net):
            def layer(x, f):
                return nn.functional.linear(x, f.weight, f.bias) + f.scaling * (x @ f.lora_A.t() @ f.lora_B.t())

            return x + layer(torch.tanh(layer(x, net.up)), net.down)

        ours, theirs = (dict(m.named_parameters()) for m in (program, net))
        torch.testing.assert_close(
            penalty(program, [ours[n] for n in trains]), penalty(composed, [theirs[n] for n in trains])
        )


def test_dropout_of_an_exported_program_draws_anew_and_trains():
    net = make("inject", dropout=0.5).train()
    program = torch.export.export(net, (INPUT,)).module()
    torch.manual_seed(0)
    first = program(INPUT)
    assert not torch.equal(program(INPUT), first)
    torch.manual_seed(0)
    expected = gradients(net, net, INPUT)
    torch.manual_seed(0)
    torch.testing.assert_close(gradients(program, program, INPUT), expected)


def test_the_weight_of_an_exported_program_stays_frozen():
    program = torch.export.export(make("inject"), (INPUT,)).module()
    dict(program.named_parameters())["up.weight"].requires_grad_()
    with pytest.raises(ValueError, match="weight requires a gradient"):
        program(INPUT)


def operators(program):
    return {str(n.target).split(".")[0] for n in program.graph.nodes if n.op == "call_function"} - {
        "<built-in function getitem>"
    }


def check_in_aten(kind, path):
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},)
    net = make(kind, dropout=0.5)
    table = torch.export.default_decompositions()
    table.update(fastlora.decompositions())
    with pytest.raises(Exception, match=r"active dropout has no form in plain ATen: export it after model.eval\(\)"):
        torch.export.export(net.train(), (INPUT,), dynamic_shapes=sizes).run_decompositions(table)
    program = torch.export.export(net.eval(), (INPUT,), dynamic_shapes=sizes)
    assert "fastlora" in operators(program)
    in_aten = program.run_decompositions(table)
    assert not {name for name in operators(in_aten) if name != "aten" and "built-in" not in name}
    other = torch.randn(3, 7, 12)
    torch.testing.assert_close(in_aten.module()(other), net(other))
    torch.export.save(in_aten, path)


@pytest.mark.parametrize("kind", ["peft", "inject"])
def test_an_exported_program_in_aten(tmp_path, kind):
    """In a process of its own: once FlopCounterMode has counted a backward, torch 2.13 cannot decompose programs of
    dynamic shapes, those of plain layers neither. Another process, without fastlora, loads what comes out."""
    path = str(tmp_path / "program.pt2")
    code = "import sys; from tests.integrations.test_modes import check_in_aten; check_in_aten(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, kind, path], check=True)
    code = "import sys, torch; torch.export.load(sys.argv[1]).module()(torch.ones(3, 7, 12))"
    subprocess.run([sys.executable, "-c", code, path], check=True)


def test_the_decomposition_of_the_backward():
    c = numerics.draw_case(9, 8, 12, 3, torch.float64, dropout_p=0.25)
    _, s = FORWARD(c.x, c.weight, c.lora_a, c.lora_b, None, c.scaling, c.dropout_p, c.seed, None)
    in_aten = fastlora.decompositions()[torch.ops.fastlora.lora_backward.default]
    for needs in ([True] * 4, [False, True, False, False], [True, False, True, False]):
        args = (c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, c.scaling, c.dropout_p, c.seed, needs, None)
        torch.testing.assert_close(in_aten(*args), torch.ops.fastlora.lora_backward.default(*args))


def test_a_compiled_exported_program_trains():
    net = make("inject")
    program = torch.export.export(net, (INPUT,)).module()
    compiled = torch.compile(copy.deepcopy(program), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled, compiled, INPUT), gradients(net, net, INPUT))


def test_shapes_under_a_fake_mode():
    """Nothing is computed, and the seed has no value."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, layer = torch.randn(2, 0, 5, requires_grad=True), LoRALinear(5, 4, r=2, dropout=0.5)
        y = lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, 1.0, dropout_p=0.5)
        y.sum().backward()
    assert y.shape == (2, 0, 4) and x.grad.shape == x.shape
