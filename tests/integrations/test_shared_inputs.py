"""transformers models with layers that share an input computed together: the losses that they have without groups."""

import copy
import functools

import pytest
import torch
from torch import nn

import fastlora
from fastlora import inject, shared_inputs

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

from fastlora.integrations.peft import FusedLinear, patch, unpatch  # noqa: E402

STEPS, RATE = 3, 5e-3
IDS = torch.randint(3, 31, (2, 8), generator=torch.Generator().manual_seed(0))


def _llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=31, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.2,
        )
    )  # fmt: skip


def _bert():
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=31, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, initializer_range=0.2,
        )
    )  # fmt: skip


def _bart():
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=31, d_model=12, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20, max_position_embeddings=16,
            pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, init_std=0.2,
        )
    )  # fmt: skip


def _t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=31, d_model=12, d_kv=6, d_ff=20, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    )  # fmt: skip


# The model, its targets, its groups as they print, and how often a forward computes one.
ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
MODELS = {
    "llama": (
        _llama,
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "model.layers.*.self_attn: q_proj, k_proj, v_proj (2); model.layers.*.mlp: gate_proj, up_proj (2)",
        4,
    ),
    "bert": (
        _bert,
        ["query", "key", "value"],
        "bert.encoder.layer.*.attention.self: query, key, value (2)",
        2,
    ),
    "bart": (
        _bart,
        ATTENTION,
        "model.encoder.layers.*.self_attn: q_proj, k_proj, v_proj (1); "
        "model.decoder.layers.*.self_attn: q_proj, k_proj, v_proj (1); "
        "model.decoder.layers.*.encoder_attn: k_proj, v_proj (1)",
        3,
    ),
    "t5": (
        _t5,
        ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
        "encoder.block.*.layer.*.SelfAttention: q, k, v (1); "
        "encoder.block.*.layer.*.DenseReluDense: wi_0, wi_1 (1); "
        "decoder.block.*.layer.*.SelfAttention: q, k, v (1); "
        "decoder.block.*.layer.*.EncDecAttention: k, v (1); "
        "decoder.block.*.layer.*.DenseReluDense: wi_0, wi_1 (1)",
        5,
    ),
}


def make(kind, grouped, way="patch", dropout=0.0):
    build, targets, *_ = MODELS[kind]
    torch.manual_seed(0)
    model = build()
    torch.manual_seed(1)
    if way == "inject":
        inject(model, targets, r=3, dropout=dropout, group=grouped)
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=targets, lora_dropout=dropout))
        patch(model, strict=True, group=grouped)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    for module in model.modules():  # the models' own dropout would draw between two steps' seeds
        if isinstance(module, nn.Dropout) and "lora" not in type(module).__name__.lower() and not dropout:
            module.p = 0.0
    fastlora.reset_dispatch_counts()
    return model.train()


def train(model, autocast=False, steps=STEPS):
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def groups_and_fallbacks():
    counts = fastlora.dispatch_counts()
    fastlora.reset_dispatch_counts()
    return counts.get("groups", 0), counts["fallbacks"]


@functools.cache
def stock_losses(kind, way, dropout):
    return train(make(kind, False, way, dropout))


