"""fastlora merge: files that give what the model with its adapter gives, or one line that says why not."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastlora
from fastlora.model import inject, lora_layers

IDS = torch.arange(40).view(2, 20)


@pytest.fixture(autouse=True)
def no_bars():
    import transformers

    transformers.utils.logging.disable_progress_bar()


def load(kind, directory, **kwargs):
    import transformers

    return getattr(transformers, kind).from_pretrained(directory, local_files_only=True, **kwargs).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def make_adapter(model, directory, targets=("q_proj", "down_proj"), **kwargs):
    """Trained branches, saved; the model keeps them."""
    inject(model, list(targets), r=3, alpha=7, **kwargs)
    torch.manual_seed(3)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    fastlora.save_adapter(model, directory)
    return model


def assert_refused(result, output, *words):
    assert result.code == 2 and result.out == ""
    assert result.error_line.startswith("fastlora: error: ")
    for word in words:
        assert word in result.error_line
    assert not output.exists() or not list(output.iterdir())
    assert not list(output.parent.glob(".*partial*"))


def silently(kind, directory, capfd, recwarn):
    """The model, loaded without a word of transformers' own."""
    import transformers

    transformers.utils.logging.set_verbosity_warning()
    capfd.readouterr(), recwarn.clear()
    auto = getattr(transformers, kind)
    model, report = auto.from_pretrained(directory, local_files_only=True, output_loading_info=True)
    assert not any(report.values()), report
    assert "UNEXPECTED" not in capfd.readouterr().err and not [str(w.message) for w in recwarn]
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merges_as_peft_does(fastlora_cli, tiny_model, tmp_path, dtype, capfd, recwarn):
    peft = pytest.importorskip("peft")
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    load("AutoModelForCausalLM", tiny_model, dtype=dtype).save_pretrained(base)
    trained = make_adapter(load("AutoModelForCausalLM", base, dtype=dtype), tmp_path / "adapter")
    output = tmp_path / "new" / "merged"
    result = fastlora_cli("merge", tmp_path / "adapter", "--base", base, "--output", output)
    assert (result.code, result.err) == (0, "") and "Merged 4 layers" in result.out
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(os.listdir(output))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (tiny_model / name).read_bytes()
    assert os.listdir(output.parent) == ["merged"]
    merged, before = load_file(output / "model.safetensors"), load_file(base / "model.safetensors")
    assert merged.keys() == before.keys() and all(value.dtype == dtype for value in merged.values())
    model = silently("AutoModelForCausalLM", output, capfd, recwarn)
    for path, layer in lora_layers(trained):
        exact = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        # float32 products of 3 terms, then one rounding to the dtype
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 8 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert ((merged[f"{path}.weight"].double() - exact).abs() <= bound).all()
        assert not torch.equal(merged.pop(f"{path}.weight"), before[f"{path}.weight"])
    assert all(torch.equal(value, before[name]) for name, value in merged.items())
    stock = peft.PeftModel.from_pretrained(load("AutoModelForCausalLM", base, dtype=dtype), tmp_path / "adapter")
    expected = logits(stock.merge_and_unload().eval())
    assert (logits(model.to(dtype)) - expected).abs().max() <= 32 * torch.finfo(dtype).eps * expected.abs().max()


def test_the_permissions_are_ordinary(fastlora_cli, tiny_model, tmp_path):
    make_adapter(load("AutoModelForCausalLM", tiny_model), tmp_path / "adapter")
    (tmp_path / "ordinary").mkdir()
    (tmp_path / "out").mkdir()  # empty: may be taken
    assert fastlora_cli("merge", tmp_path / "adapter", "--base", tiny_model, "--output", tmp_path / "out").code == 0
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_the_adapters_own_tokenizer_comes_first(fastlora_cli, tiny_model, tmp_path):
    adapter = tmp_path / "adapter"
    make_adapter(load("AutoModelForCausalLM", tiny_model), adapter)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, adapter)
    config = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "left"}))
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    assert fastlora_cli("merge", adapter, "--base", tiny_model, "--output", tmp_path / "out").code == 0
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes()
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_a_base_without_a_tokenizer(fastlora_cli, tiny_model, tmp_path):
    load("AutoModelForCausalLM", tiny_model).save_pretrained(tmp_path / "base")
    make_adapter(load("AutoModelForCausalLM", tmp_path / "base"), tmp_path / "adapter")
    result = fastlora_cli("merge", tmp_path / "adapter", "--base", tmp_path / "base", "--output", tmp_path / "out")
    assert result.code == 0 and not list((tmp_path / "out").glob("tok*"))


def test_another_kind_of_model(fastlora_cli, tmp_path, capfd, recwarn):
    """The class comes from the base's configuration where the adapter names no task."""
    from transformers import BertConfig, BertForTokenClassification

    config = BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=5
    )
    torch.manual_seed(0)
    BertForTokenClassification(config).save_pretrained(tmp_path / "base")
    model = load("BertForTokenClassification", tmp_path / "base")
    trained = make_adapter(model, tmp_path / "adapter", targets=["query", "value"], rslora=True)
    result = fastlora_cli("merge", tmp_path / "adapter", "--base", tmp_path / "base", "--output", tmp_path / "out")
    assert result.code == 0
    merged = silently("AutoModelForTokenClassification", tmp_path / "out", capfd, recwarn)
    torch.testing.assert_close(logits(merged), logits(trained))


def test_a_head_that_nobody_has_weights_for(fastlora_cli, tiny_model, tmp_path):
    model = load("LlamaForSequenceClassification", tiny_model)
    make_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    result = fastlora_cli("merge", tmp_path / "adapter", "--base", tiny_model, "--output", tmp_path / "out")
    assert_refused(result, tmp_path / "out", "no weights for score.weight", "random")


