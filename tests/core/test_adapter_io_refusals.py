"""Adapter files that are damaged, foreign or do not fit: named, and the model left as it was."""

import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlora.adapters.files
from fastlora.adapters.io import load_adapter, save_adapter
from fastlora.model import lora_layers
from tests.support.adapter_models import CONFIG, WEIGHTS, edit_config, make_model


def edit_weights(directory, change):
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture
def saved(tmp_path):
    save_adapter(make_model(r=2, alpha=3), tmp_path)
    return tmp_path


@pytest.fixture(params=["fresh", "injected"])
def model(request):
    return make_model(None) if request.param == "fresh" else make_model(r=2, seed=9)


def assert_refused(model, directory, message, error=ValueError):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    scalings = [layer.scaling for _, layer in lora_layers(model)]
    with pytest.raises(error, match=message):
        load_adapter(model, directory)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [layer.scaling for _, layer in lora_layers(model)] == scalings


A, B = "base_model.model.layers.1.0.lora_A.weight", "base_model.model.layers.1.0.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(B), rf"missing: {B}"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda t: t.update({A.replace("lora_A", "lora_magnitude"): torch.zeros(1)}), "unexpected: .*lora_magnitude"),
        (lambda t: t.update({A: t[A].long()}), rf"dtype not one of F64, F32, F16, BF16: {A} \(I64\)"),
        (
            lambda t: t.update({A: torch.zeros(3, 6)}),
            r"ranks do not agree: layers.1.0: lora_A \[3, 6\], lora_B \[10, 2",
        ),
        (lambda t: t.update({A: torch.zeros(2, 6, 1)}), r"ranks do not agree: layers.1.0: lora_A \[2, 6, 1\]"),
        (lambda t: t.update({A: torch.zeros(0, 6), B: torch.zeros(10, 0)}), "ranks do not agree"),
        (lambda t: t.update({A: torch.zeros(4, 6), B: torch.zeros(10, 4)}), r"ranks do not agree.*configured rank 2"),
        (
            lambda t: t.update({A: torch.zeros(2, 7)}),
            r"shapes differ: layers.1.0: file lora_A \[2, 7\].* model \[2, 6\]",
        ),
        (lambda t: t.update({B: torch.zeros(9, 2)}), r"shapes differ: layers.1.0: .*lora_B \[9, 2\]"),
        (
            lambda t: t.update({k.replace("11.0", "12.0"): t.pop(k) for k in list(t) if "11.0" in k}),
            r"not (LoRA|linear) layers of the model: layers.12.0",
        ),
        (lambda t: t.clear(), "it holds no tensors"),
    ],
)
def test_tensors_that_do_not_fit(saved, model, change, message):
    edit_weights(saved, change)
    assert_refused(model, saved, message)


def test_every_problem_is_listed(saved):
    def change(tensors):
        tensors[A] = torch.zeros(2, 7)
        for key in [key for key in tensors if "1.1" in key]:
            tensors[key.replace("1.1", "3.0")] = tensors.pop(key)

    edit_weights(saved, change)
    pattern = r"missing from the file: layers.1.1; not LoRA layers of the model: layers.3.0; shapes differ: layers.1.0"
    assert_refused(make_model(r=2), saved, pattern)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "no LoRA adapter: peft_type is 'IA3'"),
        ({"use_dora": True}, "does not hold plain LoRA weights; missing: .*lora_magnitude_vector"),
        ({"lora_bias": True, "bias": "all"}, "bias='all', lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' .it changes the base weights"),
        ({"r": "2"}, "r must be a number"),
        ({"r": 3}, "ranks do not agree.*configured rank 3"),
        ({"lora_alpha": None}, "lora_alpha must be a number"),
        ({"rank_pattern": {"1.0": 7}}, "layers.1.0: .*configured rank 7"),
        ({"rank_pattern": [1]}, "rank_pattern must map"),
        ({"rank_pattern": {"(": 7}}, "not a regular expression"),
        ({"alpha_pattern": {"(": 7}}, "not a regular expression"),
        ({"alpha_pattern": {"1.0": "x"}}, "alpha_pattern must map"),
        ({"lora_dropout": 2.0}, "lora_dropout must be between 0 and 1"),
        ({"use_rslora": "no"}, "use_rslora must be true or false"),
    ],
    ids=str,
)
def test_configurations_that_are_not_plain_lora(saved, model, fields, message):
    edit_config(saved, **fields)
    assert_refused(model, saved, message)


def test_damaged_files(saved, model):
    data = (saved / WEIGHTS).read_bytes()
    for damaged in (b"", data[:4], data[:50], data[:-1], b"\xff" * 8 + data[8:], pickle.dumps({})):
        (saved / WEIGHTS).write_bytes(damaged)
        assert_refused(model, saved, "adapter_model.safetensors is damaged or is not a safetensors file")
    (saved / CONFIG).write_text("{")
    assert_refused(model, saved, "is not valid JSON")
    (saved / CONFIG).write_text("[]")
    assert_refused(model, saved, "describes no LoRA adapter")


def test_a_pickle_is_never_opened(saved, model):
    (saved / WEIGHTS).unlink()
    assert_refused(model, saved, "no adapter_model.safetensors", FileNotFoundError)

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(saved / "opened"),)

    (saved / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert_refused(model, saved, "adapter_model.bin, a pickle, which can run code", FileNotFoundError)
    assert not (saved / "opened").exists()
    (saved / CONFIG).unlink()
    assert_refused(model, saved, "no adapter_config.json", FileNotFoundError)


def test_nothing_is_read_before_the_checks(saved, monkeypatch):
    edit_weights(saved, lambda t: t.update({A: torch.zeros(2, 7)}))

    class HeaderOnly:
        """A handle that fails as soon as a tensor is read."""

        def __init__(self, path, **kwargs):
            self.file = opened(path, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def keys(self):
            return self.file.keys()

        def get_slice(self, key):
            return self.file.get_slice(key)

        def get_tensor(self, key):
            raise AssertionError(f"{key} was read")

    opened = fastlora.adapters.files.safe_open
    monkeypatch.setattr(fastlora.adapters.files, "safe_open", HeaderOnly)
    assert_refused(make_model(r=2), saved, "shapes differ")
    edit_weights(saved, lambda t: t.update({A: torch.zeros(2, 6)}))
    with pytest.raises(AssertionError, match="was read"):
        load_adapter(make_model(r=2), saved)
