"""Adapter files: both ways with PEFT itself, and saves that fail."""

import copy
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastlora.adapters.io import load_adapter, save_adapter
from fastlora.model import inject, lora_layers, merge
from tests.support import tiny_llama
from tests.support.adapter_models import CONFIG, IDS, WEIGHTS, Model, make_model, start_branches


def make_llama(dtype=torch.float32):
    return tiny_llama.make_llama(dtype).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rslora", [False, True])
def test_fastlora_to_peft(tmp_path, rslora, dtype):
    peft = pytest.importorskip("peft")
    model = make_llama(dtype)
    inject(model, ["q_proj", "down_proj"], r=3, alpha=5, rslora=rslora)
    inject(model, [f"layers.{i}.self_attn.k_proj" for i in range(2)], r=2, alpha=9, dropout=0.1, rslora=rslora)
    start_branches(model)
    save_adapter(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    stock = peft.PeftModel.from_pretrained(make_llama(dtype), tmp_path, autocast_adapter_dtype=False).eval()
    base, ours, theirs = logits(make_llama(dtype)), logits(model), logits(stock)
    scale = ours.abs().max()
    assert (ours - base).abs().max() > 0.1 * scale
    assert (ours - theirs).abs().max() <= 16 * torch.finfo(dtype).eps * scale
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert config.use_rslora == rslora and config.target_modules == {"q_proj", "k_proj", "down_proj"}
    stored = stock.state_dict()
    for path, layer in lora_layers(model):
        for factor in "AB":
            value = stored[f"base_model.model.{path}.lora_{factor}.default.weight"]
            assert value.dtype == dtype and torch.equal(value, getattr(layer, f"lora_{factor}"))


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_to_fastlora(tmp_path, rslora, injected):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=7,
        lora_dropout=0.1,
        use_rslora=rslora,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 3},
        alpha_pattern={"up_proj": 2},
    )
    stock = peft.get_peft_model(make_llama(), config).eval()
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    stock.save_pretrained(tmp_path)
    model = make_llama()
    if injected:
        inject(model, ["0.self_attn.q_proj", "up_proj"], r=4, alpha=1, dropout=0.3)
        inject(model, ["1.self_attn.q_proj"], r=3, alpha=1, dropout=0.3)
    loaded = load_adapter(model, tmp_path)
    ours, theirs = logits(model), logits(stock)
    assert (ours - logits(make_llama())).abs().max() > 0.1 * ours.abs().max()
    assert (ours - theirs).abs().max() <= 16 * torch.finfo(torch.float32).eps * theirs.abs().max()
    assert loaded == [path for path, _ in lora_layers(model)] and len(loaded) == 4
    assert {layer.dropout for _, layer in lora_layers(model)} == {0.3 if injected else 0.1}
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"{path}.lora_{factor}" for path in loaded for factor in "AB"}


