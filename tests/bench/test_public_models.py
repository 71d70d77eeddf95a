"""Trained shares of public models, against published numbers of parameters."""

import pytest
import torch

from fastlora.bench import public_models
from fastlora.bench.public_models import MODELS, PublicModel
from fastlora.model import inject

PUBLISHED = {"SmolLM2-135M": 134.5e6, "Llama-3.1-8B": 8.03e9, "Llama-3.1-70B": 70.6e9, "GPT-3 175B": 175e9}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_parameters_are_the_published_ones(model):
    assert model.parameters == pytest.approx(PUBLISHED[model.name], rel=0.005)


def test_the_papers_adapter_has_4_7_million_parameters_a_rank_of_one():
    """Of 18.9 million at r = 4 (Wq and Wv) on GPT-3, and twice at r = 8."""
    (model,) = (model for model in MODELS if model.name.startswith("GPT-3"))
    assert model.trained_on_q_and_v(1) == 4_718_592 and model.trained_on_q_and_v(4) == 18_874_368


def test_the_arithmetic_is_what_a_model_holds():
    transformers = pytest.importorskip("transformers")
    tiny = PublicModel("tiny", 2, 32, 16, 48, 50)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip

    def trained(targets):
        model = transformers.LlamaForCausalLM(config)
        matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        assert matrices == tiny.parameters
        inject(model, targets, r=3)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    with torch.device("cpu"):
        assert trained(["q_proj", "v_proj"]) == tiny.trained_on_q_and_v(3)
        assert trained("all-linear") == tiny.trained_on_all(3)


def test_the_table_has_every_model():
    table = public_models.shares_table()
    assert [row[0] for row in table.rows] == [model.name for model in MODELS]
    assert table.rows[-1][2:4] == ["18,874,368", "1 in 9,249"]
