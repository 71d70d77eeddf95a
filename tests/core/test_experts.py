"""inject's target_parameters on transformers' experts: PEFT's starts, losses, gradients and merged weights."""

import copy
import pickle

import pytest
import torch

import fastlora
from fastlora.model import lora_layers
from tests.support.adapter_models import WEIGHTS
from tests.support.injected_experts import (
    EXPERTS,
    OPTIONS,
    STEP,
    assert_close,
    assert_same_step,
    factors,
    logits,
    make_injected,
    make_stock,
    run,
    start,
    stock_factors,
)
from tests.support.largest import Largest
from tests.support.numerics import assert_reordered
from tests.support.tiny_moe import IDS, MODELS, PARAMETERS, make_moe, peft, ungated_experts

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::RuntimeWarning")


@pytest.mark.parametrize("kind", MODELS)
def test_trains_as_peft_does(kind):
    model, stock = make_injected(kind), make_stock(kind)
    trained = [(factors(model), model), (stock_factors(stock), stock)]
    optimizers = [torch.optim.AdamW(found.values(), lr=1e-2) for found, _ in trained]
    fastlora.reset_dispatch_counts()
    for _ in range(3):
        assert_same_step(model, stock, 3 * STEP)  # of the steps before, too
        for optimizer in optimizers:
            optimizer.step()
    counts = fastlora.dispatch_counts()
    assert counts["reference"] == 3 * 2 * 4 and not counts["fallbacks"]
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in factors(model).values()}
    assert fastlora.trainable_parameters(model).trainable == sum(p.numel() for p in stock_factors(stock).values())


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_starts_as_peft_does(kind, init):
    model = make_injected(kind, started=False, init=init)
    stock = make_stock(kind, started=False, init_lora_weights=True if init == "kaiming" else init)
    wanted = stock_factors(stock)
    assert all(torch.equal(p, wanted[name]) for name, p in factors(model).items())


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("given, named", OPTIONS, ids=str)
def test_options(kind, given, named):
    model, stock = make_injected(kind, **given), make_stock(kind, **(named or given))
    assert_same_step(model, stock)


