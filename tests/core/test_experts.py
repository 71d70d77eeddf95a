"""inject's target_parameters on transformers' experts: PEFT's starts, losses, gradients, files and merged weights."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

import fastlora
from fastlora.adapters.experts import file_paths
from fastlora.adapters.files import PREFIX, entry_name
from fastlora.experts_module import LoRAExperts
from fastlora.integrations.state_dicts import adapter_state_dict
from fastlora.model import lora_layers
from tests.support.adapter_models import CONFIG, WEIGHTS, edit_config
from tests.support.largest import Largest
from tests.support.tiny_moe import IDS, MODELS, PARAMETERS, make_moe, peft, transformers, ungated_experts

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::RuntimeWarning")
EXPERTS = "model.layers.0.mlp.experts"
ATTENTION = ["q_proj", "o_proj"]
STEP = 1e-5  # of float32 losses and gradients, relative to the largest value of each tensor


def make_injected(kind="Mixtral", targets=ATTENTION, changes=None, seed=5, started=True, **options):
    """A model with branches that are about as large as its frozen products."""
    model = make_moe(kind, **(changes or {}))
    torch.manual_seed(seed)
    fastlora.inject(model, targets, **{"target_parameters": PARAMETERS, "r": 3, "alpha": 5, **options})
    return start(factors(model), model) if started else model


def make_stock(kind="Mixtral", targets=ATTENTION, changes=None, seed=5, started=True, **options):
    """The same by PEFT."""
    model = make_moe(kind, **(changes or {}))
    torch.manual_seed(seed)
    options = {"target_modules": targets, "target_parameters": PARAMETERS, "r": 3, "lora_alpha": 5, **options}
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    return start(stock_factors(model), model) if started else model


def factors(model):
    """A and B by the name that PEFT has for them in a file."""
    layers = dict(lora_layers(model))
    places = file_paths(layers)
    return {
        entry_name(places[path], name): p
        for path, layer in layers.items()
        for name, p in layer.adapter_parameters().items()
    }


def stock_factors(model):
    named = {name.replace(".default", "").removeprefix(PREFIX): p for name, p in model.named_parameters()}
    return {name: p for name, p in named.items() if ".lora_" in name}


@torch.no_grad()
def start(found, model):
    for name, parameter in sorted(found.items()):
        if "lora_B" in name:
            torch.manual_seed(sum(map(ord, name)))
            nn.init.normal_(parameter, std=0.3)
    return model


def run(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def assert_close(got, wanted, tolerance=STEP):
    error = (got.double() - wanted.double()).abs().max()
    assert got.dtype == wanted.dtype and error <= tolerance * wanted.abs().max(), error / wanted.abs().max()


def assert_same_step(model, stock, tolerance=STEP):
    assert_close(run(model), run(stock), tolerance)
    found, wanted = factors(model), stock_factors(stock)
    assert found.keys() == wanted.keys() and found
    for name, parameter in found.items():
        assert_close(parameter.grad, wanted[name].grad, tolerance)


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


OPTIONS = [
    ({"rslora": True}, {"use_rslora": True}),
    ({"rank_pattern": {"experts.down_proj": 2, "q_proj": 5}}, None),
    ({"alpha_pattern": {r"mlp\.experts\.gate_up_proj": 11}}, None),
    ({"target_parameters": ["down_proj"]}, None),
    ({"target_parameters": [f"{EXPERTS}.gate_up_proj"], "targets": []}, None),
]


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
    assert all(torch.allclose(p, plain[name], atol=1e-6) for name, p in model.named_parameters())
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


def test_saved_by_transformers_as_the_plain_model(tmp_path):
    model = make_injected()
    with pytest.warns(UserWarning, match="saved with its LoRA layers unmerged"):
        model.save_pretrained(tmp_path / "base")
    assert torch.equal(logits(transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base")), logits(make_moe()))
    fastlora.merge(model)
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(transformers.MixtralForCausalLM.from_pretrained(tmp_path / "merged")), logits(model))


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("given, named", [({}, None), *OPTIONS], ids=str)
def test_files_go_both_ways(tmp_path, kind, given, named):
    model, stock = make_injected(kind, **given), make_stock(kind, **(named or given))
    fastlora.save_adapter(model, tmp_path / "ours"), stock.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    loaded = peft.PeftModel.from_pretrained(make_moe(kind), tmp_path / "ours")
    assert_close(logits(loaded), logits(model))
    plain, injected = make_moe(kind), make_injected(kind, started=False, seed=7, **given)
    paths = [path for path, _ in lora_layers(model)]
    for other in (plain, injected):
        assert fastlora.load_adapter(other, tmp_path / "theirs") == paths
        assert torch.equal(logits(other), logits(model))
    assert_same_step(plain, stock)


def test_the_configuration_says_what_peft_needs(tmp_path):
    model = make_moe(num_hidden_layers=2)
    fastlora.inject(model, ["layers.0.self_attn.q_proj"], r=2, dropout=0.1)
    fastlora.inject(model, [], target_parameters=["layers.1.mlp.experts.down_proj"], r=2)
    fastlora.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert config["target_parameters"] == ["model.layers.1.mlp.experts.down_proj"]
    assert config["lora_dropout"] == 0.0, "PEFT refuses another beside parameters"
    loaded = peft.PeftModel.from_pretrained(make_moe(num_hidden_layers=2), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_trainer_resumes_or_says_that_it_cannot(tmp_path, monkeypatch, kind, sharded):
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in IDS]

    def trainer(model):
        options = {"save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2}
        arguments = transformers.TrainingArguments(output_dir=str(tmp_path), max_steps=3, **options)
        return transformers.Trainer(model=model, args=arguments, train_dataset=rows)

    model, other = make_injected(kind), make_injected(kind, seed=6, started=False)
    if sharded:
        save = type(model).save_pretrained
        monkeypatch.setattr(type(model), "save_pretrained", lambda *a, **k: save(*a, **k, max_shard_size="5KB"))
    trainer(model).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert sharded == (checkpoint / "model.safetensors.index.json").is_file()
    if kind == "Mixtral":  # whose entries transformers renames as it saves them
        with pytest.raises(
            RuntimeError, match=r"lora\.gate_up_proj: the checkpoint has no lora_A and lora_B by this name"
        ):
            trainer(other).train(resume_from_checkpoint=str(checkpoint))
        return
    trainer(other).train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(logits(other), logits(model))


@pytest.mark.filterwarnings("error")
def test_nothing_is_warned_of_where_nothing_is_amiss(tmp_path):
    make_moe().save_pretrained(tmp_path / "base")
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base")
    fastlora.inject(model, ["q_proj"], r=2, dropout=0.1)
    fastlora.inject(model, [], target_parameters=PARAMETERS)
    fastlora.save_adapter(model, tmp_path / "adapter")
    fastlora.load_adapter(model, tmp_path / "adapter")


def test_float32_factors_of_a_16_bit_model_stay_float32(tmp_path):
    fastlora.save_adapter(make_injected(), tmp_path)
    model = make_moe().bfloat16()
    fastlora.load_adapter(model, tmp_path)
    assert {p.dtype for p in factors(model).values()} == {torch.float32}


def test_a_meta_model_takes_the_files_values(tmp_path):
    model = make_injected()
    fastlora.save_adapter(model, tmp_path)
    with torch.device("meta"):
        other = make_moe()
    fastlora.load_adapter(other, tmp_path)
    assert other.get_submodule(EXPERTS).down_proj.is_meta
    assert all(torch.equal(p, factors(model)[name]) for name, p in factors(other).items())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"target_parameters": ["mlp.experts.up_proj"]}, "match no parameter.*mlp.experts.gate_up_proj"),
        (
            {"target_parameters": ["q_proj.weight"]},
            "a torch.nn.modules.linear.Linear, which transformers does not call",
        ),
        ({"target_parameters": ["experts.down_proj"]}, f"do not name: {EXPERTS}.base_layer"),
        ({"target_parameters": []}, f"do not name: {EXPERTS}.base_layer, {EXPERTS}"),
        ({"target_parameters": "experts.down_proj"}, "must be a list of parameter names"),
        ({"r": 2}, "ranks do not agree"),
    ],
    ids=str,
)
def test_files_that_do_not_fit_change_nothing(tmp_path, change, message):
    fastlora.save_adapter(make_injected(), tmp_path)
    edit_config(tmp_path, **change)
    model = make_moe()
    with unchanged(model), pytest.raises(ValueError, match=message):
        fastlora.load_adapter(model, tmp_path)


def test_files_for_other_branches_change_nothing(tmp_path):
    fastlora.save_adapter(make_injected(), tmp_path)
    for other in (
        make_injected(target_parameters=["down_proj"]),
        make_injected(target_parameters=None, targets=["q_proj"]),
    ):
        with unchanged(other), pytest.raises(ValueError, match="parameters of the model or of the file alone"):
            fastlora.load_adapter(other, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[f"{PREFIX}{EXPERTS}.lora_A.weight"], tensors[f"{PREFIX}{EXPERTS}.lora_B.weight"]
    save_file(tensors, tmp_path / WEIGHTS)
    for other in (make_injected(), make_moe()):
        with unchanged(other), pytest.raises(ValueError, match=f"missing from the file: {EXPERTS}.down_proj"):
            fastlora.load_adapter(other, tmp_path)


@pytest.mark.parametrize("version, loads", [("0.19.1", True), ("1.0.0.dev0", True), ("0.18.2", False), (None, False)])
def test_square_matrices_of_an_older_peft_are_refused(tmp_path, version, loads):
    """Whose factors are the other way round, and of the same shapes."""
    changes = {"intermediate_size": 8}  # gate_up_proj is [16, 16] then
    fastlora.save_adapter(make_injected(changes=changes), tmp_path)
    edit_config(tmp_path, peft_version=version)
    model = make_moe(**changes)
    if loads:
        fastlora.load_adapter(model, tmp_path)
        return
    with unchanged(model), pytest.raises(ValueError, match="square: model.layers.0.mlp.experts.gate_up_proj"):
        fastlora.load_adapter(model, tmp_path)


def test_what_no_other_format_holds():
    model = make_injected()
    with pytest.raises(ValueError, match="no layout here holds LoRA on experts"):
        adapter_state_dict(model)
    assert fastlora.warmup(make_injected(targets=None)).kernels == 0


def test_read_adapter_looks_at_linear_layers_alone(tmp_path):
    from fastlora.adapters.files import read_adapter

    fastlora.save_adapter(make_injected(), tmp_path)
    with pytest.raises(ValueError, match="parameters of experts"):
        read_adapter(tmp_path)


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


class unchanged:
    """Within it a model keeps its modules, their classes and children, its parameters and what trains."""

    def __init__(self, model):
        self.model, self.before = model, self._look(model)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        assert self._look(self.model) == self.before

    @staticmethod
    def _look(model):
        modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
        parameters = [(name, id(p), p._version, p.requires_grad) for name, p in model.named_parameters()]
        return modules, parameters


def give_nothing(model):
    return {}


def give_second_branch(model):
    fastlora.inject(model, None, target_parameters=["down_proj"])
    return {"target_parameters": ["gate_up_proj"]}


def give_peft(model):
    peft.get_peft_model(model, peft.LoraConfig(target_modules=[], target_parameters=PARAMETERS))
    return {"target_parameters": ["gate_up_proj"]}


def give_parametrization(model):
    parametrize.register_parametrization(model.get_submodule(EXPERTS), "down_proj", nn.Identity())


def give_subclass(model):
    class Packed(nn.Parameter):
        pass

    experts = model.get_submodule(EXPERTS)
    experts.down_proj = Packed(experts.down_proj.detach())


def give_integers(model):
    experts = model.get_submodule(EXPERTS)
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.int8), requires_grad=False)


def give_tie(model):
    model.model.layers[1].mlp.experts.down_proj = model.get_submodule(EXPERTS).down_proj


def give_share(model):
    experts = model.get_submodule(EXPERTS)
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[:2].detach())


def give_forward(model):
    experts = model.get_submodule(EXPERTS)
    experts.forward = lambda *args: type(experts).forward(experts, *args)


def give_kernel(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x)


def give_other_class(model):
    """As models have them that do not go by the interface."""

    class Experts(nn.Module):
        def __init__(self, old):
            super().__init__()
            self.gate_up_proj, self.down_proj = old.gate_up_proj, old.down_proj

    model.model.layers[0].mlp.experts = Experts(model.get_submodule(EXPERTS))


def give_one_expert(model):
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.num_experts = 1
        for name in ("gate_up_proj", "down_proj"):
            setattr(experts, name, nn.Parameter(getattr(experts, name)[:1].detach()))


def give_whole(model):
    return {"modules_to_save": ["experts"]}


@pytest.mark.parametrize(
    "options, prepare, message",
    [
        (
            {"target_parameters": ["experts.up_proj"]},
            give_nothing,
            "'experts.up_proj' match.*mlp.experts.down_proj, mlp",
        ),
        ({"target_parameters": ["own_proj"]}, give_nothing, "match no parameter"),
        ({"target_parameters": ["q_proj.weight"]}, give_nothing, "belongs to a torch.nn.modules.linear.Linear"),
        ({"dropout": 0.1}, give_nothing, "dropout with target_parameters"),
        ({"dora": True}, give_nothing, "dora with target_parameters"),
        ({"r": 0}, give_nothing, "r must be"),
        ({"rank_pattern": {"experts": 2}}, give_nothing, "rank_pattern: 'experts' match none"),
        ({"rank_pattern": {"experts.down_proj": 0}}, give_nothing, "r must be"),
        ({"exclude_modules": ["experts"]}, give_nothing, "exclude_modules: as in PEFT, this narrows target_modules"),
        ({}, give_second_branch, "carries branches already"),
        ({}, give_peft, "ParamWrapper has a branch on it already"),
        ({}, give_parametrization, "down_proj: it is no parameter"),
        ({}, give_subclass, "down_proj: it is a Packed"),
        ({}, give_integers, "down_proj: it is torch.int8"),
        ({}, give_tie, "tied to model.layers.1.mlp.experts.down_proj"),
        ({}, give_share, "something has shared its experts out"),
        ({}, give_forward, "hooks have replaced its module's forward"),
        ({}, give_kernel, "a kernel has replaced the forward of the MixtralSparseMoeBlock"),
        ({}, give_other_class, "Experts, which transformers does not call by its ExpertsInterface"),
        ({}, give_one_expert, "1 expert"),
        ({}, give_whole, "modules_to_save has the whole of it trained"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)[:40]),
)
def test_refusals_change_nothing(options, prepare, message):
    model = make_moe(num_hidden_layers=2)
    options = {"target_parameters": PARAMETERS, **options, **(prepare(model) or {})}
    with unchanged(model), pytest.raises(ValueError, match=message):
        fastlora.inject(model, None, **options)


def test_a_bias_is_refused():
    model = make_moe("GptOss")
    with unchanged(model), pytest.raises(ValueError, match="multiplies by gate_up_proj and down_proj alone"):
        fastlora.inject(model, None, target_parameters=["gate_up_proj_bias"])


@pytest.mark.parametrize("targets", ["experts.down_proj", [1], None])
def test_targets_of_the_wrong_type(targets):
    model = make_moe()
    with unchanged(model), pytest.raises(TypeError, match="must be a .*list of strings"):
        fastlora.inject(model, None, target_parameters=targets)


def test_an_adapter_dtype_that_does_not_go_with_the_weights():
    model = make_moe()
    with unchanged(model), pytest.raises(TypeError, match="adapter_dtype"):
        fastlora.inject(model, ["q_proj"], target_parameters=PARAMETERS, adapter_dtype=torch.bfloat16)


def test_a_base_weight_that_trains_is_refused_by_the_call():
    model = make_injected()
    model.get_submodule(EXPERTS).down_proj.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen|requires"):
        run(model)


def test_hooks_on_the_experts_stay():
    model, seen = make_moe(), []
    experts = model.get_submodule(EXPERTS)
    experts.register_forward_hook(lambda module, args, output: seen.append(output))
    fastlora.inject(model, None, target_parameters=PARAMETERS)
    assert isinstance(experts, LoRAExperts) and isinstance(experts, type(make_moe().get_submodule(EXPERTS)))
    logits(model)
    assert len(seen) == 1
