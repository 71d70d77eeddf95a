"""PEFT's target_parameters on transformers' experts: the losses and gradients of stock, without W + ΔW."""

import copy
import math
import pickle
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastlora
from tests.support.largest import Largest
from tests.support.tiny_moe import IDS, MODELS, PARAMETERS, make_moe, make_peft, peft, randomise, ungated_experts

from fastlora.integrations.peft import FusedLinear, FusedParamWrapper, patch, unpatch, unserved  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
EXPERTS = "base_model.model.model.layers.0.mlp.experts"
STEP = 1e-5  # of float32 losses and gradients, relative to the largest value of each tensor


def make_pair(**options):
    """The same model twice: stock, and patched."""
    stock = make_peft(**options)
    fused = copy.deepcopy(stock)
    patch(fused)
    fastlora.reset_dispatch_counts()
    return stock, fused


def fallbacks():
    return {name.removeprefix("peft: "): n for name, n in fastlora.dispatch_counts()["fallbacks"].items()}


def run(model, **inputs):
    """Loss and gradients of one step."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, **inputs).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got, wanted, tolerance=STEP):
    error = (got.double() - wanted.double()).abs().max()
    assert got.dtype == wanted.dtype and error <= tolerance * wanted.abs().max(), error / wanted.abs().max()


def assert_same_step(stock, fused, tolerance=STEP):
    (expected, wanted), (loss, got) = run(stock), run(fused)
    assert_close(loss, expected, tolerance)
    assert got.keys() == wanted.keys() and got
    for name, gradient in got.items():
        assert_close(gradient, wanted[name], tolerance)


@pytest.mark.parametrize("kind", MODELS)
def test_trains_as_stock_does(kind):
    stock, fused = make_pair(kind=kind)
    assert unserved(fused) == {} and str(patch(fused)) == "4 of 4 LoRA layers fused"
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (stock, fused)]
    for _ in range(3):
        (expected, wanted), (loss, got) = run(stock), run(fused)
        assert_close(loss, expected)
        assert got.keys() == wanted.keys() and any("experts.lora_B" in name for name in got)
        for name in got:
            assert_close(got[name], wanted[name], 3 * STEP)  # of the steps before, too
        for optimizer in optimizers:
            optimizer.step()
    counts = fastlora.dispatch_counts()
    assert counts["reference"] == 3 * 2 * 4 and not counts["fallbacks"]


def test_no_tensor_as_large_as_the_experts_is_made():
    stock, fused = make_pair(target_modules=["q_proj"], changes={"num_local_experts": 32})
    made = []
    for model in (stock, fused):
        with Largest() as largest:
            run(model)
        made.append(largest.elements)
    size = stock.base_model.model.model.layers[0].mlp.experts.get_base_layer().gate_up_proj.numel()
    assert made[0] >= size > 4 * made[1]


@pytest.mark.parametrize("target", PARAMETERS)
def test_one_of_the_two_parameters(target):
    stock, fused = make_pair(kind="GptOss", target_parameters=[target])
    assert_same_step(stock, fused)
    assert not fallbacks()


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"bias": "all", "kind": "GptOss"},
        {"alpha_pattern": {"experts.down_proj": 11}, "kind": "Qwen3Moe"},
        {"changes": {"experts_implementation": "eager"}},
        {"changes": {"experts_implementation": "batched_mm"}, "kind": "GptOss"},
    ],
    ids=str,
)
def test_configurations(options):
    implementation = options.get("changes", {}).get("experts_implementation")
    stock, fused = make_pair(**{**options, "changes": {}})
    if implementation:
        for model in (stock, fused):
            model.base_model.model.set_experts_implementation(implementation)
    assert_same_step(stock, fused)
    assert not fallbacks()
    if implementation:
        assert fused.base_model.model.config._experts_implementation == implementation


@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
def test_a_bfloat16_base(autocast_adapter_dtype):
    stock, fused = make_pair(dtype=torch.bfloat16, autocast_adapter_dtype=autocast_adapter_dtype)
    exact = copy.deepcopy(stock).double()
    exact.base_model.model.set_experts_implementation("eager")  # which alone takes float64
    losses = [run(model)[0].double() for model in (stock, fused, exact)]
    assert (losses[1] - losses[2]).abs() <= 1.25 * (losses[0] - losses[2]).abs() + torch.finfo(torch.bfloat16).eps
    assert not fallbacks()
    factor = fused.get_submodule(EXPERTS).lora_B["default"].weight
    assert factor.grad.dtype == factor.dtype == (torch.float32 if autocast_adapter_dtype else torch.bfloat16)
    wanted, stocks = (model.get_submodule(EXPERTS).lora_B["default"].weight.grad.double() for model in (exact, stock))
    assert (factor.grad.double() - wanted).norm() <= 1.25 * (stocks - wanted).norm()


def test_autocast_over_a_float32_base():
    stock, fused = make_pair()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [run(model)[0] for model in (stock, fused)]
    assert (losses[0] - losses[1]).abs() <= 4 * torch.finfo(torch.bfloat16).eps * losses[0].abs()
    assert not fallbacks()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    stock, fused = make_pair(kind="Qwen3Moe")
    expected, wanted = run(stock)
    fused.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    fused.enable_input_require_grads()
    fused.train()
    loss, got = run(fused)
    assert_close(loss, expected)
    for name, gradient in wanted.items():
        assert_close(got[name], gradient)
    assert not fallbacks()


def test_a_router_that_trains_and_one_that_does_not():
    for trains in (False, True):
        stock, fused = make_pair(modules_to_save=["gate"] if trains else None)
        assert_same_step(stock, fused)
        assert trains == any("gate.modules_to_save" in name for name in run(fused)[1])
        assert not fallbacks()


def test_disabled_merged_and_unmerged():
    stock, fused = make_pair()
    with stock.disable_adapter(), fused.disable_adapter(), torch.no_grad():
        assert torch.equal(fused(IDS).logits, stock(IDS).logits)
    assert fallbacks() == {"adapters disabled": 4}
    with torch.no_grad():
        expected = fused(IDS).logits
    for model in (stock, fused):
        model.merge_adapter()
    fastlora.reset_dispatch_counts()
    with torch.no_grad():
        assert torch.equal(fused(IDS).logits, stock(IDS).logits)
        assert_close(fused(IDS).logits, expected)
    assert fallbacks() == {"merged": 8}
    for model in (stock, fused):
        model.unmerge_adapter()
    assert_same_step(stock, fused)
    unloaded = fused.merge_and_unload()
    assert not [m for m in unloaded.modules() if isinstance(m, (FusedLinear, FusedParamWrapper))]
    with torch.no_grad():
        assert_close(unloaded(IDS).logits, stock.merge_and_unload()(IDS).logits)


def test_several_adapters():
    stock, fused = make_pair()
    for model in (stock, fused):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=5, lora_alpha=2, target_modules=["q_proj"], target_parameters=PARAMETERS)
        model.add_adapter("second", config)
        randomise(model, "second", seed=4)
        model.set_adapter("second")
    assert_same_step(stock, fused)
    assert fallbacks() == {"0 active adapters": 1}  # o_proj has no second adapter
    for model in (stock, fused):
        model.base_model.set_adapter(["default", "second"])
    fastlora.reset_dispatch_counts()
    assert_same_step(stock, fused)
    assert fallbacks() == {} and EXPERTS not in unserved(fused), "ranks are stacked"
    for model in (stock, fused):
        model.set_adapter("default")
        model.delete_adapter("second")
    fastlora.reset_dispatch_counts()
    assert_same_step(stock, fused)
    assert not fallbacks()


def test_saved_and_loaded_by_peft(tmp_path):
    stock, fused = make_pair()
    stock.save_pretrained(tmp_path / "stock"), fused.save_pretrained(tmp_path / "fused")
    name = "adapter_model.safetensors"
    assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes()
    loaded = peft.PeftModel.from_pretrained(make_moe(), tmp_path / "fused")
    assert len(patch(loaded, strict=True)) == 4
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, fused(IDS).logits)
    assert list(fused.state_dict()) == list(stock.state_dict())
    assert fused.config.to_dict() == stock.config.to_dict()


def test_unpatch_gives_back_what_was_there():
    stock, fused = make_pair()
    assert len(patch(fused)) == 4
    assert len(unpatch(fused)) == 4 and unpatch(fused) == []
    assert repr(fused) == repr(stock) and fused.state_dict().keys() == stock.state_dict().keys()
    fastlora.reset_dispatch_counts()
    (loss, got), (expected, wanted) = run(fused), run(stock)
    assert torch.equal(loss, expected) and all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert fastlora.dispatch_counts()["reference"] == 0 and not fallbacks()
    assert not [m for m in fused.modules() if "copy_input" in vars(m) or m._forward_pre_hooks]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_fused(clone):
    fused = make_pair()[1]
    other = clone(fused)
    assert repr(other) == repr(fused)
    assert_same_step(fused, other)
    assert not fallbacks()


def test_experts_that_cannot_be_served_run_as_in_peft():
    stock, fused = make_pair()
    for model in (stock, fused):
        model.get_submodule(EXPERTS).get_base_layer().down_proj.requires_grad_(True)
    assert_same_step(stock, fused)
    assert fallbacks() == {"the base weight trains": 1, "experts that PEFT serves for a wrapper around this one": 1}
    with pytest.raises(ValueError, match=f"{EXPERTS}: the base weight trains"):
        patch(fused, strict=True)


def test_hooks_on_the_experts_module_run():
    stock, fused = make_pair()
    seen = []
    for model in (stock, fused):
        experts = model.get_submodule(EXPERTS).get_base_layer()
        experts.register_forward_hook(lambda module, args, output: seen.append(output) or output * 2)
    assert_same_step(stock, fused)
    assert len(seen) == 2 and not fallbacks()


def test_an_error_within_a_call_leaves_no_trace():
    fused = make_pair()[1]
    wrapper = fused.get_submodule(EXPERTS)
    config = wrapper.get_base_layer().config
    with pytest.raises((RuntimeError, ValueError)):
        wrapper(torch.randn(3, 9), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2))
    assert wrapper.get_base_layer().config is config


def test_a_nan_in_one_expert_is_that_experts_alone():
    stock, fused = make_pair()
    wrapper = fused.get_submodule(EXPERTS)
    with torch.no_grad():
        wrapper.lora_A["default"].weight[:3] = math.nan  # of expert 0
        x = torch.randn(4, 16)
        index, weights = torch.tensor([[1, 2], [0, 1], [3, 2], [2, 1]]), torch.full((4, 2), 0.5)
        y, expected = wrapper(x, index, weights), stock.get_submodule(EXPERTS)(x, index, weights)
    assert y[1].isnan().all()
    assert_close(y[[0, 2, 3]], expected[[0, 2, 3]])


def test_sentinels_of_expert_parallelism_give_nothing():
    wrapper = make_pair()[1].get_submodule(EXPERTS)
    x, weights = torch.randn(4, 16), torch.full((4, 2), 0.5)
    with torch.no_grad():
        one = wrapper(x, torch.tensor([[1, 4], [4, 4], [3, 4], [2, 4]]), weights)
        both = wrapper(x, torch.tensor([[1, 0], [0, 2], [3, 0], [2, 0]]), weights)
    assert not one[1].any() and one[[0, 2, 3]].abs().min() > 0 and not torch.equal(one, both)


def test_no_tokens():
    wrapper = make_pair()[1].get_submodule(EXPERTS)
    index = torch.zeros(0, 2, dtype=torch.long)
    assert wrapper(torch.zeros(0, 16), index, torch.zeros(0, 2)).shape == (0, 16)


def test_threads_do_not_see_each_others_factors():
    """Each within the experts module's one config."""
    fused = make_pair()[1]
    wrapper, x = fused.get_submodule(EXPERTS), torch.randn(6, 16)
    index, weights = torch.tensor([[1, 2], [0, 1], [3, 2], [2, 1], [0, 3], [1, 0]]), torch.full((6, 2), 0.5)
    names = [["default", "__base__"], ["__base__", "default"], ["default", "default"]]

    @torch.no_grad()
    def compute(given):
        return [wrapper(x, index, weights, adapter_names=given) for _ in range(40)]

    wanted = [compute(given)[0] for given in names]
    with ThreadPoolExecutor(len(names)) as pool:
        for results, value in zip(pool.map(compute, names), wanted, strict=True):
            assert all(torch.equal(result, value) for result in results)
    assert not torch.equal(wanted[0], wanted[1])