@pytest.mark.parametrize("way", ["patch", "inject"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_losses_of_single_layers(kind, way):
    """By the models' dummy inputs, with dropout: the masks are those of single layers as well."""
    *_, printed, per_forward = MODELS[kind]
    model = make(kind, True, way, dropout=0.1)
    found = shared_inputs(model)
    assert repr(found).replace("base_model.model.", "") == printed
    losses = train(model)
    assert groups_and_fallbacks() == (STEPS * per_forward, {})
    assert (losses - stock_losses(kind, way, 0.1)).abs().max() <= 1e-5
    assert losses.diff().abs().min() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_autocast(kind):
    """The outputs of a step have the same bits; a later one sees that dX is a sum of other roundings."""
    losses = train(make(kind, True), autocast=True)
    groups, reasons = groups_and_fallbacks()
    assert groups == STEPS * MODELS[kind][-1] and not reasons
    expected = train(make(kind, False), autocast=True)
    assert losses[0] == expected[0] and (losses - expected).abs().max() <= 0.01 * expected.abs().max()


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return STEPS * len(IDS)

    def __getitem__(self, index):
        row = IDS[index % len(IDS)]
        return {"input_ids": row, "labels": row}


def run_trainer(model, directory, reentrant):
    model.enable_input_require_grads()  # what reentrant checkpointing needs of any PEFT model
    checkpointing = {}
    if reentrant is not None:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    arguments = transformers.TrainingArguments(
        output_dir=str(directory), per_device_train_batch_size=len(IDS), num_train_epochs=1, learning_rate=RATE,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, seed=3, disable_tqdm=True, **checkpointing,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.mark.parametrize(
    "kind, reentrant",
    [("llama", True), ("llama", False), ("bert", None), ("bart", False), ("t5", True)],
)
def test_trainer_and_checkpointing(kind, reentrant, tmp_path):
    """Recomputed blocks compute their groups again; with dropout their masks are the same."""
    model = make(kind, True, dropout=0.1)
    losses = run_trainer(model, tmp_path, reentrant)
    groups, reasons = groups_and_fallbacks()
    assert groups == STEPS * MODELS[kind][-1] * (1 if reentrant is None else 2) and not reasons
    expected = run_trainer(make(kind, False, dropout=0.1), tmp_path, reentrant)
    assert len(losses) == STEPS and (losses - expected).abs().max() <= 1e-5


def test_gradients_of_a_checkpointed_model_are_those_of_a_plain_one():
    def gradients(model):
        torch.manual_seed(4)
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = gradients(make("llama", True, dropout=0.3))
    for reentrant in (True, False):
        model = make("llama", True, dropout=0.3)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        got = gradients(model)
        assert len(got) == len(expected) and all(map(torch.equal, got, expected))


def test_generation_with_a_cache():
    """k and v of a cross-attention are called in the first step alone: the plan was made by one forward."""
    for kind in ("llama", "t5"):
        models = [make(kind, grouped).eval() for grouped in (True, False)]
        made = [m.generate(input_ids=IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False) for m in models]
        assert torch.equal(*made)
        groups, reasons = groups_and_fallbacks()
        assert groups > 0 and not [r for r in reasons if "never called for" in r]


def test_a_patched_model_prints_its_groups_and_is_taken_apart_by_unpatch():
    base = _llama()
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    patched = patch(model, group={"input_ids": IDS})
    text = "base_model.model.model.layers.*.self_attn: q_proj, v_proj (2)"
    assert repr(patched) == f"4 of 4 LoRA layers fused; together: {text}"
    assert patched.groups == shared_inputs(model) and len(patched.groups) == 2
    assert patch(model).groups == {} == shared_inputs(model)  # the next call forgets
    patch(model, group=True)
    expected = copy.deepcopy(model)
    unpatch(model)
    assert shared_inputs(model) == {}
    assert not any("shares_input" in vars(m) or m._forward_hooks for m in model.modules())
    torch.testing.assert_close(model(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    with pytest.raises(TypeError, match="group must be False, True"):
        patch(model, group="q_proj")
    assert not any(type(m) is FusedLinear for m in model.modules())


def test_what_peft_changes_between_calls_is_seen():
    """Adapters switched, disabled, several at once, with DoRA, with a lora_bias, hotswapped: single layers or PEFT.
    In float64, whose roundings are far below what any other adapter or factor changes."""
    model = make("llama", True).double()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    stock = copy.deepcopy(model)
    unpatch(stock)

    def agree(groups, reason):
        fastlora.reset_dispatch_counts()
        got = model(input_ids=IDS).logits
        found, reasons = groups_and_fallbacks()
        assert found == groups and (reason is None or reasons.get(f"shared input: {reason}", 0) > 0), reasons
        torch.testing.assert_close(got, stock(input_ids=IDS).logits, rtol=1e-9, atol=1e-9)

    agree(4, None)
    for each in (model, stock):
        each.set_adapter("second")
    agree(2, "0 active adapters")
    for each in (model, stock):
        each.base_model.set_adapter(["default", "second"])
    agree(2, "several active adapters")
    for each in (model, stock):
        each.base_model.set_adapter("default")
    with model.disable_adapter(), stock.disable_adapter():
        agree(0, "adapters disabled")
    agree(4, None)
    names = ["default", "__base__"]
    got, wanted = (each(input_ids=IDS, adapter_names=names).logits for each in (model.eval(), stock.eval()))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    assert groups_and_fallbacks()[0] == 0
    for config, reason in (({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "lora_bias")):
        other = peft.get_peft_model(_llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], **config))
        patch(other, group=True)
        fastlora.reset_dispatch_counts()
        other(input_ids=IDS)
        assert groups_and_fallbacks() == (0, {f"shared input: {reason}": 4})


def test_a_compiled_model_has_the_values_of_single_layers():
    model, plain = make("llama", True), make("llama", False)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model.model.layers[0].mlp, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 12)
    fastlora.reset_dispatch_counts()
    got, wanted = compiled(x), plain.base_model.model.model.layers[0].mlp(x)
    assert groups_and_fallbacks() == (0, {})
    torch.testing.assert_close(got, wanted)
