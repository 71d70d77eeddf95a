"""PEFT's recipes on a patched model: it starts, trains, restricts and saves what stock does."""

import copy

import pytest
import torch
from torch import nn

import fastlora

peft = pytest.importorskip("peft")

from fastlora.integrations.peft import patch, unserved  # noqa: E402
from tests.support.numerics import assert_reordered  # noqa: E402
from tests.support.peft_models import (  # noqa: E402
    IDS,
    Base,
    assert_same_training_step,
    assert_trains_alike,
    fallbacks,
    fused_calls,
    make_pair,
    randomise,
)
from tests.support.tiny_llama import make_llama  # noqa: E402

TOKENS = torch.arange(20).view(2, 10) % 19
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


def logits(model):
    return model(input_ids=TOKENS).logits


def llama_pair(**config):
    """A PEFT model of a tiny Llama, stock and patched."""
    config = {"r": 3, "lora_alpha": 7, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **config}
    base = make_llama()
    torch.manual_seed(2)
    stock = randomise(peft.get_peft_model(base, peft.LoraConfig(**config)))
    fused = copy.deepcopy(stock)
    patched = patch(fused)
    fastlora.reset_dispatch_counts()
    return stock, fused, patched


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian", False])
def test_starts(init):
    rank = {"r": 4} if init == "orthogonal" else {}
    stock, fused = make_pair(init_lora_weights=init, **rank)
    assert_same_training_step(stock, fused)
    assert fused_calls() == 4 and not fallbacks()


