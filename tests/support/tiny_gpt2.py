"""A GPT-2 of two narrow layers, whose linear layers keep their weights as [in, out]."""

import pytest
import torch

SIZES = {"vocab_size": 19, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 16}
SIZES |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TARGETS = ["c_attn", "c_proj", "c_fc"]
IDS = torch.arange(20).view(2, 10) % 19


def make_gpt2(dtype: torch.dtype = torch.float32, **changes):
    """The same weights at every call; skips the test where transformers is missing. ``changes``: of the config."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**SIZES, **changes})).to(dtype)
