"""fastlora analyze: its numbers are those of fastlora.analysis on the adapter; errors leave nothing behind."""

import dataclasses
import errno
import json
import math
import shutil
from pathlib import Path
from statistics import mean

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlora
from fastlora.adapters.files import read_adapter
from fastlora.analysis import amplification, subspace_similarity
from fastlora.analysis.tables import number
from fastlora.tables import WIDTH

PNG = b"\x89PNG"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def base(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture
def make_adapter(tiny_model, tmp_path):
    """Saves an adapter with drawn A and B (or B still zero) on the tiny model; returns its directory."""
    from transformers import AutoModelForCausalLM

    def make(name, targets=("q_proj", "v_proj"), r=4, seed=0, trained=True):
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        torch.manual_seed(seed)
        fastlora.inject(model, list(targets), r=r, alpha=6)
        for parameter in model.parameters():
            if parameter.requires_grad and trained:
                torch.nn.init.normal_(parameter)
        fastlora.save_adapter(model, tmp_path / name)
        return tmp_path / name

    return make


def report_of(directory):
    report = json.loads((directory / "analysis.json").read_text())
    return {row["path"]: row for row in report["layers"]}


def assert_shown(result, rows, written):
    """A table with a row a type and three sentences that are in the file, too; no layer."""
    assert max(map(len, result.out.splitlines())) <= WIDTH or "/" in max(result.out.splitlines(), key=len)
    table, said, _ = result.out[result.out.index("Matrix types") :].split("\n\n")
    for kind in ("q_proj", "v_proj"):
        members = [row for row in rows.values() if row["type"] == kind]
        expected = [kind, "2", "4", number(mean(row["delta_norm"] for row in members))]
        assert [line.split()[:4] for line in table.splitlines() if line.startswith(kind)] == [expected]
    norms = {
        kind: mean(row["delta_norm"] for row in rows.values() if row["type"] == kind) for kind in ("q_proj", "v_proj")
    }
    most, least = sorted(norms, key=norms.get, reverse=True)
    sentences = [
        line for line in written.splitlines() if line.endswith(".") and not line.startswith(("#", "Frobenius"))
    ]
    assert len(sentences) == 3 and " ".join(said.split()) == " ".join(sentences)
    assert f"ΔW is largest in {most}" in sentences[0] and f"smallest in {least}" in sentences[0]
    assert f"uses {number(mean(row['effective_rank'] for row in rows.values()))} directions" in sentences[1]
    assert "layers.1" not in result.out


def test_spectra_alone(fastlora_cli, make_adapter, tmp_path):
    adapter, output = make_adapter("adapter"), tmp_path / "out"
    result = fastlora_cli("analyze", adapter, "--output", output)
    assert result.code == 0, result.err
    assert sorted(path.name for path in output.iterdir()) == ["analysis.json", "analysis.md", "spectra.png"]
    assert (output / "spectra.png").read_bytes().startswith(PNG)
    rows, layers = report_of(output), read_adapter(adapter)
    assert rows.keys() == layers.keys() and len(rows) == 4
    for path, (a, b, scaling) in layers.items():
        exact = torch.linalg.svdvals(scaling * b.double() @ a.double())[:4]
        assert rows[path]["spectrum"] == pytest.approx(exact.tolist(), rel=1e-10)
        assert rows[path]["delta_norm"] == pytest.approx(exact.norm().item())
        assert rows[path]["scaling"] == 1.5 and rows[path]["layer"] in (0, 1)
    written = (output / "analysis.md").read_text()
    assert "| q_proj | 2 | 4 |" in written and "| 1 | v_proj | 16×32 | 4 |" in written
    assert_shown(result, rows, written)


def test_layers_are_in_the_models_order(fastlora_cli, tmp_path):
    """Safetensors sorts by name, 10 before 2; a model does not."""
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(3, 4) for _ in range(12))})
    fastlora.inject(model, [str(index) for index in range(12)], r=1)
    fastlora.save_adapter(model, tmp_path / "adapter")
    assert list(read_adapter(tmp_path / "adapter")) == [f"layers.{index}" for index in range(12)]


