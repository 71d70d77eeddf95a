"""A Llama of two narrow layers, for tests that need a model as transformers builds it."""

import pytest
import torch

SIZES = {
    "vocab_size": 19,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def make_llama(dtype: torch.dtype = torch.float32, **changes):
    """The same weights at every call; skips the test where transformers is missing. ``changes``: of the config."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes})).to(dtype)
