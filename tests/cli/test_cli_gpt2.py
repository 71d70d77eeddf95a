"""The command line on a GPT-2, whose Conv1D layers keep their weights as [in, out]."""

import json

import pytest
import torch

from fastlora.adapters.files import read_adapter
from fastlora.cli.analyze import _weights
from fastlora.finetune.compare import LOSS_TOLERANCE
from tests.cli.conftest import save_tokenizer
from tests.support.tiny_gpt2 import make_gpt2

TARGETS = "c_attn,c_proj,c_fc"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gpt2")
    size = save_tokenizer(directory)
    make_gpt2(n_layer=1, vocab_size=size, n_positions=64, eos_token_id=0, bos_token_id=None).save_pretrained(directory)
    return directory


def test_trained_as_by_peft_merged_and_read_for_analysis(finetune, fastlora_cli, gpt2, tmp_path):
    from transformers import GPT2LMHeadModel

    result = finetune(
        "--model", gpt2, "--targets", TARGETS, "--steps", 3, "--compare", "peft", "--output", tmp_path / "run"
    )
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    runs = report["runs"]
    assert runs["fastlora"]["losses"][-1] < runs["fastlora"]["losses"][0] and report["agreement"]["same_seed_start"]
    for ours, theirs in zip(runs["fastlora"]["losses"], runs["peft"]["losses"], strict=True):
        assert abs(ours - theirs) <= LOSS_TOLERANCE
    adapter = tmp_path / "run" / "adapter"
    result = fastlora_cli("merge", adapter, "--base", gpt2, "--output", tmp_path / "merged")
    assert result.code == 0 and "Merged 4 layers" in result.out, result.err
    path = "transformer.h.0.attn.c_proj"  # a square weight, which fits either way round
    weight = GPT2LMHeadModel.from_pretrained(gpt2).get_submodule(path).weight
    analysed = _weights(str(gpt2), read_adapter(adapter))
    assert torch.equal(analysed[path], weight.t()) and not torch.equal(weight, weight.t())


def test_unknown_targets_are_named_before_anything_is_loaded(finetune, gpt2):
    result = finetune("--model", gpt2, "--targets", "q_proj")
    assert result.code == 2
    assert "'q_proj' match no module of GPT2LMHeadModel; names that would match: c_attn" in result.error_line