def test_base_and_against(fastlora_cli, make_adapter, tiny_model, base, tmp_path):
    adapter, other, output = make_adapter("adapter"), make_adapter("other", r=2, seed=1), tmp_path / "out"
    result = fastlora_cli("analyze", adapter, "--base", tiny_model, "--against", other, "--output", output)
    assert result.code == 0, result.err
    pictures = {path.name for path in output.glob("*.png")}
    assert pictures == {"spectra.png", "amplification.png", "similarity_q_proj.png", "similarity_v_proj.png"}
    rows, layers, others = report_of(output), read_adapter(adapter), read_adapter(other)
    for path, (a, b, scaling) in layers.items():
        expected = amplification(base.get_submodule(path).weight, a, b, scaling)
        assert rows[path]["amplification"] == pytest.approx(dataclasses.asdict(expected))
        similarity = rows[path]["similarity"]
        assert torch.tensor(similarity["a"]).shape == (4, 2) and similarity["rank_against"] == 2
        assert similarity["a"] == subspace_similarity(a, others[path].lora_a).tolist()
        assert similarity["b"] == subspace_similarity(b, others[path].lora_b, side="left").tolist()
    written = (output / "analysis.md").read_text()
    assert "factor" in written and "φ_A(r, r)" in written
    assert_shown(result, rows, written)
    factor = number(mean(row["amplification"]["factor"] for row in rows.values()))
    b, cosine = (number(mean(value(row["similarity"]) for row in rows.values())) for value in (
        lambda similarity: similarity["b"][1][1], lambda similarity: similarity["delta_cosine"],
    ))  # fmt: skip
    assert f"In its own directions ΔW is {factor} times what W has there" in result.text
    assert f"the two adapters' ΔW have a cosine of {cosine};" in result.text
    assert f"they share in B φ = {b} (0.0938 by chance) and A φ =" in result.text
    assert "began with the same random A" not in result.text


def test_a_common_start_is_said(fastlora_cli, make_adapter, tmp_path):
    """Also where the ranks differ, and A has moved since: rows that correspond are of the start."""
    adapter, other = make_adapter("adapter"), tmp_path / "other"
    shutil.copytree(adapter, other)
    tensors = load_file(other / WEIGHTS)
    config = json.loads((other / CONFIG).read_text())
    (other / CONFIG).write_text(json.dumps(config | {"r": 2}))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if "lora_A" in name:
            tensors[name] = (tensor + 0.5 * tensor.std() * noise)[:2].contiguous()
        else:
            tensors[name] = noise[:, :2].contiguous()
    save_file(tensors, other / WEIGHTS)
    result = fastlora_cli("analyze", adapter, "--against", other, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    rows = report_of(tmp_path / "out")
    assert all(row["similarity"]["same_start"] and 0.7 < row["similarity"]["rows_of_a"] < 1 for row in rows.values())
    assert f"In {len(rows)} of {len(rows)} layers both adapters began with the same random A" in result.text
    assert "Go by B and ΔW" in result.text


def test_an_adapter_against_itself_is_the_same_everywhere(fastlora_cli, make_adapter, tmp_path):
    adapter = make_adapter("adapter", targets=["o_proj"])
    assert fastlora_cli("analyze", adapter, "--against", adapter, "--output", tmp_path / "out").code == 0
    for row in report_of(tmp_path / "out").values():
        for table in (row["similarity"]["a"], row["similarity"]["b"]):
            assert [table[i][i] for i in range(4)] == pytest.approx([1.0] * 4)


def test_reads_what_peft_writes(fastlora_cli, tiny_model, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = peft.LoraConfig(r=4, lora_alpha=12, use_rslora=True, target_modules=["k_proj"], rank_pattern={"1.*": 2})
    model = peft.get_peft_model(model, config)
    factors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
            factors[name] = parameter.detach().double()
    model.save_pretrained(tmp_path / "peft")
    assert fastlora_cli("analyze", tmp_path / "peft", "--base", tiny_model, "--output", tmp_path / "out").code == 0
    rows = report_of(tmp_path / "out")
    assert len(rows) == 2
    for path, row in rows.items():
        a, b = (factors[f"base_model.model.{path}.lora_{factor}.default.weight"] for factor in "AB")
        norm = 12 / math.sqrt(len(a)) * torch.linalg.matrix_norm(b @ a).item()
        assert row["delta_norm"] == pytest.approx(norm)


def test_an_untrained_adapter_has_no_directions(fastlora_cli, make_adapter, tiny_model, tmp_path):
    adapter, other = make_adapter("adapter", trained=False), make_adapter("other")
    options = ["--base", tiny_model, "--against", other, "--output", tmp_path / "out"]
    result = fastlora_cli("analyze", adapter, *options)
    assert result.code == 0, result.err
    for row in report_of(tmp_path / "out").values():
        assert row["delta_norm"] == 0 and row["effective_rank"] == 0
        assert row["amplification"]["factor"] is None and row["amplification"]["rank"] == 0
        assert row["similarity"]["b"][0][0] is None and row["similarity"]["a"][0][0] is not None
    assert "The adapter changes nothing: every ΔW is 0" in result.text


def test_modules_restricts_to_common_layers(fastlora_cli, make_adapter, tmp_path):
    adapter, other = make_adapter("adapter"), make_adapter("other", targets=["q_proj", "k_proj"])
    options = ["--against", other, "--output", tmp_path / "out"]
    refused = fastlora_cli("analyze", adapter, *options)
    assert refused.code == 2 and "--modules" in refused.error_line
    assert fastlora_cli("analyze", adapter, *options, "--modules", "q_proj").code == 0
    assert {row["type"] for row in report_of(tmp_path / "out").values()} == {"q_proj"}


def other_model(directory, hidden):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=257,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def break_weights(adapter):
    path = adapter / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def break_config(adapter):
    (adapter / CONFIG).write_text("{")


def only_pickle(adapter):
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")


def other_rank(adapter):
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "r": 3}))


