"""DoRA: values and gradients against torch's own, the norm and when it is made, LoRALinear, files."""

import copy
import json
import math
import pickle
import struct

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastlora
from fastlora import dora
from fastlora.conv1d import LoRAConv1D
from fastlora.dora import WITH_DROPOUT, Norms, dora_linear, squared_norm, weight_norm
from fastlora.model import lora_layers
from fastlora.module import LoRALinear
from tests.support.numerics import assert_reordered

SCALING = 1.7
NAMES = ("x", "lora_a", "lora_b", "magnitude", "bias")


def draw(dtype=torch.float64, adapter_dtype=None, n=7, k=5, r=2, rows=(2, 3)):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (*rows, k), "weight": (n, k), "lora_a": (r, k), "lora_b": (n, r), "magnitude": (n,), "bias": (n,)}
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    drawn["magnitude"] = drawn["magnitude"].abs() + 0.5
    adapter_dtype = adapter_dtype or dtype
    adapters = ("lora_a", "lora_b", "magnitude")
    return {name: t.to(adapter_dtype if name in adapters else dtype) for name, t in drawn.items()}


def call(t, **options):
    return dora_linear(
        t["x"], t["weight"], t["lora_a"], t["lora_b"], SCALING, t["magnitude"], t["bias"], **options
    )  # fmt: skip


def composed(t):
    """The definition, with an N x K weight."""
    norm = (t["weight"] + SCALING * t["lora_b"] @ t["lora_a"]).norm(dim=1).detach()
    y = F.linear(t["x"], t["weight"]) + SCALING * F.linear(F.linear(t["x"], t["lora_a"]), t["lora_b"])
    return y * (t["magnitude"] / norm) + t["bias"]


def step(function, drawn, **options):
    leaves = {name: t.clone().requires_grad_(name in NAMES) for name, t in drawn.items()}
    y = function(leaves, **options)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    (y.double() * weights).sum().backward()
    return {"y": y.detach(), **{name: leaves[name].grad for name in NAMES}}


