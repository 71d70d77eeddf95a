"""The pages in fastlora.integrations run as they stand."""

import re

import pytest
import torch

import fastlora
from tests.support import tiny_llama

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

PAGE = re.compile(r"^\*\*(?P<title>[^*:.]+)[:.].*?```python\n(?P<code>.*?)```", re.DOTALL | re.MULTILINE)
PAGES = {page["title"]: page["code"] for page in PAGE.finditer(fastlora.integrations.__doc__)}
TITLES = [
    "PEFT and transformers' Trainer",
    "Mixtures of experts",
    "Several adapters in one batch",
    "TRL's SFTTrainer",
    "Plain PyTorch",
    "Layers that share an input",
    "FSDP2",
    "Merge and serve",
    "Selective checkpointing",
    "Export",
]


def make_llama():
    return tiny_llama.make_llama(vocab_size=31, hidden_size=16, intermediate_size=24)


BATCHES = [torch.randint(0, 31, (2, 8), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def run(title, tmp_path, **names):
    given = {"model": make_llama(), "batches": BATCHES, "directory": tmp_path / "adapter", **names}
    fastlora.reset_dispatch_counts()
    exec(compile(PAGES[title], title, "exec"), given)
    counts = fastlora.dispatch_counts()
    assert counts["fallbacks"] == {}
    assert counts["cuda"] + counts["triton"] + counts["reference"] > 0 or title in ("Merge and serve", "Export")
    return given


def test_all_pages_are_known():
    assert list(PAGES) == TITLES


def test_peft_and_trainer(tmp_path):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True
    )
    dataset = [{"input_ids": row, "labels": row} for batch in BATCHES for row in batch]
    run("PEFT and transformers' Trainer", tmp_path, arguments=arguments, dataset=dataset)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_mixtures_of_experts(tmp_path):
    from tests.support.tiny_moe import make_moe

    given = run("Mixtures of experts", tmp_path, model=make_moe())
    assert all(p.grad is not None for p in given["model"].parameters() if p.requires_grad)


def test_several_adapters_in_one_batch_end_where_each_ends_alone(tmp_path):
    import peft

    others = [torch.randint(0, 31, (3, 8), generator=torch.Generator().manual_seed(seed)) for seed in range(3, 6)]
    torch.manual_seed(0)
    given = run("Several adapters in one batch", tmp_path, other_batches=others)
    together = dict(given["model"].named_parameters())
    for name, batches in (("first", BATCHES), ("second", others)):
        torch.manual_seed(0)
        first = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        alone = peft.get_peft_model(make_llama(), first, adapter_name="first")
        alone.add_adapter("second", peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
        alone.set_adapter(name)
        trained = {key: p for key, p in alone.named_parameters() if p.requires_grad}
        before = {key: p.detach().clone() for key, p in trained.items()}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
        for batch in batches:
            alone(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert trained and all(f".{name}." in key for key in trained)
        for key, parameter in trained.items():
            moved = (parameter - before[key]).abs().max()
            # Where a gradient is next to nothing, AdamW's step is of the same size and its sign is of rounding.
            assert moved > 0 and (together[key] - parameter).abs().mean() <= 1e-3 * moved, key
        assert (tmp_path / "adapter" / name / "adapter_model.safetensors").is_file()


def test_layers_that_share_an_input(tmp_path, capsys):
    given = run("Layers that share an input", tmp_path)
    assert all(p.grad is not None for p in given["model"].parameters() if p.requires_grad)
    printed = capsys.readouterr().out
    assert "; together: " in printed and "self_attn: q_proj, k_proj, v_proj (2)" in printed and "'groups': 4" in printed


def word_tokenizer():
    """As many words as the model has embeddings."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<eos>": 0, **{f"w{index}": index for index in range(1, 31)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def test_trl(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, save_strategy="no", report_to=[], use_cpu=True, bf16=False
    )
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(1, 9)]
    names = {"arguments": arguments, "dataset": Dataset.from_list(rows), "tokenizer": word_tokenizer()}
    given = run("TRL's SFTTrainer", tmp_path, **names)
    assert given["trainer"].state.global_step == 2
    factors = [parameter for name, parameter in given["trainer"].model.named_parameters() if "lora_B" in name]
    assert factors and all(factor.abs().max() > 0 for factor in factors)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_plain_pytorch_then_merge_and_serve(tmp_path):
    trained = run("Plain PyTorch", tmp_path)
    model = trained["model"]
    assert trained["names"][0] == "model.layers.0.self_attn.q_proj" and any(p.grad is None for p in model.parameters())
    served = run("Merge and serve", tmp_path)
    with torch.no_grad():
        expected = model.eval()(BATCHES[0]).logits
        assert not torch.allclose(expected, make_llama()(BATCHES[0]).logits)
    torch.testing.assert_close(served["logits"], expected)


def test_fsdp2(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        run("FSDP2", tmp_path)
    finally:
        torch.distributed.destroy_process_group()
    plain = run("Plain PyTorch", tmp_path / "plain")  # differs by its dropout, so only the files are compared
    assert plain["model"] is not None
    names = [sorted(path.name for path in (tmp_path / d).iterdir()) for d in ("adapter", "plain/adapter")]
    assert names[0] == names[1] == ["adapter_config.json", "adapter_model.safetensors"]


def block_and_input():
    block = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6))
    fastlora.inject(block, ["0", "2"], r=2)
    return {"block": block, "x": torch.randn(3, 6, requires_grad=True)}


def test_selective_checkpointing(tmp_path):
    given = run("Selective checkpointing", tmp_path, **block_and_input())
    given["output"].sum().backward()
    assert fastlora.dispatch_counts()["reference"] == 4  # two layers, each way once
    torch.testing.assert_close(given["output"], given["block"](given["x"]))


def test_export(tmp_path):
    given = block_and_input()
    program = run("Export", tmp_path, **given)["program"]
    torch.testing.assert_close(program.module()(given["x"]), given["block"](given["x"]))
    assert "fastlora" not in str(program.graph)


def test_integrations_are_found_by_name():
    assert fastlora.integrations.peft.patch.__module__ == "fastlora.integrations.peft"
    with pytest.raises(AttributeError, match="has no attribute 'megatron'"):
        _ = fastlora.integrations.megatron
