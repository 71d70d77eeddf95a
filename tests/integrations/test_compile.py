"""torch.compile without graph breaks or recompilation, and torch.export, of LoRALinear and of patched PEFT layers."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import fastlora
from fastlora.model import inject
from fastlora.module import LoRALinear


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def make_injected(dropout=0.0):
    torch.manual_seed(0)
    model = Net()
    inject(model, ["up", "down"], r=3, dropout=dropout)
    return model


def make_patched(dropout=0.0, **config):
    peft = pytest.importorskip("peft")
    from fastlora.integrations.peft import patch

    torch.manual_seed(0)
    model = peft.get_peft_model(
        Net(), peft.LoraConfig(r=3, target_modules=["up", "down"], lora_dropout=dropout, **config)
    )
    patch(model, strict=True)
    return model


MODELS = {"inject": make_injected, "peft": make_patched}


@pytest.fixture(params=MODELS)
def make(request):
    def start(**kwargs):
        model = MODELS[request.param](**kwargs)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        return model

    fastlora.reset_dispatch_counts()
    return start


@pytest.fixture(autouse=True)
def recompiling_raises():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def graphs():
    return counters["stats"]["unique_graphs"]


def train(model, batches):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for batch in batches:
        loss = model(batch).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def batches_of(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, size, 12, generator=generator) for size in sizes]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dynamic", [None, True])
def test_training_compiles_to_one_graph(make, dynamic, dropout):
    model = make(dropout=dropout)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    batches = batches_of(5, 5, 5, 5) if dynamic is None else batches_of(5, 7, 4, 9)
    torch.manual_seed(3)
    losses = train(compiled, batches)
    assert graphs() == 1
    calls = fastlora.dispatch_counts()
    assert calls["fallbacks"] == {} and calls["cuda"] + calls["triton"] + calls["reference"] == 2 * 2 * 4
    torch.manual_seed(3)
    torch.testing.assert_close(losses, train(eager, batches))
    assert losses[0] != losses[-1]


def test_inductor(make):
    model = make(dropout=0.2)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    batches = batches_of(4, 4)
    # Inductor draws from a generator of its own; without dropout the numbers are those of eager.
    assert not torch.equal(train(compiled, batches), train(compiled, batches))
    model.load_state_dict(eager.state_dict())
    torch._dynamo.reset()
    compiled.eval(), eager.eval()
    torch.testing.assert_close(train(compiled, batches), train(eager, batches))


def test_mixed_precision_compiles(make):
    model = make()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(train(compiled, batches_of(3, 3)), train(eager, batches_of(3, 3)))


@torch._dynamo.config.patch(error_on_recompile=False)  # merged and not are two graphs
def test_a_compiled_model_merges(make):
    model = make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (x,) = batches_of(3)
    before = compiled(x)
    layers = [m for m in model.modules() if hasattr(m, "merge") and hasattr(m, "lora_A")]
    assert len(layers) == 2
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(compiled(x), before)
    for layer in layers:
        layer.unmerge()
    torch.testing.assert_close(compiled(x), before)


def test_compiled_hotswap_does_not_recompile(tmp_path):
    pytest.importorskip("peft")
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    other = make_patched(lora_alpha=3)
    for name, parameter in other.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    other.save_pretrained(tmp_path)
    model = make_patched()
    prepare_model_for_compiled_hotswap(model)
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    (x,) = batches_of(3)
    before = compiled(x)
    hotswap_adapter(compiled, str(tmp_path), "default")
    torch.testing.assert_close(compiled(x), other.eval()(x))
    assert graphs() == 1 and not torch.equal(compiled(x), before)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_shapes(make, strict):
    model = make().eval()
    size = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    (x,) = batches_of(5)
    if hasattr(model, "peft_config"):
        model = model.base_model.model  # PeftModel's own forward takes *args
    program = torch.export.export(model, (x,), dynamic_shapes={"x": size}, strict=strict)
    other = torch.randn(3, 8, 12)
    torch.testing.assert_close(program.module()(other), model(other))
    assert "fastlora.lora_forward" in program.graph_module.print_readable(print_output=False)
    assert fastlora.dispatch_counts()["fallbacks"] == {}


def test_export_of_a_merged_layer_has_no_branch():
    layer = LoRALinear(12, 20, r=3).eval()
    layer.merge()
    program = torch.export.export(layer, (torch.randn(2, 12),))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.linear.default"]