def not_finite(adapter):
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / WEIGHTS)
    tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][3, 1] = torch.nan
    save_file(tensors, adapter / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, ["cannot read adapter", CONFIG]),
        (break_weights, ["cannot read adapter", WEIGHTS]),
        (break_config, [CONFIG, "JSON"]),
        (only_pickle, ["adapter_model.bin", "refused"]),
        (other_rank, ["ranks do not agree", "q_proj"]),
        (not_finite, ["layers.1.self_attn.v_proj", "lora_b", "NaN"]),
    ],
)
@pytest.mark.parametrize("role", ["adapter", "against"])
def test_unreadable_adapters(fastlora_cli, make_adapter, tmp_path, role, damage, words):
    adapter, against, output = make_adapter("adapter"), make_adapter("other", seed=1), tmp_path / "out"
    damage(adapter if role == "adapter" else against)
    result = fastlora_cli("analyze", adapter, "--against", against, "--output", output)
    assert result.code == 2
    line = result.err.strip().splitlines()[-1]
    assert line.startswith("fastlora: error: ")
    for word in words:
        # An adapter that holds NaN is found layer by layer: the second one is "second" there.
        assert word in line or (role == "against" and word == "lora_b" and "second" in line)
    assert not output.exists() or list(output.iterdir()) == []


def test_layers_that_do_not_match(fastlora_cli, make_adapter, tmp_path):
    adapter, output = make_adapter("adapter"), tmp_path / "out"
    other_model(tmp_path / "narrow", 16)
    result = fastlora_cli("analyze", adapter, "--base", tmp_path / "narrow", "--output", output)
    assert result.code == 2 and "no layers model.layers.1.self_attn.q_proj" in result.err
    alone = make_adapter("first", targets=["layers.0.self_attn.q_proj"])
    result = fastlora_cli("analyze", alone, "--base", tmp_path / "narrow", "--output", output)
    assert result.code == 2 and "(weight 16×16, adapter 32×32)" in result.err
    result = fastlora_cli("analyze", adapter, "--against", alone, "--output", output)
    assert result.code == 2 and f"{alone} lacks" in result.err and "layers.1.self_attn.v_proj" in result.err
    result = fastlora_cli("analyze", adapter, "--modules", "gate_proj", "--output", output)
    assert result.code == 2 and "q_proj, v_proj" in result.error_line
    result = fastlora_cli("analyze", adapter, "--base", tmp_path / "nowhere", "--output", output)
    assert result.code == 2 and "nowhere" in result.error_line
    assert not output.exists() or list(output.iterdir()) == []