def test_experts_without_a_gate_and_with_a_norm_behind():
    targets = ["experts.up_proj", "experts.down_proj"]
    options = {"r": 2, "target_modules": [], "target_parameters": targets}
    stock = peft.get_peft_model(ungated_experts(), peft.LoraConfig(**options))
    fused = copy.deepcopy(randomise(stock))
    assert len(patch(fused, strict=True, warmup=True)) == 2
    inputs = torch.randn(6, 16), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    assert_close(*(model.base_model.model["experts"](*inputs) for model in (fused, stock)))


def test_compiled():
    stock, fused = make_pair(target_modules=["q_proj"])
    wrapper, x = fused.get_submodule(EXPERTS), torch.randn(6, 16)
    index, weights = torch.tensor([[1, 2], [0, 1], [3, 2], [2, 1], [0, 3], [1, 0]]), torch.full((6, 2), 0.5)
    compiled = torch.compile(wrapper, backend="aot_eager")
    assert_close(compiled(x, index, weights), wrapper(x, index, weights))
    compiled(x, index, weights).sum().backward()
    got = wrapper.lora_A["default"].weight.grad.clone()
    wrapper.zero_grad()
    wrapper(x, index, weights).sum().backward()
    assert_close(got, wrapper.lora_A["default"].weight.grad)


def test_the_implementation_is_not_chosen_by_hand():
    model = make_moe()
    patch(make_peft())
    model.config._experts_implementation_internal = "fastlora"
    with pytest.raises(ValueError, match="they choose it by themselves"):
        model(IDS)


def test_a_block_whose_forward_a_kernel_has_replaced_is_said():
    """Such a kernel reads the weights of the experts, which PEFT's wrapper does not have: an error of its own."""
    model = make_peft(kind="GptOss")
    block = model.base_model.model.model.layers[0].mlp
    block.forward = types.MethodType(lambda self, x: self.experts.gate_up_proj, block)
    reason = "a kernel has replaced the forward of the GptOssMLP"
    assert unserved(model) == {EXPERTS: reason, f"{EXPERTS}.base_layer": reason}
    with pytest.raises(ValueError, match=f"2 of 4 LoRA layers cannot be served fused: .*{reason}"):
        patch(model, strict=True)
    assert len(patch(model)) == 2
    with pytest.raises(AttributeError, match="gate_up_proj"):
        run(model)