@pytest.fixture
def adapter(tiny_model, tmp_path):
    make_adapter(load("AutoModelForCausalLM", tiny_model), tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(adapter, **changes):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def spoil_values(adapter, change):
    path = adapter / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: change(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path)


BAD = {
    "no directory": (shutil.rmtree, ["adapter"]),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors"]),
    "no configuration": (lambda a: (a / "adapter_config.json").unlink(), ["adapter_config.json"]),
    "not JSON": (lambda a: (a / "adapter_config.json").write_text("{"), ["adapter_config.json"]),
    "another method": (lambda a: rewrite(a, peft_type="IA3"), ["IA3"]),
    "a variant": (lambda a: rewrite(a, use_dora=True), ["lora_magnitude_vector"]),
    "another task": (lambda a: rewrite(a, task_type="FLYING"), ["FLYING", "CAUSAL_LM"]),
    "cut off": (lambda a: os.truncate(a / "adapter_model.safetensors", 700), ["adapter_model.safetensors"]),
    "NaN": (lambda a: spoil_values(a, lambda n, t: t * float("nan") if "lora_A" in n else t), ["not finite", "q_proj"]),
    "another shape": (lambda a: spoil_values(a, lambda n, t: t[:, :5].clone() if "_A" in n else t), ["shapes differ"]),
    "other layers": (lambda a: None, ["not linear layers", "q_proj"]),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_adapter(fastlora_cli, tiny_model, adapter, tmp_path, bad):
    change, words = BAD[bad]
    change(adapter)
    if bad == "other layers":
        path = adapter / "adapter_model.safetensors"
        tensors = {name.replace("q_proj", "q_proj_of_another"): value for name, value in load_file(path).items()}
        save_file(tensors, path)
    result = fastlora_cli("merge", adapter, "--base", tiny_model, "--output", tmp_path / "deep" / "out")
    assert_refused(result, tmp_path / "deep" / "out", *words)
    assert not (tmp_path / "deep").exists()


def test_a_bad_base(fastlora_cli, adapter, tmp_path):
    output = tmp_path / "out"
    assert_refused(fastlora_cli("merge", adapter, "--base", tmp_path / "none", "--output", output), output, "none")
    (tmp_path / "empty").mkdir()
    result = fastlora_cli("merge", adapter, "--base", tmp_path / "empty", "--output", output)
    assert_refused(result, output, "config.json")


def test_what_is_there_is_not_overwritten(fastlora_cli, tiny_model, adapter, tmp_path):
    before = {path: path.read_bytes() for path in adapter.iterdir()}
    result = fastlora_cli("merge", adapter, "--base", tiny_model, "--output", adapter)
    assert result.code == 2 and f"output directory {adapter} is not empty" in result.error_line
    assert {path: path.read_bytes() for path in adapter.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    result = fastlora_cli("merge", adapter, "--base", tiny_model, "--output", tmp_path / "file")
    assert result.code == 2 and "is not a directory" in result.error_line
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert fastlora_cli("merge", adapter, "--base", tiny_model, "--output", tmp_path / "link").code == 2


@pytest.mark.parametrize("failing", ["save_pretrained", "copy_tokenizer", "rename", "interrupt"])
def test_a_failed_write_leaves_nothing(fastlora_cli, tiny_model, adapter, tmp_path, monkeypatch, failing):
    import transformers

    import fastlora.cli.merge

    def fail(*args, **kwargs):
        raise KeyboardInterrupt if failing == "interrupt" else OSError(28, "No space left on device")

    if failing in ("copy_tokenizer", "interrupt"):
        monkeypatch.setattr(fastlora.cli.merge, "copy_tokenizer", fail)
    elif failing == "rename":
        monkeypatch.setattr(fastlora.cli.merge.os, "rename", fail)
    else:
        monkeypatch.setattr(transformers.PreTrainedModel, failing, fail)
    output = tmp_path / "deep" / "out"
    result = fastlora_cli("merge", adapter, "--base", tiny_model, "--output", output)
    if failing == "interrupt":
        assert result.code == 130
    else:
        assert_refused(result, output, "No space left on device", str(output))
    assert not output.parent.exists()


def test_options(fastlora_cli, adapter, tmp_path):
    assert "--base" in fastlora_cli("merge", adapter, "--output", tmp_path / "out").error_line
    assert "--output" in fastlora_cli("merge", adapter, "--base", "x").error_line
    assert "ADAPTER" in fastlora_cli("merge", "--help").out


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_experts_are_merged_as_peft_does(fastlora_cli, tmp_path, kind):
    """By PEFT's file. Mixtral's matrices go to the file one by one; gpt-oss has them transposed."""
    moe = pytest.importorskip("tests.support.injected_experts")
    moe.make_moe(kind).save_pretrained(tmp_path / "base")
    stock = moe.make_stock(kind)
    stock.save_pretrained(tmp_path / "adapter")
    result = fastlora_cli("merge", tmp_path / "adapter", "--base", tmp_path / "base", "--output", tmp_path / "out")
    assert (result.code, result.err) == (0, "") and "Merged 4 layers" in result.out
    merged, before = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "base"))
    assert {name: (t.shape, t.dtype) for name, t in merged.items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    changed = {name for name, value in merged.items() if not torch.equal(value, before[name])}
    assert all("experts" in name or "_proj" in name for name in changed) and any("experts" in name for name in changed)
    model = load("AutoModelForCausalLM", tmp_path / "out")
    expected = moe.logits(stock.merge_and_unload().eval())
    moe.assert_close(moe.logits(model), expected)