def test_shapes_of_two_adapters_that_differ(fastlora_cli, make_adapter, tmp_path):
    adapter, other = make_adapter("adapter", targets=["q_proj"]), make_adapter("other", targets=["k_proj"])
    for name in (WEIGHTS, CONFIG):
        path = other / name
        path.write_bytes(path.read_bytes().replace(b"k_proj", b"q_proj"))
    result = fastlora_cli("analyze", adapter, "--against", other, "--output", tmp_path / "out")
    assert result.code == 2
    assert "shapes differ: model.layers.0.self_attn.q_proj (N×K 32×32 and 16×32)" in result.error_line


def test_a_failed_write_keeps_the_old_report(fastlora_cli, make_adapter, tmp_path, monkeypatch):
    adapter, output = make_adapter("adapter"), tmp_path / "out"
    assert fastlora_cli("analyze", adapter, "--output", output).code == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    other = make_adapter("other", seed=3)

    def full_disk(path, data, write=Path.write_bytes):
        write(path, data[:10])
        if path.suffix == ".md":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    result = fastlora_cli("analyze", other, "--output", output)
    assert result.code == 2 and "No space left" in result.err
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_output_that_cannot_be_written(fastlora_cli, make_adapter, tmp_path):
    (tmp_path / "file").write_text("")
    result = fastlora_cli("analyze", make_adapter("adapter"), "--output", tmp_path / "file")
    assert result.code == 2 and "cannot write" in result.error_line


NAMES = [
    "co$t$",
    "nul\0",
    "a/b",
    "..",
    "x" * 300,
    "漢" * 100,
    "line\nfeed",
    "pi|pe",
    "\x1b[31m",
    "x[1,2]",
    "`",
    "",
    "\\$",
    "co_t_",
    "$x^$",
]


def write_adapter(directory, names):
    """An adapter whose layers have these names, which no module of torch may have; PEFT's format allows them."""
    from safetensors.torch import save_file

    directory.mkdir()
    torch.manual_seed(0)
    tensors = {}
    for i, name in enumerate(names):
        tensors[f"base_model.model.layers.{i}.{name}.lora_A.weight"] = torch.randn(2, 5)
        tensors[f"base_model.model.layers.{i}.{name}.lora_B.weight"] = torch.randn(4, 2)
    save_file(tensors, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3}))
    return directory


@pytest.mark.parametrize("folder", ["$x^$ $\nb", "x" * 200, "\udcff"], ids=["dollar", "long", "bytes"])
def test_whatever_names_layers_and_folders_bear(fastlora_cli, tmp_path, folder):
    adapter = write_adapter(tmp_path / folder.replace("\udcff", "b"), NAMES)  # safetensors wants UTF-8
    output = tmp_path / f"out{folder[:100]}"
    compared = ["--against", adapter] if "$" in folder else []  # a picture a type: once is enough
    result = fastlora_cli("analyze", adapter, *compared, "--output", output)
    assert result.code == 0, result.err
    assert set(report_of(output)) == {f"layers.{i}.{name}" for i, name in enumerate(NAMES)}
    pictures = list(output.glob("similarity_*.png"))
    kinds = {name.rpartition(".")[2] for name in NAMES}
    assert len(pictures) == (len(kinds) if compared else 0) and len(kinds) == len(NAMES) - 1
    assert all(path.read_bytes().startswith(PNG) for path in pictures)
    table = (output / "analysis.md").read_text()
    assert "| co$t$ |" in table and "| nul\\x00 |" in table and "| line\\nfeed |" in table
    assert len(table.split("## ")[2].splitlines()) == len(NAMES) + 6


def test_more_types_than_a_picture_holds(fastlora_cli, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", [f"expert_{i}" for i in range(60)])
    result = fastlora_cli("analyze", adapter, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert len(report_of(tmp_path / "out")) == 60
