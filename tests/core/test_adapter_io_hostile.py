"""Adapter files that were made to cost time or memory: a documented error within a second. Saves that are killed."""

import json
import os
import struct
import subprocess
import sys
import threading
import time
import tracemalloc

import pytest
import torch

from fastlora.adapters.files import MAX_CONFIG, MAX_HEADER, read_adapter
from fastlora.adapters.io import load_adapter, save_adapter
from fastlora.files import STAGE_PREFIX
from fastlora.model import lora_layers
from tests.support.adapter_models import CONFIG, WEIGHTS, edit_config, make_model


@pytest.fixture
def saved(tmp_path):
    save_adapter(make_model(r=2, alpha=3), tmp_path)
    return tmp_path


def assert_refused_in_time(directory, message):
    tracemalloc.start()
    try:
        for read in (read_adapter, lambda d: load_adapter(make_model(r=2), d)):
            start = time.process_time()
            with pytest.raises(ValueError, match=message) as caught:
                read(directory)
            assert time.process_time() - start < 1 and len(str(caught.value)) < 1500
        assert tracemalloc.get_traced_memory()[1] < 32 * MAX_CONFIG
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("number", ["1" + "0" * 400, "-" + "7" * 420, "1" * 5000, "1e999", "NaN"])
@pytest.mark.parametrize("field", ["lora_alpha", "r", "lora_dropout", "alpha_pattern"])
def test_numbers_beyond_floating_point(saved, number, field):
    config = json.loads((saved / CONFIG).read_text())
    config[field] = {"layers.1.0": "HERE"} if field == "alpha_pattern" else "HERE"
    (saved / CONFIG).write_text(json.dumps(config).replace('"HERE"', number))
    assert_refused_in_time(saved, "must be a number|must map module paths to numbers|not valid JSON")


@pytest.mark.parametrize("levels", [300, 5000, 1_000_000])
@pytest.mark.parametrize("field", ["r", "rank_pattern", "new_flag", "peft_type", "modules_to_save", "use_dora"])
def test_levels_of_json(saved, levels, field):
    fields = {"peft_type": "LORA", "r": 2} | {field: "HERE"}
    (saved / CONFIG).write_text(json.dumps(fields).replace('"HERE"', "[" * levels + "1" + "]" * levels))
    assert_refused_in_time(
        saved, "nested too deeply|must be a number|must map|new_flag=|peft_type|module names|use_dora"
    )


@pytest.mark.parametrize(
    "key", ["(" * 3000 + "a" + ")" * 3000, "(a+)+b", "((a|b)*)*c", "x" * 100_000 + "[", "(a{1,999}){1,999}", r"(.)\1"]
)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_pattern_keys(saved, key, field):
    edit_config(saved, **{field: {key: 3}, "r": 2})
    try:
        start = time.process_time()
        assert read_adapter(saved)["layers.1.0"].scaling == 1.5
    except ValueError as error:
        assert field in str(error) and len(str(error)) < 500
    assert time.process_time() - start < 1


def test_files_that_are_huge(saved):
    os.truncate(saved / CONFIG, 3 << 30)  # sparse
    assert_refused_in_time(saved, f"{CONFIG} is larger than {MAX_CONFIG:,} bytes")


@pytest.mark.parametrize("claim", [MAX_HEADER + 1, 1 << 40, (1 << 64) - 1])
def test_headers_that_claim_to_be_huge(saved, claim):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(struct.pack("<Q", claim) + data[8:])
    os.truncate(saved / WEIGHTS, min(claim + 100, 3 << 30))
    assert_refused_in_time(saved, "damaged or is not a safetensors file: its header claims")