def test_an_eva_start_drawn_on_the_patched_model():
    """Its hooks are on the LoRA layers, whose class patch has changed."""
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    eva = peft.EvaConfig(rho=1.0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva", eva_config=eva)
    models = []
    for patches in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(Base(), config)
        if patches:
            patch(model)
        batches = [{"ids": (IDS + i) % 13} for i in range(4)]
        torch.manual_seed(1)
        initialize_lora_eva_weights(
            model,
            batches,
            forward_fn=lambda model, batch: model(**batch),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=lambda inputs, model_input, name: inputs[0].flatten(0, 1),
            show_progress_bar=False,
        )
        models.append(randomise(model))
    stock, fused = models
    a = fused.base_model.model.q_proj.lora_A["default"].weight
    assert torch.equal(a, stock.base_model.model.q_proj.lora_A["default"].weight)
    assert_reordered([a @ a.t()], [torch.eye(2)], a.shape[1])  # directions of the inputs
    fastlora.reset_dispatch_counts()
    assert_same_training_step(stock, fused)
    assert fused_calls() == 2 and not fallbacks()


def test_lora_plus():
    from peft.optimizers import create_loraplus_optimizer

    stock, fused = make_pair()
    moved = assert_trains_alike(
        stock,
        fused,
        lambda model: create_loraplus_optimizer(model, torch.optim.SGD, lr=0.01, loraplus_lr_ratio=16),
    )
    assert moved == {"lora_A", "lora_B"} and not fallbacks()


def test_lora_fa_keeps_a_and_computes_no_gradient_of_it():
    from peft.optimizers import create_lorafa_optimizer

    stock, fused = make_pair()
    moved = assert_trains_alike(stock, fused, lambda model: create_lorafa_optimizer(model, r=3, lora_alpha=7, lr=0.01))
    assert moved == {"lora_B"} and not fallbacks()
    assert fused.base_model.model.q_proj.lora_A["default"].weight.grad is None


def test_alora_is_a_branch_of_each_samples_last_rows():
    stock, fused, _ = llama_pair(alora_invocation_tokens=[5, 6], target_modules=["q_proj", "v_proj"])
    count = 4
    assert not unserved(fused)
    late = TOKENS.clone()
    late[1, -2:] = torch.tensor([5, 6])  # which begins at another place than in the first sample
    # In both samples, in one, at different places, in none; and within a longer text of one token a call.
    for batch in (TOKENS, TOKENS[:, :4], late, late.flip(1), late.flip(0)):
        for model in (stock, fused):
            model.zero_grad()
        fastlora.reset_dispatch_counts()
        outputs = [model(input_ids=batch).logits for model in (stock, fused)]
        torch.testing.assert_close(outputs[1], outputs[0])
        assert not fallbacks() and fused_calls() == count
        for output in outputs:
            output.pow(2).sum().backward()
        for (name, got), wanted in zip(fused.named_parameters(), stock.parameters(), strict=True):
            assert (got.grad is None) == (wanted.grad is None), name
            if wanted.grad is not None:
                torch.testing.assert_close(got.grad, wanted.grad, msg=name)
    with fused.disable_adapter():
        assert not torch.equal(fused(input_ids=TOKENS).logits, stock(input_ids=TOKENS).logits)  # the branch is there
    prompt = TOKENS[:1]
    wanted, got = (
        model.eval().generate(input_ids=prompt, max_new_tokens=4, do_sample=False) for model in (stock, fused)
    )
    assert torch.equal(got, wanted) and not fallbacks().keys() - {"adapters disabled"}


RESTRICTIONS = {
    "patterns": (
        {"rank_pattern": {"0.self_attn.q_proj": 5, "q_proj": 1, "down_proj": 2}, "alpha_pattern": {r"1\..*": 1}},
        6,
    ),
    "rslora and patterns": ({"use_rslora": True, "rank_pattern": {"v_proj": 4}}, 6),
    "exclude a suffix": ({"exclude_modules": ["layers.1.mlp.down_proj", "v_proj"]}, 3),
    "exclude by pattern": ({"exclude_modules": r".*\.0\..*"}, 3),
    "one block": ({"layers_to_transform": 1}, 3),
    "blocks by name": ({"layers_to_transform": [0], "layers_pattern": "layers"}, 3),
    "all at once": ({"layers_to_transform": [0, 1], "exclude_modules": ["q_proj"], "rank_pattern": {"v_proj": 1}}, 4),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*rank_pattern.*")
@pytest.mark.parametrize("name", RESTRICTIONS)
def test_restricted_layers_patched_injected_and_saved(name, tmp_path):
    """By the same arguments: PEFT's layers with PEFT's ranks and scalings; the files say so to both."""
    options, count = RESTRICTIONS[name]
    stock, fused, patched = llama_pair(**options)
    assert len(patched) == count and not patched.unserved
    assert_same_training_step(stock, fused, forward=logits)
    assert fused_calls() == 2 * count and not fallbacks()
    options = {"rslora" if key == "use_rslora" else key: value for key, value in options.items()}
    model = make_llama()
    torch.manual_seed(2)
    paths = fastlora.inject(model, PROJECTIONS, r=3, alpha=7, **options)
    assert [f"base_model.model.{path}" for path in paths] == list(patched)
    for path in paths:
        ours, theirs = model.get_submodule(path), stock.get_submodule(f"base_model.model.{path}")
        assert (ours.r, ours.scaling) == (theirs.r["default"], theirs.scaling["default"])
        assert torch.equal(ours.lora_A, theirs.lora_A["default"].weight)
        with torch.no_grad():
            ours.lora_B.copy_(theirs.lora_B["default"].weight)
    expected = logits(model)
    torch.testing.assert_close(expected, logits(stock))
    fastlora.save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(make_llama(), tmp_path / "ours")), expected)
    stock.save_pretrained(tmp_path / "theirs")
    for directory in ("ours", "theirs"):
        again = make_llama()
        assert fastlora.load_adapter(again, tmp_path / directory) == paths
        assert torch.equal(logits(again), expected)


