"""Tiny mixtures of experts as transformers builds them, with PEFT's LoRA on attention and experts."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.integrations.moe")

_SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
_FINE = {"moe_intermediate_size": 20}
MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "head_dim": 8, "norm_topk_prob": True, **_FINE},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "Olmoe": {"num_experts": 4},
    "DeepseekV3": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        **_FINE,
    },
}
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.arange(24).view(2, 12) * 7 % 31


def make_moe(kind: str = "Mixtral", **changes):
    """The same weights at every call; all matrices large enough that each expert matters."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**_SIZES, **MODELS[kind], "use_cache": False, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def make_peft(kind: str = "Mixtral", dtype=torch.float32, autocast_adapter_dtype=True, changes=None, **config):
    """A PEFT model whose branches are about as large as its frozen products."""
    model = make_moe(kind, **(changes or {})).to(dtype)
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "o_proj"], "target_parameters": PARAMETERS}
    config = peft.LoraConfig(**{**options, **config})
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    return randomise(model)


def randomise(model, adapter: str = "default", seed: int = 1):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def ungated_experts():
    """Experts of 16 features without a gate and with a norm behind, under the name "experts"."""
    from transformers.integrations.moe import use_experts_implementation

    @use_experts_implementation(has_gate=False, has_post_expert_norm=True)
    class Plain(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn, self.post_expert_norm = 4, nn.GELU(), nn.LayerNorm(16)
            self.up_proj, self.down_proj = nn.Parameter(torch.randn(4, 12, 16)), nn.Parameter(torch.randn(4, 16, 12))

        def forward(self, *inputs):
            raise NotImplementedError("eager")

    return nn.ModuleDict({"experts": Plain(SimpleNamespace(_experts_implementation="grouped_mm"))})
