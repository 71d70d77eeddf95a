"""What fastlora finetune shows: 80 columns, the result in a sentence, a sample, and commands and lines that work."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

from fastlora.finetune import summary
from fastlora.finetune.models import ModelSource
from fastlora.finetune.report import curve_png, running_mean
from fastlora.tables import WIDTH, Table, wrapped

STEPS = 6


@pytest.fixture
def project(tiny_model, monkeypatch, tmp_path):
    """A current directory with a model in it, so that what is printed has short names."""
    (tmp_path / "model").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(directory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


def answer(model, tokenizer, prompt):
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        return tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :])


def paragraph(out, start):
    return next(part for part in out.split("\n\n") if part.startswith(start))


def test_what_is_shown_fits_and_what_it_says_to_do_works(finetune, fastlora_cli, project):
    result = finetune("--model", "model", "--output", "out", "--compare", "peft", "--steps", STEPS)
    assert result.code == 0, result.err
    assert max(map(len, result.out.splitlines())) <= WIDTH
    report = json.loads((project / "out" / "report.json").read_text())
    run = report["runs"]["fastlora"]
    sentence = " ".join(paragraph(result.out, "Result:").split())
    losses = f"{run['held_out_loss_before']:.4f} -> {run['held_out_loss_after']:.4f}"
    assert sentence.startswith(f"Result: the held-out loss fell, {losses} (perplexity ")
    assert f"in {STEPS} steps over {run['tokens']:,} tokens" in sentence
    # The bars that show that something is going on.
    assert all(shown in result.err for shown in ("Loading weights", "held-out loss", "fastlora:", "sample after"))

    model, tokenizer = load("model")
    assert report["merge"]["base_answer"] == answer(model, tokenizer, "the frozen")
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, "out/adapter").eval()
    assert report["merge"]["answer"] == answer(adapted, tokenizer, "the frozen") != report["merge"]["base_answer"]
    sample = paragraph(result.out, "Sample")
    assert [line.split(":")[0] for line in sample.splitlines()[1:3]] == [
        "  prompt",
        "  before",
    ] and "  after:" in sample

    commands, _, python = paragraph(result.out, "Next:").partition("In Python, with PEFT:\n")
    commands = commands.replace("\\\n", " ").splitlines()[1:]
    assert [command.split()[1] for command in commands] == ["merge", "analyze", "finetune"]
    for command in commands:
        done = fastlora_cli(*command.split()[1:])
        assert done.code == 0, done.err
    assert len(json.loads((project / "out" / "report.json").read_text())["runs"]["peft"]["losses"]) == 2 * STEPS
    given = {}
    with contextlib.redirect_stderr(io.StringIO()):
        exec("\n".join(line[2:] for line in python.splitlines()), given)
    ids = torch.tensor([[1, 2, 3]])
    expected = PeftModel.from_pretrained(load("model")[0], "out/adapter").eval()(ids).logits
    torch.testing.assert_close(given["model"](ids).logits, expected)
    # What was merged before the run went further is another model.
    assert not torch.allclose(load("out/merged")[0](ids).logits, expected)


def write_gguf(path):
    """A one-layer Llama with a tokenizer of bytes, as llama.cpp writes such files."""
    import gguf
    import numpy as np
    from tokenizers import pre_tokenizers

    tokens = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    draw = np.random.default_rng(0).standard_normal
    sizes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    sizes |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (len(tokens) - 1)])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    weights = {f"blk.0.{name}.weight": draw(shape) / 6 for name, shape in sizes.items()}
    weights |= {f"blk.0.{name}.weight": np.ones(32) for name in ("attn_norm", "ffn_norm")}
    weights |= {"token_embd.weight": draw((len(tokens), 32)), "output_norm.weight": np.ones(32)}
    weights |= {"output.weight": draw((len(tokens), 32)) / 6}
    for name, weight in weights.items():
        writer.add_tensor(name, weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_an_adapter_over_a_gguf_file_loads_by_the_lines_that_are_shown(finetune, project):
    """As the demo's: PEFT's one line knows no such files."""
    pytest.importorskip("gguf")
    write_gguf(project / "tiny.gguf")
    result = finetune("--model", project / "tiny.gguf", "--output", "out", "--steps", 2)
    assert result.code == 0, result.err
    given = {}
    with contextlib.redirect_stderr(io.StringIO()):
        exec("\n".join(line[2:] for line in result.out.partition("In Python, with PEFT:\n")[2].splitlines()), given)
    merge = json.loads((project / "out" / "report.json").read_text())["merge"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(project, gguf_file="tiny.gguf")
    assert answer(given["model"].eval(), tokenizer, "the frozen") == merge["answer"] != merge["base_answer"]


def test_unknown_targets_are_found_before_the_weights_load(finetune, tiny_model, monkeypatch, tmp_path):
    from fastlora.finetune import runner

    monkeypatch.setattr(runner, "load_weights", lambda *args, **options: pytest.fail("loaded"))
    for via in ("fastlora", "peft"):
        result = finetune("--targets", "query", "--via", via, "--output", tmp_path)
        assert result.code == 2 and "'query'" in result.error_line and "q_proj" in result.error_line
    result = finetune("--targets", "embed_tokens", "--output", tmp_path)
    assert result.code == 2 and "embed_tokens is Embedding, not a linear layer" in result.error_line
    result = finetune("--block-size", 129, "--output", tmp_path)
    assert result.code == 2 and "128 positions" in result.error_line


@pytest.fixture
def report():
    run = {
        "losses": [3.0], "held_out_loss_before": 2.0, "held_out_loss_after": 2.5, "tokens": 10, "seconds": 1.0,
        "tokens_per_second": 10.0, "peak_memory_bytes": None, "tensor_bytes": {"weights": 2**20},
        "dispatch_counts": {"reference": 3, "fallbacks": {"too odd": 2}},
    }  # fmt: skip
    merge = {
        "prompt": "a\x07\n b", "base_answer": "", "answer": "Q" * 1000, "merged_answer": "y", "same_answer": False,
        "max_logit_difference": 1.0, "max_logit": 2.0,
    }  # fmt: skip
    return {
        "runs": {"fastlora": run},
        "merge": merge,
        "parameters": {"share": 0.01},
        "threads": 1,
        "settings": {"device": "cpu", "steps": 1, "model": None, "measure_full": False},
        "memory": {
            "measured_as": None,
            "full_finetuning_peak_bytes": None,
            "full_finetuning_tensor_bytes": {"weights": 2**20},
            "full_finetuning_measured": False,
        },
    }


def test_a_run_that_went_wrong_is_said(report):
    shown = summary.text(report, None, ModelSource("m"), Path("out"))
    assert "the held-out loss did not fall, 2.0000 -> 2.5000" in " ".join(shown.split())
    assert "Try a lower --learning-rate" in " ".join(shown.split())
    assert "ANOTHER ANSWER" in shown and "  merged: y" in shown and "  before: (nothing)" in shown
    assert "  prompt: a\\x07 b" in shown, "a bell rang"
    assert shown.count("Q") == summary.SAMPLE_CHARACTERS and max(map(len, shown.splitlines())) <= WIDTH
    assert "fell back 2 times: too odd" in shown


def test_the_mean_is_over_a_fifth_of_the_run():
    assert running_mean([1.0, 5.0, 3.0]) == [1.0, 5.0, 3.0]
    assert running_mean([float(i) for i in range(10)])[:3] == [0.0, 0.5, 1.5]
    assert len(running_mean([1.0] * 1000)) == 1000


def test_tables_and_paragraphs_are_laid_out():
    assert Table("T", "note", ["a", "b"], [["long", "1"], ["x", "100"]]).to_text() == (
        "T\na       b\nlong    1\nx     100\nnote"
    )
    assert wrapped("a " * 50).splitlines()[1].startswith("  a")
    path = "/" + "x" * 100
    assert wrapped(f"Wrote {path}").splitlines() == ["Wrote", f"  {path}"]


def test_the_curve_says_its_result_and_has_every_held_out_loss(monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: figures.append(figure))
    runs = {
        name: {
            "losses": [3.0, 2.0, 2.5, 1.5],
            "held_out_losses": [[0, first], [2, 2.5], [4, last]],
            "held_out_loss_before": first,
            "held_out_loss_after": last,
        }
        for name, first, last in (("fastlora", 3.25, 2.125), ("peft", 3.25, 2.25))
    }
    curve_png({"model": "m", "settings": {"rank": 8, "dtype": "float32"}, "runs": runs})
    (axes,) = figures[0].axes
    assert axes.get_title().startswith("Held-out loss: fastlora 3.250 to 2.125, peft 3.250 to 2.250\n")
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    for name, run in runs.items():
        assert drawn[f"{name}: held out"] == run["held_out_losses"]
    assert "lower is better" in axes.get_ylabel()
