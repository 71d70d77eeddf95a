"""fastlora finetune end to end on a tiny model: results, files, and the comparison with PEFT."""

import json

import pytest
import torch
from safetensors.torch import load_file

import fastlora
from fastlora.finetune import arms, merging
from fastlora.finetune.compare import LOSS_TOLERANCE
from fastlora.model import inject


def read_report(directory):
    return json.loads((directory / "report.json").read_text())


@pytest.fixture(scope="module")
def shared_output(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def compared(finetune, shared_output):
    """One run with --compare peft, made once: its result is kept beside its files."""
    directory = shared_output / "run"
    if not directory.exists():
        result = finetune("--compare", "peft", "--measure-full", "--output", directory)
        assert result.code == 0, result.err
        (shared_output / "out.txt").write_text(result.text)
    return directory, (shared_output / "out.txt").read_text()


def test_leaves_exactly_its_results(compared):
    directory, out = compared
    names = ["adapter", "loss.png", "report.json", "state.safetensors", "steps.csv"]
    assert sorted(path.name for path in directory.iterdir()) == names
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"Wrote {directory}/adapter, loss.png and report.json beside it" in out


def test_loss_falls_on_training_and_held_out_text(compared):
    directory, out = compared
    run = read_report(directory)["runs"]["fastlora"]
    assert len(run["losses"]) == 6
    assert run["losses"][-1] < run["losses"][0]
    assert run["held_out_loss_after"] < run["held_out_loss_before"]
    assert f"{run['held_out_loss_before']:.4f} -> {run['held_out_loss_after']:.4f}" in out


def test_losses_agree_with_peft_at_every_step(compared):
    directory, out = compared
    report = read_report(directory)
    ours, theirs = (report["runs"][name]["losses"] for name in ("fastlora", "peft"))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= LOSS_TOLERANCE
    assert report["agreement"]["same_seed_start"]
    assert "the curves agree within 1e-05 at every step" in out


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_adapter_gives_the_reported_loss_when_loaded_by_peft(compared, tiny_model, text_file):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastlora.finetune.data import make_blocks
    from fastlora.finetune.loop import held_out_loss

    directory, _ = compared
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = AutoTokenizer.from_pretrained(tiny_model)(text_file.read_text())["input_ids"]
    blocks = make_blocks(ids, 24, 4, seed=0)
    before = held_out_loss(model, blocks, 2, torch.device("cpu"))
    after = held_out_loss(PeftModel.from_pretrained(model, directory / "adapter"), blocks, 2, torch.device("cpu"))
    run = read_report(directory)["runs"]["fastlora"]
    assert before == pytest.approx(run["held_out_loss_before"], abs=1e-6)
    assert after == pytest.approx(run["held_out_loss_after"], abs=1e-5)


def test_counts_parameters_calls_and_bytes(compared, tiny_model):
    from transformers import AutoModelForCausalLM

    directory, out = compared
    report = read_report(directory)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    base = sum(parameter.numel() for parameter in model.parameters())
    inject(model, report["settings"]["targets"], r=8)
    trainable, total, share = fastlora.model.trainable_parameters(model)
    assert (report["parameters"]["trainable"], report["parameters"]["total"]) == (trainable, total)
    assert report["parameters"]["share"] == pytest.approx(share)
    assert f"{trainable:,} of {total:,} parameters" in out
    # Seven projections in two layers, forward and backward, six steps; on a CPU the reference serves all.
    assert report["runs"]["fastlora"]["dispatch_counts"]["reference"] == 7 * 2 * 2 * 6
    assert report["runs"]["peft"]["dispatch_counts"]["reference"] == 0
    ours = report["runs"]["fastlora"]["tensor_bytes"]
    assert ours["weights"] == 4 * total
    assert ours["gradients"] == 4 * trainable
    assert ours["optimizer"] >= 2 * 4 * trainable
    full = report["memory"]["full_finetuning_tensor_bytes"]
    assert report["memory"]["full_finetuning_measured"]
    assert full["weights"] == full["gradients"] == 4 * base
    assert full["optimizer"] >= 2 * 4 * base


def test_merged_model_gives_the_same_answer(compared):
    directory, out = compared
    merge = read_report(directory)["merge"]
    assert merge["prompt"] == "the frozen"
    assert merge["answer"] == merge["merged_answer"] != ""
    assert 0 < merge["max_logit_difference"] < 1e-3 * merge["max_logit"]
    assert "The merged model gives the same answer" in out


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(compared, finetune, tmp_path):
    directory, _ = compared
    assert finetune("--output", tmp_path / "same").code == 0
    assert finetune("--output", tmp_path / "other", "--seed", 1).code == 0
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "same" / name).read_bytes() == (directory / name).read_bytes()
    assert (tmp_path / "other" / name).read_bytes() != (directory / name).read_bytes()