def test_paths_are_in_the_models_order():
    model = make_moe(num_hidden_layers=2)
    names = fastlora.inject(model, ["o_proj"], target_parameters=reversed(PARAMETERS), r=2)
    ends = ["self_attn.o_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert names == [f"model.layers.{layer}.{end}" for layer in range(2) for end in ends]
    assert names == [path for path, _ in lora_layers(model)]
    alone = make_moe()
    assert fastlora.inject(alone, None, target_parameters=PARAMETERS) == [f"model.layers.0.{end}" for end in ends[1:]]


def test_no_tensor_as_large_as_the_experts_is_made():
    model = make_injected(targets=None, changes={"num_local_experts": 32})
    with Largest() as largest:
        run(model)
    assert model.get_submodule(EXPERTS).gate_up_proj.numel() > 4 * largest.elements


@pytest.mark.parametrize("kind", MODELS)
def test_generates_as_peft_does(kind):
    model, stock = make_injected(kind).eval(), make_stock(kind).eval()
    got, wanted = (m.generate(input_ids=IDS, max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (model, stock))
    assert torch.equal(got, wanted) and got.shape[1] == IDS.shape[1] + 6
    assert model(IDS, output_router_logits=True).logits.isfinite().all()
    model.set_experts_implementation("eager")  # which the branches do not follow
    assert_close(logits(model), logits(stock))


def test_experts_without_a_gate_and_with_a_norm_behind():
    torch.manual_seed(0)
    model = ungated_experts()
    stock, targets = copy.deepcopy(model), ["experts.up_proj", "experts.down_proj"]
    assert fastlora.inject(model, None, target_parameters=targets, r=2, alpha=4) == targets
    stock = peft.get_peft_model(stock, peft.LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=targets))
    for name, parameter in stock_factors(start(stock_factors(stock), stock)).items():
        factors(model)[name].data.copy_(parameter)
    inputs = torch.randn(6, 16), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    assert_close(model["experts"](*inputs), stock.base_model.model["experts"](*inputs))


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_bfloat16(dtype):
    """As near to the results in float32 as PEFT's own are."""
    model = make_moe("GptOss").bfloat16()
    torch.manual_seed(5)
    fastlora.inject(model, None, target_parameters=PARAMETERS, r=3, alpha=5, adapter_dtype=dtype)
    start(factors(model), model)
    assert {p.dtype for p in factors(model).values()} == {dtype or torch.bfloat16}
    exact = copy.deepcopy(model).float()
    stock = peft.get_peft_model(
        make_moe("GptOss").bfloat16(),
        peft.LoraConfig(target_modules=[], target_parameters=PARAMETERS, r=3, lora_alpha=5),
        autocast_adapter_dtype=dtype is not None,
    )
    for name, parameter in stock_factors(stock).items():
        parameter.data.copy_(factors(model)[name])
    wanted = logits(exact)
    error, stock_error = ((logits(each).float() - wanted).norm() / wanted.norm() for each in (model, stock))
    assert error < 1.5 * stock_error
    with torch.autocast("cpu", torch.bfloat16):
        error = (logits(exact).float() - wanted).norm() / wanted.norm()
    assert error < 1.5 * stock_error


def test_compiled():
    experts = make_injected().get_submodule(EXPERTS)
    x, index = torch.randn(6, 16), torch.tensor([[1, 2], [0, 1], [3, 2], [2, 1], [0, 3], [1, 0]])
    weights, results = torch.full((6, 2), 0.5), []
    for module in (torch.compile(experts, backend="aot_eager"), experts):
        experts.zero_grad()
        y = module(x, index, weights)
        y.sum().backward()
        results.append((y, experts.lora["down_proj"].lora_A.grad.clone()))
    for got, wanted in zip(*results, strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = make_injected("Qwen3Moe").train()
    wanted = run(model), {name: p.grad.clone() for name, p in factors(model).items()}
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_close(run(model), wanted[0])
    for name, parameter in factors(model).items():
        assert_close(parameter.grad, wanted[1][name])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_branches_of_their_own(clone):
    model = make_injected()
    other = clone(model)
    assert repr(other) == repr(model) and "LoRAMixtralExperts" in repr(model)
    assert torch.equal(logits(other), logits(model))
    before = logits(model)
    with torch.no_grad():
        other.get_submodule(EXPERTS).lora["gate_up_proj"].lora_B.zero_()
    fastlora.merge(other)
    assert torch.equal(logits(model), before) and not torch.equal(logits(other), before)
    alone = copy.deepcopy(model.get_submodule(EXPERTS).lora["down_proj"])
    assert torch.equal(alone.merged_weight(), model.get_submodule(EXPERTS).lora["down_proj"].merged_weight())


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_merges_as_peft_does(kind):
    model, stock = make_injected(kind), make_stock(kind)
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    before, experts = logits(model), model.get_submodule(EXPERTS)
    fastlora.merge(model)
    fastlora.reset_dispatch_counts()
    assert_close(logits(model), before)
    assert fastlora.dispatch_counts()["reference"] == 0, "merged experts are transformers' own"
    fastlora.unmerge(model)
    assert all(torch.equal(p, plain[name]) for name, p in model.named_parameters())
    fastlora.merge(model, keep_base=False)
    fastlora.unmerge(model)
    assert_reordered([p.detach() for p in model.parameters()], plain.values(), 2)  # + ΔW - ΔW
    model, wanted = fastlora.merge_and_unload(model), stock.merge_and_unload()
    assert model.get_submodule(EXPERTS) is experts
    assert type(experts).__name__ == f"{kind}Experts" and not hasattr(experts, "lora")
    weights = wanted.state_dict()
    assert model.state_dict().keys() == weights.keys()
    for name, weight in model.state_dict().items():
        assert_close(weight, weights[name])
    assert_close(logits(model), logits(wanted))


def test_one_of_two_branches_merged():
    model = make_injected("GptOss")
    before = logits(model)
    model.get_submodule(EXPERTS).lora["down_proj"].merge()
    assert_close(logits(model), before)
    with pytest.raises(ValueError, match="call merge"):
        model.get_submodule(EXPERTS).unload()


def test_merging_what_is_not_finite_is_refused_where_that_is_asked_for():
    model = make_injected()
    with torch.no_grad():
        model.get_submodule(EXPERTS).lora["down_proj"].lora_B[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"not finite in {EXPERTS}.down_proj"):
        fastlora.merge(model, safe=True)
    assert not any(layer.merged for _, layer in lora_layers(model))


def test_state_dicts_of_merged_and_of_plain_models():
    merged, model = make_injected(), make_injected()
    fastlora.merge(merged)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"lora\.gate_up_proj: the state dict is of a merged layer"):
        model.get_submodule(EXPERTS).load_state_dict(merged.get_submodule(EXPERTS).state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match=f"{EXPERTS}.gate_up_proj, {EXPERTS}.down_proj: merged"):
        merged.load_state_dict(before)
    with pytest.warns(UserWarning, match="the branch now counts twice"):
        model.load_state_dict(make_moe().state_dict(), strict=False)
    other = make_injected(seed=6, started=False)
    other.load_state_dict(before)
    assert torch.equal(logits(other), logits(model))


def test_offloaded(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = make_injected("GptOss")
    wanted = logits(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert model.get_submodule(EXPERTS).lora["down_proj"].lora_A.is_meta
    assert torch.equal(logits(model), wanted)
    fastlora.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_moe("GptOss"), tmp_path)
    assert_close(logits(loaded), wanted)
    assert_close(logits(fastlora.merge_and_unload(model)), wanted)


@pytest.mark.parametrize("sharded", ["blocks", "experts", "branches"])
def test_fsdp2(tmp_path, sharded):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    from torch.distributed.fsdp import fully_shard

    model = make_injected("GptOss")
    wanted = run(model), {name: p.grad for name, p in factors(model).items()}
    fastlora.save_adapter(model, tmp_path / "plain")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        experts = model.get_submodule(EXPERTS)
        units = {"blocks": model.model.layers, "experts": [experts], "branches": experts.lora.values()}
        for unit in [*units[sharded], model]:
            fully_shard(unit)
        if sharded == "branches":
            with pytest.raises(ValueError, match="shard the experts module or the block around it"):
                run(model)
            return
        assert_close(run(model), wanted[0])
        for name, parameter in factors(model).items():
            assert_close(parameter.grad.full_tensor(), wanted[1][name])
        fastlora.save_adapter(model, tmp_path / "sharded")
        files = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("plain", "sharded")]
        assert files[0] == files[1]
        with pytest.raises(ValueError, match="the weight is sharded"):
            fastlora.merge(model)
    finally:
        torch.distributed.destroy_process_group()
