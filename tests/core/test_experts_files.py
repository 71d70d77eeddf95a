"""Adapters on experts in files: PEFT's both ways, and what does not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlora
from fastlora.adapters.files import PREFIX
from fastlora.integrations.state_dicts import adapter_state_dict
from fastlora.model import lora_layers
from tests.support.adapter_models import CONFIG, WEIGHTS, edit_config
from tests.support.injected_experts import (
    EXPERTS,
    OPTIONS,
    assert_close,
    assert_same_step,
    factors,
    logits,
    make_injected,
    make_stock,
    unchanged,
)
from tests.support.tiny_moe import IDS, PARAMETERS, make_moe, peft, transformers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::RuntimeWarning")


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
    """Mixtral's entries have other names in a checkpoint."""
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
    trainer(other).train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(logits(other), logits(model))
    if sharded:
        return
    entries = load_file(checkpoint / "model.safetensors")
    assert any("block_sparse_moe.experts.lora." in name for name in entries) == (kind == "Mixtral")
    kept = {name: value for name, value in entries.items() if "lora.gate_up_proj.lora_B" not in name}
    save_file(kept, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"gate_up_proj: the checkpoint has no lora_A and lora_B by this name"):
        trainer(other).train(resume_from_checkpoint=str(checkpoint))


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
