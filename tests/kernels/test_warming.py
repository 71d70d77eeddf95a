"""fastlora.warmup: what it compiles is what a run asks for, side by side, and nothing is launched."""

import pytest
import torch
from torch import nn
from triton.runtime import _async_compile
from triton.runtime.jit import JITFunction

import fastlora
from fastlora import dispatch, selection
from fastlora.backends import workspace
from fastlora.backends.target import Target
from fastlora.backends.triton import launch as triton_lora
from fastlora.backends.triton import masked
from fastlora.bench.cases import LLAMA_8B
from tests.support.compile_target import compile_for
from tests.support.specialisations import DROPOUT, RANK, Step, asked_for, walk

needs_compiler = pytest.mark.skipif(
    triton_lora.triton.knobs.runtime.interpret, reason="the interpreter compiles nothing"
)


@pytest.fixture
def on_triton(monkeypatch):
    """Any layer's calls may be Triton's."""
    monkeypatch.setattr(selection, "why_unsupported", lambda name, spec: None)
    dispatch.forget_routes()
    yield
    dispatch.forget_routes()


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
