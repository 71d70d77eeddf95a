"""fastlora.warmup: what it compiles is what a run asks for, side by side, and nothing is launched."""

import itertools

import pytest
import torch
from torch import nn
from triton.runtime import _async_compile
from triton.runtime.jit import JITFunction

import fastlora
from fastlora import routes, selection
from fastlora.backends import workspace
from fastlora.backends.target import Target
from fastlora.backends.triton import launch as triton_lora
from fastlora.backends.triton import masked, projection_launch
from fastlora.bench.cases import LLAMA_8B
from fastlora.problem import Needs
from fastlora.projections import (
    Projection,
    SharedBackward,
    SharedForward,
    describe_shared_backward,
    describe_shared_forward,
)
from fastlora.shared_input.plan import group
from tests.support.compile_target import compile_for
from tests.support.injected_experts import make_injected
from tests.support.specialisations import DROPOUT, RANK, Step, asked_for, walk
from tests.support.tiny_moe import make_peft, peft, randomise

from fastlora.integrations.peft import patch  # isort: skip

needs_compiler = pytest.mark.skipif(
    triton_lora.triton.knobs.runtime.interpret, reason="the interpreter compiles nothing"
)


@pytest.fixture
def on_triton(monkeypatch):
    """Any layer's calls may be Triton's."""
    monkeypatch.setattr(selection, "why_unsupported", lambda name, spec: None)
    routes.forget_routes()
    yield
    routes.forget_routes()


@pytest.fixture
def nothing_compiled(monkeypatch):
    """What other tests have compiled in this process is forgotten meanwhile."""
    for module in (triton_lora, masked):
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                monkeypatch.delitem(kernel.device_caches, 80, raising=False)


def llama(dropout: float = DROPOUT, **options) -> nn.Module:
    """The projections of two decoder layers on "meta"."""
    made = [
        fastlora.LoRALinear(k, n, bias=False, r=RANK, dropout=dropout, device="meta", dtype=torch.bfloat16, **options)
        for n, k in LLAMA_8B * 2
    ]
    return nn.Sequential(*made)


@needs_compiler
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize("tokens", (None, [96, 8192]))
def test_a_run_compiles_nothing_after_a_warm_up(on_triton, arch, tokens):
    with asked_for(arch) as found:
        warmed = fastlora.warmup(llama(), tokens, backend="triton")
        foreseen = set(found)
        lengths = (65, 127, 500, 1024, 3001, 4096, 16384) if tokens is None else tokens
        walk(
            Step(m, trains, captured)
            for m in lengths
            for trains, captured in ((True, False), (True, True), (False, False))
        )
    assert warmed.layers == 8 and 0 < len(foreseen) <= 12
    assert found == foreseen


@needs_compiler
def test_groups_are_compiled_as_their_calls_are(on_triton):
    """Besides their layers alone; once for all decoder layers of a kind."""
    model = nn.ModuleList()
    for _ in range(2):
        options = {"bias": False, "r": RANK, "device": "meta", "dtype": torch.bfloat16, "dropout": DROPOUT}
        names = {"q": 512, "k": 128, "v": 128}
        model.append(nn.ModuleDict({name: fastlora.LoRALinear(512, n, **options) for name, n in names.items()}))
    group(model, {str(i): [tuple(names)] for i in range(2)}, fastlora.LoRALinear)
    with asked_for(90) as found:
        assert fastlora.warmup(model, (512, 4096), backend="triton").layers == 6
        foreseen = set(found)
        for m, p in itertools.product((500, 4001), (DROPOUT, 0.0)):
            layers = list(model[0].values())
            x = torch.empty(m, 512, dtype=torch.bfloat16, device="meta")
            seed = torch.tensor(16) if p else None
            projections = tuple(
                Projection(each.weight, each.lora_A, each.lora_B, None, each.scaling, p, seed) for each in layers
            )
            operands, spec = describe_shared_forward(SharedForward(x, projections))
            projection_launch.prepare(spec).compile(operands)
            if p:
                dys, ss = (tuple(x.new_empty(m, each.lora_B.shape[i]) for each in layers) for i in (0, 1))
                needs = (Needs(True, True, True, False),) * 3
                operands, spec = describe_shared_backward(SharedBackward(dys, x, projections, ss, needs))
                projection_launch.prepare(spec).compile(operands)
    assert found == foreseen
    assert {"projections_forward_kernel", "projections_backward_kernel"} <= {name for name, _ in found}


