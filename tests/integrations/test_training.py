"""Existing training code with the one line added: the losses, gradients and masks that it had, and less memory."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.backends import reference
from fastlora.finetune.memory import SavedTensors
from fastlora.model import inject
from fastlora.module import LoRALinear
from fastlora.problem import Needs

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

from fastlora.integrations.peft import patch, unserved  # noqa: E402

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS, RATE = 8, 5e-3
TEXT = torch.randint(0, 61, (1, 4, 16), generator=torch.Generator().manual_seed(0)).expand(STEPS, 4, 16)


def make_llama(dtype=torch.float32):
    """The architecture of SmolLM2, two narrow layers of it."""
    torch.manual_seed(0)
    config = {
        "vocab_size": 61,
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # so that the loss is worth following
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(dtype)


def make_stock(dtype=torch.float32, seed=1, **config):
    model = make_llama(dtype)
    torch.manual_seed(seed)
    lora = peft.LoraConfig(r=5, lora_alpha=20, target_modules=PROJECTIONS, task_type="CAUSAL_LM", **config)
    return peft.get_peft_model(model, lora).train()


def make_fused(*args, **kwargs):
    model = make_stock(*args, **kwargs)
    assert len(patch(model, strict=True)) == 14
    fastlora.reset_dispatch_counts()
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, steps=STEPS, accumulate=1, autocast=None, scaler=None):
    """A plain loop; returns the loss of every step."""
    optimizer = torch.optim.AdamW(trained(model), lr=RATE)
    losses = []
    for batch in TEXT[:steps]:
        total = 0.0
        for part in batch.chunk(accumulate):
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                loss = model(input_ids=part, labels=part).loss / accumulate
            (scaler.scale(loss) if scaler else loss).backward()
            total += loss.item()
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return torch.tensor(losses)


def assert_fused_only():
    counts = fastlora.dispatch_counts()
    assert counts["fallbacks"] == {} and counts["cuda"] + counts["triton"] + counts["reference"] > 0


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_a_plain_loop_has_the_losses_of_stock(config, accumulate):
    expected = train(make_stock(**config), accumulate=accumulate)
    losses = train(make_fused(**config), accumulate=accumulate)
    assert (losses - expected).abs().max() <= 1e-5
    assert expected[-1] < expected[0] - 0.5  # it learns, and so the adapters matter to the comparison
    assert_fused_only()


def test_inject_has_the_losses_of_peft():
    model = make_llama()
    torch.manual_seed(1)
    assert len(inject(model, PROJECTIONS, r=5, alpha=20)) == 14
    assert (train(model.train()) - train(make_stock())).abs().max() <= 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bf16_losses_stay_within_the_seed_spread_of_stock(dropout):
    seeds = torch.stack([train(make_stock(torch.bfloat16, seed, lora_dropout=dropout)) for seed in range(1, 5)])
    losses = train(make_fused(torch.bfloat16, 1, lora_dropout=dropout))
    assert_fused_only()
    spread = (seeds - seeds.mean(0)).abs().max()
    assert (losses - seeds.mean(0)).abs().max() <= 2 * spread
    if not dropout:  # the same start, so closer than another seed
        assert (losses - seeds[0]).abs().mean() <= (seeds[1:] - seeds[0]).abs().mean()


def test_a_bf16_base_with_float32_adapters_and_dropout_is_all_fused():
    model = make_fused(torch.bfloat16, lora_dropout=0.1)
    assert {p.dtype for p in trained(model)} == {torch.float32}
    train(model, steps=2)
    assert unserved(model) == {}
    counts = fastlora.dispatch_counts()
    assert counts["fallbacks"] == {} and counts["cuda"] + counts["triton"] + counts["reference"] == 2 * 2 * 14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_amp_with_grad_scaler(dtype):
    def run(make):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        return train(make(), autocast=dtype, scaler=scaler), scaler.get_scale()

    (losses, scale), (expected, expected_scale) = run(make_fused), run(make_stock)
    assert_fused_only()
    assert scale == expected_scale
    exact = train(make_stock())
    assert (losses - exact).abs().max() <= 2 * (expected - exact).abs().max()


def test_grad_scaler_skips_a_step_that_overflows():
    model = make_fused()
    before = [p.detach().clone() for p in trained(model)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    train(model, steps=1, autocast=torch.float16, scaler=scaler)
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, b) for p, b in zip(trained(model), before, strict=True))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return STEPS * 4

    def __getitem__(self, index):
        row = TEXT.reshape(-1, 16)[index]
        return {"input_ids": row, "labels": row}


def run_trainer(model, directory, **options):
    model.enable_input_require_grads()  # what reentrant checkpointing needs of any PEFT model
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=RATE,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=3,
        disable_tqdm=True,
        **options,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_transformers_trainer(tmp_path, checkpointing):
    options = {}
    if checkpointing is not None:
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    losses = run_trainer(make_fused(), tmp_path, **options)
    assert_fused_only()
    expected = run_trainer(make_stock(), tmp_path, **options)
    assert len(losses) == STEPS and (losses - expected).abs().max() <= 1e-5
    assert expected[-1] < expected[0] - 0.5


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")

    def run(model):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW(trained(model), lr=RATE)
        loader = torch.utils.data.DataLoader(Rows(), batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        losses = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        return torch.tensor(losses)

    losses = run(make_fused())
    assert_fused_only()
    assert (losses - run(make_stock())).abs().max() <= 1e-5


def step_gradients(model, seed=7):
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(input_ids=TEXT[0], labels=TEXT[0]).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in trained(model)]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_the_same_masks(use_reentrant):
    model = make_fused(lora_dropout=0.3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # at its zero start the mask would not matter
            nn.init.normal_(parameter, std=0.1)
    loss, expected = step_gradients(model)
    assert not torch.equal(step_gradients(model, seed=8)[0], loss)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    fastlora.reset_dispatch_counts()
    checkpointed_loss, gradients = step_gradients(model)
    counts = fastlora.dispatch_counts()
    assert counts["cuda"] + counts["triton"] + counts["reference"] == 3 * 14  # the forward ran twice
    assert torch.equal(checkpointed_loss, loss)
    for got, wanted in zip(gradients, expected, strict=True):
        assert torch.equal(got, wanted)


def test_checkpointing_without_the_random_state_draws_other_masks():
    """The test above can fail: a recompute that does not restore the generator changes the gradients."""
    layer = LoRALinear(16, 16, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(8, 16, requires_grad=True)

    def gradient(preserve):
        torch.manual_seed(0)
        y = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=preserve)
        return torch.autograd.grad(y.sum(), x)[0]

    torch.manual_seed(0)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(gradient(True), expected) and not torch.equal(gradient(False), expected)


def test_frozen_inputs_cost_no_gradient(monkeypatch):
    needs = []
    backward = reference.lora_backward

    def spy(*args):
        needs.append(next(arg for arg in args if isinstance(arg, Needs)))
        return backward(*args)

    monkeypatch.setattr(reference, "lora_backward", spy)
    step_gradients(make_fused())
    # The first layer's q, k and v read the frozen embedding's output; all else passes gradients on.
    assert [need.dx for need in needs].count(False) == 3 and len(needs) == 14
    assert all(need.da and need.db and not need.dbias for need in needs)


def saved_bytes(function, parameters):
    """Bytes that autograd keeps for the backward of ``function()``, each storage once, parameters apart."""
    with SavedTensors(parameters) as saved:
        output = function()
    return saved.bytes, output


M, K, N, R = 64, 96, 80, 8


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("base", "adapter"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["fp32", "bf16", "bf16 base, fp32 adapters"],
)
def test_saved_for_backward_is_x_and_s(base, adapter, dropout):
    torch.manual_seed(0)
    stock = peft.get_peft_model(
        nn.Sequential(nn.Linear(K, N)).to(base),
        peft.LoraConfig(r=R, target_modules=["0"], lora_dropout=dropout),
        autocast_adapter_dtype=adapter == torch.float32,
    )
    fused = copy.deepcopy(stock)
    patch(fused, strict=True)
    x = torch.randn(M, K, dtype=base, requires_grad=True)
    theirs, _ = saved_bytes(lambda: stock(x), stock.parameters())
    ours, _ = saved_bytes(lambda: fused(x), fused.parameters())
    x_and_s = M * K + M * R
    seed = 8 if dropout else 0
    assert ours == x_and_s * base.itemsize + seed
    # Stock keeps x in the adapters' dtype, and with dropout the mask (a byte each, at least) besides.
    assert theirs >= x_and_s * adapter.itemsize + (M * K if dropout else 0)


def test_under_autocast_the_input_is_not_kept_in_float32():
    torch.manual_seed(0)
    layer = LoRALinear.from_linear(nn.Linear(K, N, dtype=torch.bfloat16), r=R, adapter_dtype=torch.float32)
    x = torch.randn(M, K, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        kept, _ = saved_bytes(lambda: layer(x), layer.parameters())
    assert kept <= (M * K + M * R) * 2 + R * (K + N) * 4