REFUSED = {
    "'o_proj' match none of the targets": {"exclude_modules": ["o_proj"]},
    "match none of the targets; names go in a list": {"exclude_modules": "q_proj"},
    "exclude_modules leave none of the targets": {"exclude_modules": PROJECTIONS},
    r"exclude_modules '\(' is not a regular expression": {"exclude_modules": "("},
    "layers_to_transform 2: no target lies there; those of the targets are 0, 1": {"layers_to_transform": [0, 2]},
    "give both": {"layers_pattern": "layers"},
    "rank_pattern: 'o_proj' match none of the layers that get a branch": {"rank_pattern": {"o_proj": 2, "q_proj": 2}},
    r"alpha_pattern: '\(' is not a regular expression": {"alpha_pattern": {"(": 2}},
    "r must be at least 1, got 0": {"rank_pattern": {"q_proj": 0}},
    "alpha must be finite": {"alpha_pattern": {"q_proj": float("inf")}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_matches_nothing_is_refused_and_nothing_changes(message):
    model = make_llama()
    before = repr(model)
    with pytest.raises(ValueError, match=message):
        fastlora.inject(model, PROJECTIONS, **REFUSED[message])
    with pytest.raises(ValueError, match="goes with a list of names"):
        fastlora.inject(model, "all-linear", layers_to_transform=0)
    for wrong in ([], [True], ["0"]):
        with pytest.raises(TypeError, match="layers_to_transform must be an integer"):
            fastlora.inject(model, PROJECTIONS, layers_to_transform=wrong)
    assert repr(model) == before


def test_a_whole_path_is_taken_whatever_its_block_as_in_peft():
    path, options = "model.layers.0.mlp.up_proj", {"layers_to_transform": [1]}
    stock, *_ = llama_pair(target_modules=[path, "q_proj"], **options)
    model = make_llama()
    names = fastlora.inject(model, [path, "q_proj"], r=3, **options)
    assert sorted(names) == [path, "model.layers.1.self_attn.q_proj"]
    assert {f"base_model.model.{name}" for name in names} == {
        name for name, m in stock.named_modules() if isinstance(m, peft.tuners.lora.Linear)
    }
    excluded = make_llama()
    left = fastlora.inject(excluded, "all-linear", r=2, exclude_modules=r".*mlp.*")
    assert len(left) == 8 and not any("mlp" in name for name in left)


def test_the_block_is_the_first_number_of_a_path_as_in_peft():
    """Not that of an expert further down."""

    def build():
        experts = [nn.ModuleList([nn.ModuleDict({"up": nn.Linear(3, 3)}) for _ in range(2)]) for _ in range(2)]
        blocks = nn.ModuleList([nn.ModuleDict({"experts": each}) for each in experts])
        return nn.ModuleDict({"model": nn.ModuleDict({"layers": blocks})})

    options = {"target_modules": ["up"], "layers_to_transform": [1]}
    stock = peft.get_peft_model(build(), peft.LoraConfig(r=2, **options))
    theirs = [name for name, m in stock.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
    ours = fastlora.inject(build(), r=2, **options)
    assert [f"base_model.model.{name}" for name in ours] == theirs and len(theirs) == 2


# What patch leaves alone


EMBEDDINGS = {
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "embeddings and the head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "trainable tokens": {"trainable_token_indices": [1, 5], "target_modules": ["q_proj"]},
    "a head saved whole": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    "embeddings saved whole": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
}


@pytest.mark.filterwarnings("ignore:.*tie.*", "ignore:.*embedding layers.*", "ignore:Setting `save_embedding")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_and_what_trains_whole_stay_pefts(name, tied, tmp_path):
    """Embeddings are PEFT's forward, counted; trainable tokens and saved modules are no LoRA layers: not touched."""
    base = make_llama(tie_word_embeddings=tied)
    torch.manual_seed(2)
    stock = randomise(peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=7, **EMBEDDINGS[name])))
    for parameter_name, parameter in stock.named_parameters():
        if "lora_embedding_A" in parameter_name:
            nn.init.normal_(parameter, std=0.3)
    fused = copy.deepcopy(stock)
    before = {path: type(module) for path, module in stock.named_modules()}
    patched = patch(fused)
    after = {path: type(module) for path, module in fused.named_modules()}
    # PEFT's LoraModel takes adapter_names in training, too, once patched.
    assert {path for path in before if before[path] is not after[path]} == {"base_model", *patched}
    heads = 1 if "head" in name and "whole" not in name else 0
    assert len(patched) == 2 + heads
    reason = "a peft.tuners.lora.layer.Embedding, not a stock lora.Linear"
    expected = {reason: 1} if name.startswith("embeddings") and "whole" not in name else {}
    assert list(patched.unserved.values()) == list(expected)
    fastlora.reset_dispatch_counts()
    assert_same_training_step(stock, fused, forward=logits)
    assert fallbacks() == expected and fused_calls() == 2 * len(patched)
    for model in (stock, fused):
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for model, directory in ((stock, "stock"), (fused, "fused")):
        model.save_pretrained(tmp_path / directory, save_embedding_layers=False)
    from safetensors.torch import load_file

    files = [load_file(tmp_path / d / "adapter_model.safetensors") for d in ("stock", "fused")]
    assert files[0].keys() == files[1].keys()
    for key, value in files[1].items():
        torch.testing.assert_close(value, files[0][key], msg=key)