@needs_compiler
def test_what_is_not_asked_for_is_not_compiled(on_triton):
    names = {}
    for kind in ("training", "evaluation"):
        with asked_for(90) as found:
            fastlora.warmup(llama(), 4096, backend="triton", **{kind: False})
        names[kind] = {name for name, _ in found}
    assert names == {"training": {"lora_forward_kernel"}, "evaluation": {"lora_forward_kernel", "lora_backward_kernel"}}


@needs_compiler
def test_kernels_are_compiled_side_by_side_once_and_loaded(on_triton, nothing_compiled, monkeypatch):
    """For real, and then launched without another compilation."""
    layer = fastlora.LoRALinear(64, 64, r=8, dtype=torch.float16)
    begun, hooked = [], []
    submit = _async_compile.AsyncCompileMode.submit
    monkeypatch.setattr(_async_compile.AsyncCompileMode, "submit", lambda *args: begun.append(1) or submit(*args))
    monkeypatch.setattr(triton_lora.triton.knobs.runtime, "jit_cache_hook", lambda **found: hooked.append(1) and False)
    monkeypatch.setattr(workspace, "_by_stream", {})
    with compile_for(80) as driver:
        warmed = fastlora.warmup(layer, (16, 13), backend="triton", workers=2)
        assert (warmed.layers, warmed.kernels, len(begun), driver.launched) == (1, 2, 2, [])
        assert len(hooked) == 2
        monkeypatch.setenv("FASTLORA_BACKEND", "triton")
        monkeypatch.setattr("fastlora.ops._skips_ops", lambda tensor: False)
        layer(torch.ones(11, 64, dtype=torch.float16, requires_grad=True)).sum().backward()
        assert len(driver.launched) == 2 and len(hooked) == 2


@needs_compiler
def test_the_composed_layers_kernels_are_compiled_too(on_triton, nothing_compiled, monkeypatch):
    """Float32 with dropout is theirs. Few rows and many ask for different ones: a sum in parts, and none."""
    keys = set()
    hook = lambda **found: keys.add((found["repr"], found["key"]))  # noqa: E731
    monkeypatch.setattr(triton_lora.triton.knobs.runtime, "jit_cache_hook", hook)
    monkeypatch.setattr(workspace, "_by_stream", {})
    monkeypatch.setattr(masked, "target_of", lambda device: Target(80, 4))
    layer = fastlora.LoRALinear(1024, 64, r=8, dropout=0.3)
    with compile_for(80) as driver:
        warmed = fastlora.warmup(layer, (40, 1000), backend="composed", workers=2)
        assert (warmed.kernels, len(keys), driver.launched) == (3, 3, [])
        assert fastlora.warmup(layer, (40, 1000), backend="composed", training=False).kernels == 0
        monkeypatch.setenv("FASTLORA_BACKEND", "composed")
        monkeypatch.setattr("fastlora.ops._skips_ops", lambda tensor: False)
        for rows in (40, 1000):
            layer(torch.ones(rows, 1024, requires_grad=True)).sum().backward()
        assert len(driver.launched) == 4 and len(keys) == 3


def test_on_a_cpu_there_is_nothing_to_compile():
    model = nn.Sequential(fastlora.LoRALinear(8, 8, r=2), nn.Linear(8, 8))
    assert fastlora.warmup(model)[:2] == (1, 0)
    fastlora.merge(model)
    assert fastlora.warmup(model)[:2] == (0, 0)


@pytest.mark.parametrize(
    "model, tokens, reason",
    (
        (nn.Linear(8, 8), None, "Linear has no LoRA layer of fastlora's"),
        (llama(), [64, 0], "tokens must be at least 1, got 0"),
    ),
)
def test_what_cannot_be_warmed_up_is_refused(model, tokens, reason):
    with pytest.raises(ValueError, match=reason):
        fastlora.warmup(model, tokens)