@pytest.mark.parametrize("kind", ("--rslora", "--dora"))
@pytest.mark.parametrize("via", ("fastlora", "peft"))
def test_agrees_with_peft_under_other_options(finetune, tmp_path, kind, via):
    options = [kind, "--via", via, "--alpha", 5, "--rank", 3, "--targets", "q_proj,down_proj", "--seed", 7]
    result = finetune("--compare", "peft", *options, "--output", tmp_path)
    assert result.code == 0, result.out
    assert read_report(tmp_path)["agreement"]["max_difference"] <= LOSS_TOLERANCE
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["use_rslora" if kind == "--rslora" else "use_dora"] is True
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert any("magnitude" in name for name in names) == (kind == "--dora")


def test_wrong_scaling_is_seen_by_the_comparison(monkeypatch, finetune, tmp_path):
    def doubled(model, targets, *, alpha, **options):
        return inject(model, targets, alpha=2 * alpha, **options)

    monkeypatch.setattr(arms, "inject", doubled)
    result = finetune("--compare", "peft", "--output", tmp_path)
    assert result.code == 1
    assert "DISAGREE" in result.out


def test_other_start_is_replaced_by_fastloras(monkeypatch, finetune, tmp_path):
    def reseeded(model, targets, **options):
        torch.manual_seed(99)
        return inject(model, targets, **options)

    monkeypatch.setattr(arms, "inject", reseeded)
    result = finetune("--compare", "peft", "--output", tmp_path)
    agreement = read_report(tmp_path)["agreement"]
    assert result.code == 0
    assert not agreement["same_seed_start"]
    assert agreement["max_difference"] <= LOSS_TOLERANCE


def test_merge_that_changes_the_answer_fails_the_run(monkeypatch, finetune, tmp_path):
    def broken(model, safe=False):
        fastlora.model.merge(model, safe=safe)
        model.lm_head.weight.data.neg_()

    monkeypatch.setattr(merging, "merge", broken)
    result = finetune("--output", tmp_path)
    assert result.code == 1
    assert "ANOTHER ANSWER" in result.out


def test_options_reach_the_adapter(finetune, tmp_path):
    result = finetune(
        *("--targets", "q_proj, down_proj", "--rank", 3, "--alpha", 5, "--rslora", "--dropout", 0.25),
        *("--output", tmp_path),
    )
    assert result.code == 0, result.err
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["lora_dropout"]) == (3, 5, True, 0.25)
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "adapter/adapter_model.safetensors").items()}
    assert len(shapes) == 2 * 2 * 2
    assert shapes["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"] == (3, 48)
    assert shapes["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] == (32, 3)


def test_agreement_is_not_claimed_under_dropout(finetune, tmp_path):
    result = finetune("--compare", "peft", "--dropout", 0.5, "--output", tmp_path)
    assert result.code == 0
    assert "agreement is not expected: the two draw different dropout masks" in result.text


@pytest.mark.parametrize("dtype", ["bf16", "float16"])
def test_sixteen_bit_models_train_with_float32_adapters(finetune, tmp_path, dtype):
    result = finetune("--dtype", dtype, "--output", tmp_path, "--steps", 3)
    assert result.code == 0, result.err
    report = read_report(tmp_path)
    assert report["runs"]["fastlora"]["tensor_bytes"]["gradients"] == 4 * report["parameters"]["trainable"]
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


def test_patched_peft_model_trains_the_same(compared, finetune, tmp_path):
    directory, _ = compared
    result = finetune("--via", "peft", "--compare", "peft", "--output", tmp_path)
    assert result.code == 0, result.err
    injected, patched = (read_report(path)["runs"]["fastlora"] for path in (directory, tmp_path))
    assert max(abs(a - b) for a, b in zip(injected["losses"], patched["losses"], strict=True)) <= LOSS_TOLERANCE
    assert patched["dispatch_counts"] == injected["dispatch_counts"]
    names = [set(load_file(path / "adapter/adapter_model.safetensors")) for path in (directory, tmp_path)]
    assert names[0] == names[1]


def test_several_texts_are_all_used(finetune, text_file, tmp_path):
    second = tmp_path / "second.txt"
    second.write_text("another text " * 40)
    assert finetune("--text", text_file, "--text", second, "--output", tmp_path / "out", "--steps", 1).code == 0
    tokens = read_report(tmp_path / "out")["text"]["tokens"]
    joined = len(text_file.read_bytes()) + 1 + len(second.read_bytes())  # an end-of-sequence token between them
    assert tokens == joined // 24 * 24


def test_all_linear_is_what_peft_takes_it_for(finetune, tmp_path):
    result = finetune("--targets", "all-linear", "--compare", "peft", "--steps", 2, "--output", tmp_path)
    assert result.code == 0, result.err
    report = read_report(tmp_path)
    assert report["parameters"]["layers"] == 14 and report["agreement"]["same_seed_start"]  # all but the output head
