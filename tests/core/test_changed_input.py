"""An input that is modified in place after the layer: an error that names the remedy, and the remedy."""

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoRALinear, lora_linear, ops
from tests.support import numerics


@pytest.fixture(params=["cpu", "as on a GPU"], autouse=True)
def path(request, monkeypatch):
    if request.param != "cpu":
        monkeypatch.setattr(ops, "_skips_ops", lambda tensor: False)


CHANGES = {
    "add": lambda x, y: x.add_(y[..., :1]),
    "index": lambda x, y: x.index_fill_(-1, torch.tensor([0]), 3.0),
    "slice": lambda x, y: x[..., :2].copy_(y[..., :2]),
    "relu": lambda x, y: x.relu_(),
}


def run(change, shape=(2, 3, 6), grads=("x", "a", "b"), **options):
    """Output and gradients of a layer whose input is changed after it; and those of one that never shared its input."""
    case = numerics.draw_case(torch.Size(shape[:-1]).numel(), 6, shape[-1], 2, torch.float64)
    results = []
    for own_copy in (False, True):
        x, a, b = (t.clone().requires_grad_() for t in (case.x.view(shape), case.lora_a, case.lora_b))
        a.requires_grad_("a" in grads), b.requires_grad_("b" in grads)
        torch.manual_seed(0)
        z = x * 1.0
        y = lora_linear(z.clone() if own_copy else z, case.weight, a, b, 1.7, **({} if own_copy else options))
        CHANGES[change](z, y)
        leaves = [t for t in (x, a, b) if t.requires_grad]
        results.append(torch.autograd.grad((z.cos().sum() + y.sin().sum()), leaves))
    return results


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
def test_the_error_names_the_option(change, shape):
    message = rf"the input \[{', '.join(map(str, shape))}\] of a LoRA layer \(6 -> 6, rank 2\).* copy_input=True"
    with pytest.raises(RuntimeError, match=message.replace("rank 2)", r"rank 2\)")) as caught:
        run(change, shape)
    assert "inplace operation" in str(caught.value.__cause__)  # torch's own words: which tensor, which version


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_copy_survives(change, shape, dropout_p):
    if dropout_p:
        ours = run(change, shape, copy_input=True, dropout_p=dropout_p)[0]
        assert all(g.isfinite().all() for g in ours)
    else:
        numerics.assert_reordered(*run(change, shape, copy_input=True), terms=6 + 6 + 2)


def test_no_gradient_reads_x_where_a_is_frozen():
    numerics.assert_reordered(*run("add", grads=("x", "b")), terms=6 + 6 + 2)


def test_another_tensor_that_was_changed_is_not_blamed_on_x():
    case = numerics.draw_case(4, 6, 6, 2, torch.float64)
    x, a, b = (t.clone().requires_grad_() for t in (case.x, case.lora_a, case.lora_b))
    y = lora_linear(x, case.weight, a, b, 1.7)
    with torch.no_grad():
        b.add_(1.0)  # an optimizer's step between forward and backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        y.sum().backward()
    assert "copy_input" not in str(caught.value)


def test_what_is_kept():
    """The copy and S where A trains; where it is frozen, or nothing trains, no copy is made."""
    x = torch.randn(8, 6, requires_grad=True)
    layer = LoRALinear(6, 5, r=2, copy_input=True)

    def storages():
        saved = {}
        held = {p.untyped_storage().data_ptr() for p in layer.parameters()}

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.shape
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = layer(x)
        del kept
        return {key: shape for key, shape in saved.items() if key not in held}

    shapes = storages()
    assert sorted(shapes.values()) == [(8, 2), (8, 6)] and x.untyped_storage().data_ptr() not in shapes
    layer.lora_A.requires_grad_(False)
    assert sorted(storages().values()) == [(8, 2)]


class Residual(nn.Module):
    """A block that adds to its input in place, as much inference code does."""

    def __init__(self, k, dtype):
        super().__init__()
        self.fc = nn.Linear(k, k, dtype=dtype)

    def forward(self, x):
        x += torch.tanh(self.fc(x))
        return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_models(dtype):
    """Through inject and patch, against stock PEFT, whose layers keep copies over a 16-bit base."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(Residual(6, dtype), Residual(6, dtype))
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["fc"], lora_dropout=0.0)
    fastlora.inject(injected := nn.Sequential(Residual(6, dtype), Residual(6, dtype)), ["fc"], r=2, alpha=4)
    model = peft.get_peft_model(base, config)
    for block, twin in zip(base, injected, strict=True):
        nn.init.normal_(block.fc.lora_B["default"].weight)
        twin.fc.weight.data, twin.fc.bias.data = block.fc.base_layer.weight.data, block.fc.base_layer.bias.data
        twin.fc.lora_A.data = block.fc.lora_A["default"].weight.data.to(dtype)
        twin.fc.lora_B.data = block.fc.lora_B["default"].weight.data.to(dtype)
        assert not twin.fc.copy_input
        twin.fc.copy_input = True

    def gradients(net):
        out = net(torch.linspace(-1, 1, 24).view(4, 6).to(dtype)).double().square().sum()
        return torch.autograd.grad(out, [p for p in net.parameters() if p.requires_grad])

    copied = [g.double() for g in gradients(injected)]
    fastlora.integrations.peft.patch(model)
    with pytest.raises(RuntimeError, match="copy_input=True to lora_linear, LoRALinear, inject or patch"):
        gradients(model)
    fastlora.integrations.peft.patch(model, copy_input=True)
    fused = [g.double() for g in gradients(model)]
    fastlora.integrations.peft.unpatch(model)
    assert not any("copy_input" in vars(m) for m in model.modules())
    if dtype == torch.bfloat16:
        stock = [g.double() for g in gradients(model)]
        for ours, theirs in zip(fused, stock, strict=True):
            assert (ours - theirs).norm() <= 4 * torch.finfo(dtype).eps * theirs.norm()
    else:
        numerics.assert_reordered(fused, copied, terms=2 * (6 + 6 + 2))


def test_the_option_everywhere():
    assert LoRALinear.from_linear(nn.Linear(3, 2), copy_input=True).copy_input
    fastlora.inject(model := nn.Sequential(nn.Linear(3, 2)), ["0"], copy_input=True)
    assert model[0].copy_input and "copy_input=True" in repr(model) and "copy_input" not in repr(LoRALinear(3, 2))