def test_float32_adapters_of_a_16_bit_peft_model_stay_float32(tmp_path):
    peft = pytest.importorskip("peft")
    stock = peft.get_peft_model(make_llama(torch.bfloat16), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    stock.save_pretrained(tmp_path)
    model = make_llama(torch.bfloat16)
    load_adapter(model, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    for path, layer in lora_layers(model):
        assert layer.lora_A.dtype == torch.float32
        assert torch.equal(layer.lora_A, stored[f"base_model.model.{path}.lora_A.weight"])


def test_the_files_are_what_peft_writes(tmp_path):
    model = make_model(["1.0"], r=2, alpha=3)
    save_adapter(model, tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {key: (entry["dtype"], entry["shape"]) for key, entry in header.items()} == {
        "base_model.model.layers.1.0.lora_A.weight": ("F32", [2, 6]),
        "base_model.model.layers.1.0.lora_B.weight": ("F32", [10, 2]),
    }
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["peft_type"] == "LORA" and config["target_modules"] == ["layers.1.0"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["bias"]) == (2, 3, {}, "none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_round_trip_is_bit_exact(tmp_path, dtype):
    model = make_model(dtype=dtype, r=3, alpha=7)
    save_adapter(model, tmp_path)
    fresh, injected = make_model(None, dtype), make_model(dtype=dtype, r=3, alpha=1, seed=5)
    for other in (fresh, injected):
        assert load_adapter(other, str(tmp_path)) == ["layers.1.0", "layers.1.1", "layers.11.0"]
        for (_, layer), (_, loaded) in zip(lora_layers(model), lora_layers(other), strict=True):
            assert torch.equal(layer.lora_A, loaded.lora_A) and torch.equal(layer.lora_B, loaded.lora_B)
            assert (loaded.alpha, loaded.scaling, loaded.lora_A.dtype) == (7, 7 / 3, dtype)
    x = torch.randn(3, 6, dtype=dtype)
    assert torch.equal(fresh(x), model(x))


def test_patterns_tell_apart_paths_that_end_alike(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.ModuleDict({"fc": nn.Linear(4, 4), "sub": nn.ModuleDict({"fc": nn.Linear(4, 4)}), "z": nn.Linear(4, 4)})
    model = copy.deepcopy(base)
    inject(model, r"sub\.fc|z", r=3, alpha=1)
    inject(model, ["fc"], r=2, alpha=5)
    save_adapter(model, tmp_path)
    other = copy.deepcopy(base)
    load_adapter(other, tmp_path)
    stock = peft.PeftModel.from_pretrained(base, tmp_path).base_model.model
    for path, layer in lora_layers(model):
        assert (other.get_submodule(path).r, other.get_submodule(path).alpha) == (layer.r, layer.alpha)
        assert (stock.get_submodule(path).r["default"], stock.get_submodule(path).scaling["default"]) == (
            layer.r,
            layer.scaling,
        )


def test_layers_that_differ_in_rslora_keep_their_scaling(tmp_path):
    model = make_model(["1.0"], r=3, alpha=5, rslora=True)
    inject(model, ["2.0"], r=3, alpha=5)
    save_adapter(model, tmp_path)
    other = make_model(None)
    load_adapter(other, tmp_path)
    for (_, layer), (_, loaded) in zip(lora_layers(model), lora_layers(other), strict=True):
        assert loaded.scaling == pytest.approx(layer.scaling, rel=1e-15) and not loaded.rslora


def test_saving_a_merged_model_saves_the_adapter(tmp_path):
    model = make_model(r=2)
    save_adapter(model, tmp_path / "a")
    merge(model)
    save_adapter(model, tmp_path / "b")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(ValueError, match="merged, call fastlora.unmerge first: layers.1.0"):
        load_adapter(model, tmp_path / "a")


def test_wrappers_leave_no_trace_in_the_keys(tmp_path):
    model = make_model(r=2)
    model.layers[1] = torch.compile(model.layers[1])
    save_adapter(nn.DataParallel(torch.compile(model)), tmp_path)
    plain = make_model(None)
    assert load_adapter(plain, tmp_path) == ["layers.1.0", "layers.1.1", "layers.11.0"]
    load_adapter(nn.DataParallel(model), tmp_path)


def test_a_meta_model_takes_the_file_s_values(tmp_path):
    model = make_model(r=2)
    save_adapter(model, tmp_path)
    with torch.device("meta"):
        empty = Model()
    load_adapter(empty, tmp_path)
    missing = empty.load_state_dict(make_model(None).state_dict(), strict=False, assign=True)
    assert all("lora_" in name for name in missing.missing_keys) and not missing.unexpected_keys
    x = torch.randn(2, 6)
    assert torch.equal(empty(x), model(x))


def test_other_trained_parameters_are_not_lost_silently(tmp_path):
    model = make_model(r=2)
    model.layers[0][0].bias.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"A and B alone; these train too: layers\.0\.0\.bias"):
        save_adapter(model, tmp_path)


def test_loading_leaves_the_random_state_of_an_injected_model(tmp_path):
    model = make_model(r=2)
    save_adapter(model, tmp_path)
    state = torch.get_rng_state()
    load_adapter(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


class DiskFull(OSError):
    pass


@pytest.mark.parametrize("stage", ["write", "fsync", "rename"])
@pytest.mark.parametrize("present", [False, True])
def test_a_failed_save_changes_nothing(tmp_path, monkeypatch, stage, present):
    directory = tmp_path / "adapter"
    if present:
        save_adapter(make_model(r=2), directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()} if present else None

    def fail(*args, **kwargs):
        raise DiskFull("no space left on device")

    if stage == "write":
        monkeypatch.setattr(Path, "write_bytes", lambda path, data: fail() if CONFIG in str(path) else len(data))
    elif stage == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(DiskFull):
        save_adapter(make_model(r=3, seed=4), directory)
    if present:
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    else:
        assert not directory.exists()


def test_saving_without_lora_layers_or_into_a_file(tmp_path):
    with pytest.raises(ValueError, match="has no LoRALinear layer to save"):
        save_adapter(make_model(None), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        save_adapter(make_model(r=2), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"
