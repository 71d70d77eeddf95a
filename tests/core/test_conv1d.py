"""A base weight [in, out]: transformers' Conv1D under inject, and the transposed view of it under every backend."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora import selection
from fastlora.backends import composed, reference
from fastlora.conv1d import LoRAConv1D
from fastlora.operands import describe_backward, describe_forward
from fastlora.problem import BackwardOperands, ForwardOperands, LaunchSpec, Needs, Sizes
from tests.support import launches, numerics

ALL = Needs(True, True, True, True)
OF_THE_BRANCH = {"r": 3, "alpha": 5}


def conv1d(nf, nx, seed=0):
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(nf, nx)
    torch.manual_seed(seed)
    nn.init.normal_(layer.weight, std=0.4)
    nn.init.normal_(layer.bias)
    return layer


def pair(**options):
    """A model of one Conv1D with a branch, and of the nn.Linear that computes the same; one factor for both."""
    narrow = nn.ModuleDict({"c_attn": conv1d(7, 6)})
    linear = nn.Linear(6, 7)
    with torch.no_grad():
        linear.weight.copy_(narrow["c_attn"].weight.t()), linear.bias.copy_(narrow["c_attn"].bias)
    both = narrow, nn.ModuleDict({"c_attn": linear})
    for model in both:
        torch.manual_seed(1)
        assert fastlora.inject(model, ["c_attn"], **OF_THE_BRANCH, **options) == ["c_attn"]
        nn.init.normal_(model["c_attn"].lora_B)
    return both


def test_a_branch_on_a_conv1d_is_the_branch_on_its_linear():
    ours, linear = pair(dropout=0.5)
    assert type(ours["c_attn"]) is LoRAConv1D and ours["c_attn"].weight.shape == (6, 7)
    x = torch.randn(2, 3, 6)
    results = []
    for model in (ours, linear):
        leaf = x.clone().requires_grad_(True)
        torch.manual_seed(2)
        y = model["c_attn"](leaf)
        y.pow(2).sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) == 4
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("keep_base", [True, False])
def test_merge_unmerge_unload(keep_base):
    model, linear = pair()
    layer, x = model["c_attn"], torch.randn(5, 6)
    start = layer.weight.clone()
    fastlora.merge(model, safe=True, keep_base=keep_base)
    torch.testing.assert_close(layer.weight, linear["c_attn"].merged_weight().t())
    torch.testing.assert_close(layer(x), linear["c_attn"](x))
    fastlora.unmerge(model)
    torch.testing.assert_close(layer.weight, start, **({"rtol": 0, "atol": 0} if keep_base else {}))
    expected = model["c_attn"](x)
    plain = fastlora.merge_and_unload(model)["c_attn"]
    original = conv1d(7, 6)
    assert type(plain) is type(original) and vars(plain).keys() == vars(original).keys()
    assert (plain.nx, plain.nf) == (6, 7) and list(plain.state_dict()) == list(original.state_dict())
    torch.testing.assert_close(plain(x), expected)
    assert repr(plain) == repr(original)


def test_state_dicts_copies_and_starts():
    model, _ = pair()
    layer = model["c_attn"]
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    x = torch.randn(5, 6)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone["c_attn"](x), layer(x))
    clone.load_state_dict(model.state_dict())
    meta = LoRAConv1D(6, 7, r=2, device="meta").to_empty(device="cpu")
    meta.reset_parameters()
    assert meta.weight.shape == (6, 7) and not meta.weight.requires_grad and not meta.lora_B.any()
    assert meta.weight.std() < 0.1 and meta(x).shape == (5, 7)
    with pytest.raises(TypeError, match="needs transformers' Conv1D, got Linear"):
        LoRAConv1D.from_linear(nn.Linear(2, 2))

    class Own(type(conv1d(2, 2))):
        pass

    with pytest.raises(ValueError, match="own: it is a .*Own, not a plain nn.Linear"):
        fastlora.inject(nn.ModuleDict({"own": Own(2, 2), "c": conv1d(2, 2)}), ["own"])


# What backends get


def operands(case, weight):
    c = case
    forward = ForwardOperands(c.x, weight, c.lora_a, c.lora_b, c.bias, c.scaling, 0.0, None)
    s = torch.zeros(c.x.shape[0], c.lora_a.shape[0], dtype=c.x.dtype)
    return forward, BackwardOperands(c.dy, c.x, weight, c.lora_a, c.lora_b, s, c.scaling, 0.0, None)


@pytest.mark.parametrize("n, k", [(16, 24), (24, 24), (2, 24)])
def test_a_transposed_weight_is_passed_on_as_it_lies(n, k):
    case = numerics.draw_case(9, n, k, 8, torch.bfloat16)
    stored = case.weight.t().contiguous()
    forward, backward = operands(case, stored.t())
    for described, spec in (describe_forward(forward), describe_backward(backward, ALL)):
        assert described.weight.data_ptr() == stored.data_ptr() and spec.base_format == "transposed"
        assert spec.strides.weight == n and spec.sizes == Sizes(9, n, k, 8)
        assert spec.aligned.weight is (n * 2 % 16 == 0) and spec.starts.weight
    forward, _ = operands(case, case.weight)
    assert describe_forward(forward)[1].base_format == "dense"


@pytest.mark.parametrize("backend", [composed, reference], ids=["composed", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_without_a_copy_of_the_weight(backend, dtype):
    case = numerics.draw_case(20, 72, 56, 5, dtype)
    weight = case.weight.t().contiguous().t()
    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.data_ptr() != weight.data_ptr():
                    made.append(tensor.numel())
            return result

    c = case
    with Made():
        y, s = launches.forward(backend, c.x, weight, c.lora_a, c.lora_b, c.bias, c.scaling, 0.0, None)
        got = launches.backward(backend, c.dy, c.x, weight, c.lora_a, c.lora_b, s, c.scaling, 0.0, None, ALL)
    assert weight.numel() not in made and made
    numerics.assert_accurate({"y": y, **{n: g for n, g in got._asdict().items() if g is not None}}, case)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_on_a_gpu_triton_serves_it_where_cuda_says_why_not(direction, monkeypatch):
    from fastlora.backends.target import Target

    monkeypatch.setattr(selection, "triton_unusable", lambda device=None: None)
    monkeypatch.setattr(selection, "target_of", lambda device: Target(90, 132))
    half, gpu = torch.bfloat16, torch.device("cuda", 0)
    spec = LaunchSpec(direction, Sizes(2048, 64, 64, 72), half, (half, half), gpu, base_format="transposed", needs=ALL)
    assert selection.select_backend(spec, None)[0] == "triton"
    cuda = selection.backend_module("cuda")
    try:
        assert cuda.why_not_compiled(spec._replace(base_format="dense")) is None
    except RuntimeError:
        return  # not built here
    assert "transposed base weight" in cuda.why_not_compiled(spec)
    assert cuda.why_not_compiled(spec._replace(sizes=Sizes(2048, 64, 64, 64))) is None
