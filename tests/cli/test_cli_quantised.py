"""fastlora finetune --base-quant: PEFT's losses over the same quantised weights, memory of both, refusals."""

import json

import pytest
import torch
from torch import nn

from fastlora.finetune.compare import LOSS_TOLERANCE
from fastlora.finetune.quantise import quantise_linears
from fastlora.quantised_weight import read_layer
from tests.support.quantised_models import bitsandbytes, torchao
from tests.support.tiny_llama import make_llama


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("quantised")


@pytest.fixture(scope="module")
def tiny_model(make_model):
    """Its rows are whole blocks of 64 elements: of others bitsandbytes decodes some wrongly on CPUs with AVX-512."""
    return make_model(64, 128)


@pytest.mark.filterwarnings("error:.*frozen, not in the adapter file", "ignore::FutureWarning:transformers")
@pytest.mark.parametrize("name, via", [("nf4", "fastlora"), ("int8", "peft")])
def test_losses_and_memory_beside_pefts(name, via, finetune, outputs):
    bitsandbytes() if name == "nf4" else torchao()
    options = ["--base-quant", name, "--via", via, "--compare", "peft", "--steps", 3]
    result = finetune(*options, "--output", outputs / name)
    assert result.code == 0, result.err
    assert f"in float32, its linear layers in {name}" in result.text
    assert "the curves agree within 1e-05 at every step" in result.text
    assert f"Not merged: into {name} weights the branch would be rounded away." in result.text
    report = json.loads((outputs / name / "report.json").read_text())
    runs = report["runs"]
    ours, theirs = (runs[arm]["losses"] for arm in ("fastlora", "peft"))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= LOSS_TOLERANCE
    assert report["agreement"]["same_seed_start"] and ours[-1] < ours[0]
    calls = runs["fastlora"]["dispatch_counts"]
    assert calls["reference"] == 3 * 2 * 14 and calls["fallbacks"] == {}
    assert runs["peft"]["dispatch_counts"]["reference"] == 0
    weights = {arm: runs[arm]["tensor_bytes"]["weights"] for arm in runs}
    dense = report["memory"]["full_finetuning_tensor_bytes"]["weights"]
    assert weights["fastlora"] == weights["peft"] < dense
    kept = {arm: runs[arm]["tensor_bytes"]["saved for backward"] for arm in runs}
    assert kept["fastlora"] <= kept["peft"]
    assert report["settings"]["base_quant"] == name and report["merge"]["same_answer"] is None


def test_resumed_with_the_same_quantiser_alone(finetune, outputs):
    bitsandbytes()
    assert finetune("--base-quant", "nf4", "--output", outputs / "run", "--steps", 2).code == 0
    result = finetune("--resume", "--base-quant", "fp4", "--steps", 3, "--output", outputs / "run")
    assert result.code == 2 and "--base-quant is 'fp4', but the run to resume was begun with 'nf4'" in result.error_line
    assert finetune("--resume", "--steps", 3, "--output", outputs / "run").code == 0
    report = json.loads((outputs / "run" / "report.json").read_text())
    assert report["settings"]["base_quant"] == "nf4" and len(report["runs"]["fastlora"]["losses"]) == 3


@pytest.mark.parametrize("name, library", [("fp4", "bitsandbytes"), ("float8", "torchao")])
def test_a_missing_package_is_named_before_anything_is_read(name, library, finetune, tmp_path, monkeypatch):
    monkeypatch.setattr("fastlora.finetune.quantise.find_spec", lambda found: None)
    result = finetune("--base-quant", name, "--output", tmp_path / "run")
    wanted = f"--base-quant {name} needs the {library} package: pip install 'fastlora[quantised]'"
    assert result.code == 2 and wanted in result.error_line and not (tmp_path / "run").exists()


def test_full_fine_tuning_of_quantised_weights_is_refused(finetune, tmp_path):
    result = finetune("--base-quant", "nf4", "--measure-full", "--output", tmp_path / "run")
    assert result.code == 2 and "quantised ones cannot train: leave one out" in result.error_line


@pytest.mark.parametrize("name", ["fp4", "float8"])
def test_the_output_head_stays_dense(name):
    bitsandbytes() if name == "fp4" else torchao()
    model = quantise_linears(make_llama(torch.bfloat16), name, torch.bfloat16)
    dense = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and read_layer(m) is None]
    assert dense == ["lm_head"]
    packed = [read_layer(m) for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    assert {(w.format, w.dtype, w.nested) for w in packed} == {(name, torch.bfloat16, name == "fp4")}
    assert len(packed) == 14