def test_tensors_that_claim_to_be_huge(saved):
    entry = {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}
    header = json.dumps({"base_model.model.layers.1.0.lora_A.weight": entry}).encode()
    (saved / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert_refused_in_time(saved, "damaged or is not a safetensors file")


def test_names_of_modules_saved_whole(saved):
    edit_config(saved, modules_to_save=[str(i) for i in range(100_000)])
    assert_refused_in_time(saved, "modules_to_save has 100000 names")
    edit_config(saved, modules_to_save="head")
    assert_refused_in_time(saved, "modules_to_save must be a list of module names, got 'head'")


@pytest.mark.parametrize("value", [True, 1, 0.5, "on", [1], {"x": 1}, ["a"]], ids=str)
def test_what_a_later_peft_may_add_is_refused_by_name(saved, value):
    edit_config(saved, use_frobnication=value, another=None)
    assert_refused_in_time(
        saved, r"not plain LoRA on linear layers: use_frobnication=.* \(unknown here\); load it with"
    )


def test_fields_that_are_known_or_off_are_no_reason(saved):
    edit_config(saved, use_frobnication=False, frob_config=None, frobs=[], names={}, text="")
    edit_config(saved, peft_version="9.9", revision="main", exclude_modules=["x"], layers_to_transform=[1])
    edit_config(saved, auto_mapping={"base_model_class": "M"}, qalora_group_size=16, megatron_core="megatron.core")
    load_adapter(make_model(r=2), saved)


def test_every_field_of_the_installed_peft_is_known(saved):
    peft = pytest.importorskip("peft")
    from fastlora.adapters.files import _HARMLESS, _PLAIN

    fields = set(peft.LoraConfig(r=2).to_dict())
    assert fields <= set(_HARMLESS) | set(_PLAIN) and len(fields) > 20


SAVER = """
import json, os, signal, sys, time
import torch
from safetensors.torch import load_file
from fastlora.adapters.files import read_adapter
from fastlora.adapters.io import save_adapter
from tests.support.adapter_models import make_model

directory = sys.argv[1]
models = {r: make_model(r=r, alpha=r * 3, seed=r) for r in (2, 5)}
expected = {r: model.layers[1][0].lora_A for r, model in models.items()}
save_adapter(models[2], directory)
seen = set()
for attempt in range(40):
    child = os.fork()
    while child == 0:
        for model in list(models.values())[:: (-1) ** attempt]:
            save_adapter(model, directory)
    for _ in range(2):  # while it saves
        layer = read_adapter(directory)["layers.1.0"]
        assert layer.scaling == 3 and torch.equal(layer.lora_a, expected[layer.lora_a.shape[0]])
    time.sleep(torch.rand(()).item() * 0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    config = json.load(open(f"{directory}/adapter_config.json"))  # as PEFT reads
    a = load_file(f"{directory}/adapter_model.safetensors")["base_model.model.layers.1.0.lora_A.weight"]
    assert config["lora_alpha"] == 3 * config["r"] and torch.equal(a, expected[config["r"]])
    seen.add(config["r"])
assert seen == {2, 5}
save_adapter(models[2], directory)
"""


def test_an_adapter_is_of_one_save_whoever_is_killed_when(tmp_path):
    """40 kills at random; after each, this library and PEFT's way of reading find one save."""
    run = subprocess.run([sys.executable, "-c", SAVER, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


def test_threads_that_save_and_load_at_once(tmp_path):
    models = [make_model(r=2, alpha=alpha, seed=alpha) for alpha in (2, 4, 8)]
    save_adapter(models[0], tmp_path)
    threads = [
        threading.Thread(target=lambda model=model: [save_adapter(model, tmp_path) for _ in range(15)])
        for model in models
    ]
    for thread in threads:
        thread.start()
    values = {int(m.layers[1][0].scaling): m.layers[1][0].lora_A for m in models}
    other = make_model(r=2)
    while any(thread.is_alive() for thread in threads):
        load_adapter(other, tmp_path)
        layer = dict(lora_layers(other))["layers.1.0"]
        assert torch.equal(layer.lora_A, values[int(layer.scaling)])
    for thread in threads:
        thread.join()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(STAGE_PREFIX)]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_where_one_of_the_two_cannot_be_written_the_other_is_as_before(saved, name):
    (saved / name).unlink()
    (saved / name).mkdir()
    other = WEIGHTS if name == CONFIG else CONFIG
    before = (saved / other).read_bytes()
    with pytest.raises(OSError, match=name):
        save_adapter(make_model(r=3), saved)
    assert (saved / other).read_bytes() == before and sorted(os.listdir(saved)) == [CONFIG, WEIGHTS]