@pytest.fixture
def triton_alone(on_triton, monkeypatch):
    """A layer's own calls are Triton's, by way of its op."""
    monkeypatch.setenv("FASTLORA_BACKEND", "triton")
    monkeypatch.setattr("fastlora.ops._skips_ops", lambda tensor: False)
    monkeypatch.setattr(workspace, "_by_stream", {})


def step(call) -> None:
    """A step of training, and a forward without gradients."""
    call().sum().backward()
    with torch.no_grad():
        call()


def experts_call(module, tokens, **options):
    """A call of an experts module of ``tiny_moe``, in which each token chooses two of four experts."""
    x = torch.randn(tokens, 16, dtype=torch.bfloat16, requires_grad=True)
    chosen = torch.arange(2 * tokens).view(tokens, 2) % 4
    return lambda: module(x, chosen, torch.ones(tokens, 2, dtype=torch.bfloat16), **options)


def made(kind, library, targets):
    """Experts in bfloat16 with LoRA on them; the module, and what holds it."""
    if library == "PEFT":
        model = make_peft(kind, torch.bfloat16, autocast_adapter_dtype=False, target_parameters=targets)
        patch(model)
        return model, model.base_model.model.model.layers[0].mlp.experts
    model = make_injected(kind, target_parameters=targets).bfloat16()
    return model, model.model.layers[0].mlp.experts


EXPERTS = (
    (80, "Qwen3Moe", "fastlora", ["experts.gate_up_proj", "experts.down_proj"]),
    (90, "GptOss", "PEFT", ["experts.gate_up_proj", "experts.down_proj"]),
    (90, "Mixtral", "PEFT", ["experts.gate_up_proj"]),
)


@needs_compiler
@pytest.mark.parametrize("arch, kind, library, targets", EXPERTS)
def test_experts_compile_nothing_after_a_warm_up(triton_alone, arch, kind, library, targets):
    """A projection without LoRA is a call as well, and another kernel. Numbers of tokens are those of a sequence."""
    model, experts = made(kind, library, targets)
    by_tokens = []
    for tokens in (None, (70, 3000)):
        with asked_for(arch) as found:
            warmed = fastlora.warmup(model, tokens, backend="triton")
            foreseen = {each for each in found if each[0].startswith("segments_")}
            found.clear()
            routes.forget_routes()
            for each in tokens or (65, 127, 500, 3001, 16384):
                step(experts_call(experts, each))
        assert warmed.layers == len(targets) + 2 and found <= foreseen
        by_tokens.append(len(foreseen))
    assert found == foreseen and 2 <= by_tokens[1] < by_tokens[0] <= 14


@needs_compiler
def test_batches_of_several_adapters_compile_nothing_after_a_warm_up(triton_alone):
    """Of layers and of experts. Adapters of different scalings have another kernel than those of one."""
    model = make_peft("Mixtral", torch.bfloat16, autocast_adapter_dtype=False, r=4)
    config = model.peft_config["default"]
    other = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=config.target_parameters)
    model.add_adapter("other", other, autocast_adapter_dtype=False)
    randomise(model, "other").set_requires_grad(["default", "other"])
    patch(model)
    names = ["other", "__base__", "default", "default"]
    block = model.base_model.model.model.layers[0]
    with asked_for(90) as found:
        warmed = fastlora.warmup(model, 400, adapter_names=names, backend="triton")
        foreseen = set(found)
        found.clear()
        x = torch.randn(4, 100, 16, dtype=torch.bfloat16, requires_grad=True)
        for layer in (block.self_attn.q_proj, block.self_attn.o_proj):
            step(lambda layer=layer: layer(x, adapter_names=names))
        step(experts_call(block.mlp.experts, 400, adapter_names=names))
    assert warmed.layers == 4 and found == foreseen and len(found) >= 6
    with asked_for(90) as found:
        assert fastlora.warmup(model, adapter_names=names, backend="triton").layers == 4
    assert foreseen <= found
    with pytest.raises(ValueError, match="multiples of the 4 samples"):
        fastlora.warmup(model, (400, 402), adapter_names=names)