def error(value, truth):
    return ((value.double() - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("rows", [(2, 3), (), (600,), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(dtype, rows):
    """The norm gets no gradient: with one, dA and dB differ in their first digit."""
    drawn = draw(dtype, rows=rows)
    got, wanted = step(call, drawn), step(composed, drawn)
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape
    if terms := wanted["y"].numel():  # at least as many as the longest sum has
        assert_reordered([got[name] for name in wanted], wanted.values(), terms)


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_against_fp64(dtype, adapter_dtype):
    """As exact as the definition by torch's products in the same dtypes (in float32 adapters: of A's dtype)."""
    drawn = draw(dtype, adapter_dtype, n=40, k=64, r=4, rows=(50,))
    truth = step(composed, {name: t.double() for name, t in drawn.items()})
    got = step(call, drawn)
    eager = step(composed, {name: t.to(dtype) for name, t in drawn.items()})
    for name in truth:
        assert got[name].dtype == drawn.get(name, drawn["x"]).dtype
        assert error(got[name], truth[name]) <= max(1.25 * error(eager[name], truth[name]), torch.finfo(dtype).eps), (
            name
        )


def test_second_derivatives_and_frozen_parts():
    drawn = draw()
    norm = weight_norm(drawn["weight"], drawn["lora_a"], drawn["lora_b"], SCALING)

    class Constant(Norms):
        def of(self, *_):
            return norm

    def function(*tensors):
        return call({"weight": drawn["weight"], **dict(zip(NAMES, tensors, strict=True))}, norms=Constant())

    leaves = [drawn[name].clone().requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(function, leaves) and torch.autograd.gradgradcheck(function, leaves)
    for frozen in NAMES:
        parts = {name: t.clone().requires_grad_(name in NAMES and name != frozen) for name, t in drawn.items()}
        call(parts).pow(2).sum().backward()
        assert parts[frozen].grad is None and all(parts[n].grad is not None for n in NAMES if n != frozen)
    with torch.no_grad():
        torch.testing.assert_close(call(drawn), composed(drawn))


def test_transforms_autocast_and_compile():
    drawn = draw(torch.float32)
    x = drawn["x"]
    mapped = torch.func.vmap(lambda row: call({**drawn, "x": row}))(x)
    torch.testing.assert_close(mapped, composed(drawn))
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, wanted = step(lambda t: compiled(t), drawn), step(composed, drawn)
    assert_reordered([got[name] for name in wanted], wanted.values(), terms=wanted["y"].numel())
    with torch.autocast("cpu", torch.bfloat16):
        y = call({name: t.clone().requires_grad_(name in NAMES) for name, t in drawn.items()})
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), composed(drawn), rtol=0.05, atol=0.05)
    y.float().sum().backward()


def test_dropout_in_training_is_torchs_and_counted():
    drawn = draw()
    fastlora.reset_dispatch_counts()
    torch.manual_seed(1)
    got = step(call, drawn, dropout_p=0.5)
    assert fastlora.dispatch_counts()["fallbacks"] == {WITH_DROPOUT: 1}
    torch.manual_seed(1)
    dropped = F.dropout(drawn["x"], 0.5)
    norm = weight_norm(drawn["weight"], drawn["lora_a"], drawn["lora_b"], SCALING)
    g = drawn["magnitude"] / norm
    base, branch = drawn["weight"], SCALING * drawn["lora_b"] @ drawn["lora_a"]
    y = F.linear(drawn["x"], base, drawn["bias"]) + F.linear(dropped, (g - 1)[:, None] * base + g[:, None] * branch)
    torch.testing.assert_close(got["y"], y)
    torch.testing.assert_close(call(drawn, dropout_p=0.5, training=False), composed(drawn))
    with pytest.raises(ValueError, match=r"magnitude must be \[7\], got \[6\]"):
        call({**drawn, "magnitude": drawn["magnitude"][1:]})


# The norm


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_without_a_temporary_of_the_weights_size(dtype, transposed, monkeypatch):
    monkeypatch.setattr(dora, "_CPU_ELEMENTS", 6 * 100)
    torch.manual_seed(0)
    weight, a, b = torch.randn(90, 100).to(dtype), torch.randn(3, 100).to(dtype), torch.randn(90, 3).to(dtype)
    rows = weight.t().contiguous().t() if transposed else weight
    made = []

    class Made(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != rows.data_ptr():
                made.append(result.numel())
            return result

    with Made():
        norm = weight_norm(rows, a, b, SCALING)
    assert max(made) < weight.numel() / 10
    truth = (weight.double() + SCALING * b.double() @ a.double()).norm(dim=1)
    assert norm.dtype == torch.promote_types(dtype, torch.float32) and error(norm, truth) < 1e-6
    torch.testing.assert_close(squared_norm(rows).double(), weight.double().square().sum(1), rtol=1e-5, atol=0)


def test_a_row_that_the_branch_takes_away_has_a_norm_of_zero_and_no_nan():
    a, b = torch.eye(3), torch.tensor([[-1.0, 0.0, 0.0], [0.5, 2.0, 0.0]])
    weight = torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    norm = weight_norm(weight, a, b, 1.0)
    assert norm[0] == 0 and norm[1] > 0


@pytest.fixture
def made(monkeypatch):
    """How often the norms of a frozen weight, and those of a weight with its branch, were made."""
    counts = {"base": 0, "all": 0}
    base, whole = dora.squared_norm, dora.weight_norm

    def count_base(rows):
        counts["base"] += 1
        return base(rows)

    def count_all(*args):
        counts["all"] += 1
        return whole(*args)

    monkeypatch.setattr(dora, "squared_norm", count_base)
    monkeypatch.setattr(dora, "weight_norm", count_all)
    return counts


def layer(cls=LoRALinear, **options):
    torch.manual_seed(0)
    module = cls(6, 5, r=2, alpha=3, dora=True, **options)
    with torch.no_grad():
        module.weight.normal_(std=0.4), module.lora_B.normal_(), module.lora_magnitude_vector.mul_(1.3)
    return module


def test_the_norm_is_made_when_something_has_changed_and_only_then(made):
    module, x = layer().eval(), torch.randn(3, 6)
    made.update(base=0, all=0)

    def renewed():
        before = dict(made)
        with torch.no_grad():
            y = module(x)
        parts = {"x": x, "weight": module.weight, "lora_a": module.lora_A, "lora_b": module.lora_B}
        parts |= {"magnitude": module.lora_magnitude_vector, "bias": module.bias}
        norm = (parts["weight"] + module.scaling * parts["lora_b"] @ parts["lora_a"]).norm(dim=1)
        expected = F.linear(x, parts["weight"] + module.scaling * parts["lora_b"] @ parts["lora_a"])
        torch.testing.assert_close(y, expected * (parts["magnitude"] / norm) + parts["bias"])
        return {name: made[name] - before[name] for name in made}

    nothing, branch, everything = {"base": 0, "all": 0}, {"base": 0, "all": 1}, {"base": 1, "all": 1}
    assert renewed() == everything and renewed() == nothing
    module.lora_magnitude_vector.data.mul_(2)  # it is no part of the norm
    assert renewed() == nothing
    for factor in (module.lora_A, module.lora_B):
        with torch.no_grad():
            factor[0, 0] += 1
        assert renewed() == branch and renewed() == nothing
    module.scaling *= 2
    assert renewed() == branch and renewed() == nothing
    module.lora_A.data = module.lora_A.data + 1
    assert renewed() == branch
    module.lora_B = nn.Parameter(module.lora_B.detach() + 1)
    assert renewed() == branch
    with torch.no_grad():
        module.weight.add_(1)
    assert renewed() == everything and renewed() == nothing
    module.weight = nn.Parameter(module.weight.detach() * 2)
    assert renewed() == everything and renewed() == nothing
    module.lora_B.data.add_(1)  # unseen by torch; an optimiser that does so follows a backward
    before = dict(made)
    module(x).sum().backward()
    assert made == before  # nor seen here
    assert renewed() == branch and renewed() == nothing
    module.double(), module.float()
    assert renewed() == everything
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert clone._norms is not module._norms and torch.equal(clone(x), module(x))


def test_nothing_is_kept_where_a_change_would_not_be_seen(made, monkeypatch):
    module, x = layer().eval(), torch.randn(3, 6)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    made.update(base=0, all=0)
    module(x), module(x)
    assert made == {"base": 2, "all": 2}
    monkeypatch.undo()
    with torch.inference_mode():
        other = layer().eval()
        assert torch.equal(other(x), other(x))


def test_a_freed_factor_is_never_taken_for_its_successor():
    """In the same place, with the same version."""
    module, x = layer().eval(), torch.randn(3, 6)
    place, kept = bytearray(2 * 6 * 4), []
    for index in range(20):
        kept += [torch.empty(1) for _ in range(50)]  # whatever else was freed is taken: what is freed next comes next
        place[:] = struct.pack("12f", *(math.sin(12 * index + i) for i in range(12)))
        del module.lora_A  # and nothing is allocated in between
        module.lora_A = nn.Parameter(torch.frombuffer(place, dtype=torch.float32).view(2, 6))
        with torch.no_grad():
            y = module(x)
            delta = module.weight + module.scaling * module.lora_B @ module.lora_A
            expected = F.linear(x, delta) * (module.lora_magnitude_vector / delta.norm(dim=1)) + module.bias
        assert_reordered([y], [expected], terms=6 * 2)


# The layer


def test_it_starts_as_the_frozen_layer_and_says_what_it_is():
    for dtype in (torch.float32, torch.bfloat16):
        plain = nn.Linear(6, 5).to(dtype)
        for adapter_dtype in {torch.float32, dtype}:
            module = LoRALinear.from_linear(plain, r=2, dora=True, adapter_dtype=adapter_dtype)
            x = torch.randn(3, 6).to(dtype)
            expected = plain(x)  # rounded once; a DoRA layer rounds in front of the bias, too
            assert error(module(x), expected.double()) <= 2 * torch.finfo(dtype).eps
            assert module.lora_magnitude_vector.dtype == adapter_dtype
    assert "dora=True" in repr(module) and "dora" not in repr(LoRALinear(2, 2))
    assert set(module.state_dict()) == {"weight", "bias", "lora_A", "lora_B", "lora_magnitude_vector"}
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    assert fastlora.inject(model, ["1"], r=2, dora=True) == ["1"]
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {"1.lora_A", "1.lora_B", "1.lora_magnitude_vector"}
    with pytest.raises(TypeError, match="here it is called 'dora'"):
        fastlora.inject(model, ["0"], use_dora=True)
    meta = LoRALinear(6, 5, dora=True, device="meta").to_empty(device="cpu")
    meta.reset_parameters()
    torch.testing.assert_close(meta.lora_magnitude_vector, meta.weight.norm(dim=1))


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("cls", [LoRALinear, LoRAConv1D])
def test_merge_unmerge_unload(cls, keep_base):
    module, x = layer(cls), torch.randn(3, 6)
    expected, start = module(x), module.weight.clone()
    if cls is LoRAConv1D:
        module.plain_class = pytest.importorskip("transformers.pytorch_utils").Conv1D
    module.merge(safe=True, keep_base=keep_base)
    torch.testing.assert_close(module(x), expected)
    module.unmerge()
    torch.testing.assert_close(module.weight, start, **({"rtol": 0, "atol": 0} if keep_base else {}))
    torch.testing.assert_close(module(x), expected)
    assert not dict(module.named_buffers())
    module.merge(keep_base=keep_base)
    module.unload()
    torch.testing.assert_close(module(x), expected)
    assert set(module.state_dict()) == {"weight", "bias"} and not hasattr(module, "_norms")
    lost = layer(cls)
    with torch.no_grad():
        lost.lora_magnitude_vector[1] = 0
    lost.merge(keep_base=False)
    with pytest.raises(ValueError, match="a magnitude is 0, and the frozen weights behind it are gone"):
        lost.unmerge()


def injected(dora=True, seed=0):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"q": nn.Linear(6, 5), "k": nn.Linear(6, 6, bias=False)})
    fastlora.inject(model, ["q", "k"], r=2, alpha=3, dora=dora)
    for _, each in lora_layers(model):
        nn.init.normal_(each.lora_B)
        if dora:
            each.lora_magnitude_vector.data.mul_(1.3)
    return model


def test_files(tmp_path):
    model, x = injected(), torch.randn(3, 6)
    fastlora.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    torch.manual_seed(0)
    fresh = nn.ModuleDict({"q": nn.Linear(6, 5), "k": nn.Linear(6, 6, bias=False)})
    for other in (fresh, injected(seed=3)):
        assert fastlora.load_adapter(other, tmp_path) == ["q", "k"]
        for path, each in lora_layers(other):
            assert each.dora and torch.equal(each.lora_magnitude_vector, model[path].lora_magnitude_vector)
    assert torch.equal(fresh["q"](x), model["q"](x))
    with pytest.raises(ValueError, match="DoRA in the file or in the model alone: q, k"):
        fastlora.load_adapter(injected(dora=False), tmp_path)
    with pytest.raises(ValueError, match="is DoRA, whose change of a weight is not B·A alone"):
        fastlora.adapters.files.read_adapter(tmp_path)
    from fastlora.integrations.state_dicts import adapter_state_dict, load_adapter_state_dict

    for refused in (lambda: adapter_state_dict(model), lambda: load_adapter_state_dict(model, {})):
        with pytest.raises(ValueError, match="magnitudes of DoRA layers"):
            refused()
    mixed = nn.ModuleDict({"a": injected(), "b": injected(dora=False)})
    with pytest.raises(ValueError, match="cannot save DoRA layers beside others in one adapter file: b.q, b.k"):
        fastlora.save_adapter(mixed, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


@pytest.mark.parametrize("damage", ["missing", "shape", "plain"])
def test_damaged_files(damage, tmp_path):
    from safetensors.torch import load_file, save_file

    fastlora.save_adapter(injected(), tmp_path)
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    state, key = load_file(path), "base_model.model.q.lora_magnitude_vector"
    if damage == "missing":
        del state[key]
    elif damage == "shape":
        state[key] = torch.ones(6)
    else:
        config.write_text(config.read_text().replace('"use_dora": true', '"use_dora": false'))
    save_file(state, path)
    message = {
        "missing": f"missing: {key}",
        "shape": r"lora_magnitude_vector \[6\], lora_B \[5, 2\]",
        "plain": f"unexpected: .*{key}",
    }[damage]
    model = nn.ModuleDict({"q": nn.Linear(6, 5), "k": nn.Linear(6, 6, bias=False)})
    with pytest.raises(ValueError, match=message):
        fastlora.load_adapter(model, tmp_path)
    assert not list(lora_layers(model))


def test_nested_inputs_and_parametrizations():
    module = layer()
    parts = [torch.randn(2, 6), torch.randn(3, 6)]
    y = module(torch.nested.nested_tensor(parts, layout=torch.jagged))
    for got, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(got, module(part))

    class Double(nn.Module):
        def forward(self, factor):
            return 2 * factor

    expected = layer()
    with torch.no_grad():
        expected.lora_A.mul_(2)
    nn.utils.parametrize.register_parametrization(module, "lora_A", Double())
    x = torch.randn(3, 6)
    torch.testing.assert_close(module(x), expected(x))
    module(x).sum().backward()
    assert module.parametrizations.lora_A.original.grad is not None
