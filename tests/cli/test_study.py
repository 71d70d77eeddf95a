"""fastlora study on a tiny model: what it runs, what it reports, and how it goes on after an interruption."""

import gc
import json
import shutil
import signal

import pytest
import torch

from benchmarks import readme_tables
from fastlora.adapters.files import read_adapter
from fastlora.analysis import subspace_similarity
from fastlora.finetune import loop
from fastlora.finetune.loop import DivergedError
from fastlora.study import pictures, trainer
from fastlora.study import report as study_report
from fastlora.study.directions import DIGITS

RUNS = 2 * (7 + 3 * 2 - 1)  # rank 4 on all four is in both experiments
PICTURES = {"budget.png", "ranks.png", "amplification.png"}
PICTURES |= {f"similarity_{name}_{kind}_proj.png" for name in ("ranks", "seeds") for kind in "qv"}


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect():
    """Every run collects garbage before it measures memory: what the imports made need not be searched each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def options(tiny_model, text_file):
    sizes = ["--steps", 2, "--batch-size", 2, "--block-size", 24, "--held-out", 4, "--seeds", 2]
    return ["--model", tiny_model, "--text", text_file, *sizes, "--ranks", "4,1", "--learning-rate", 0.01]


@pytest.fixture
def study(fastlora_cli, options, monkeypatch):
    """Calls `fastlora study` on the tiny model and text; the arguments come after these and so override them."""
    monkeypatch.setattr(study_report, "study_pictures", lambda report: {})  # `whole` has them, and they take seconds
    return lambda *args: fastlora_cli("study", *options, "--device", "cpu", *args)


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """The directory of a finished study and what the command printed."""
    from click.testing import CliRunner

    from fastlora.cli.study import study

    directory = tmp_path_factory.mktemp("study")
    torch.set_num_threads(1)
    outcome = CliRunner().invoke(
        study, [str(option) for option in (*options, "--device", "cpu", "--output", directory)]
    )
    assert outcome.exception is None, outcome.output
    return directory, outcome.output


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of the finished study that may be changed."""
    return shutil.copytree(whole[0], tmp_path / "study")


def results(directory):
    return {path.stem: json.loads(path.read_text()) for path in (directory / "runs").glob("*.json")}


def report_of(directory):
    return json.loads((directory / "study.json").read_text())


def no_training(*args):
    raise AssertionError("a run was trained")


def test_report_and_pictures(whole):
    directory, printed = whole
    found, report = results(directory), report_of(directory)
    assert len(found) == RUNS and report["runs"] == sorted(found)
    assert {path.name for path in directory.glob("*.png")} == PICTURES
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in directory.glob("*.png"))
    budget = {entry["label"]: entry for entry in report["experiments"]["budget"]}
    assert list(budget) == ["Wq", "Wk", "Wv", "Wo", "Wq+Wk", "Wq+Wv", "Wq+Wk+Wv+Wo"]
    for entry in budget.values():
        # Wq costs 2·(32 + 32) parameters a rank, Wk 2·(32 + 16): what the adapters really hold.
        cost = sum({"q_proj": 128, "k_proj": 96, "v_proj": 96, "o_proj": 128}[name] for name in entry["targets"])
        assert entry["parameters"] == entry["rank"] * cost
        assert abs(entry["parameters"] - report["budget"]) <= cost / 2
        losses = [found[f"{entry['label']}-r{entry['rank']}-s{seed}"]["held_out_loss"] for seed in (0, 1)]
        assert list(entry["losses"].values()) == losses
        assert entry["mean"] == pytest.approx(sum(losses) / 2)
        assert entry["spread"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    best = min(budget.values(), key=lambda entry: entry["mean"])
    worst = max(budget.values(), key=lambda entry: entry["mean"])
    gaps = [worst["losses"][seed] - best["losses"][seed] for seed in ("0", "1")]
    text = f"{sum(gaps) / 2:+.4f} ± {abs(gaps[0] - gaps[1]) / 2**0.5:.4f} |"
    assert any(line.endswith(text) and f"| {worst['label']} |" in line for line in printed.splitlines())
    assert {(entry["label"], entry["rank"]) for entry in report["experiments"]["ranks"]} == {
        (label, rank) for label in ("Wq", "Wq+Wv", "Wq+Wk+Wv+Wo") for rank in (1, 4)
    }
    for title in ("One budget", "Ranks", "Similarity of the learned directions", "Amplification"):
        assert f"## {title}" in printed and f"## {title}" in (directory / "study.md").read_text()
    assert report["environment"]["versions"]["torch"] and report["commits"] and "2 × 24 tokens" in printed


def test_a_run_is_what_fine_tuning_computes(whole, finetune, tmp_path):
    """Same batches, same rate: `fastlora finetune` with the run's start gives its losses."""
    from fastlora.study.plan import RunSpec

    spec, run = RunSpec((0, 2), 4, 1), results(whole[0])["Wq+Wv-r4-s1"]
    original = loop.batch_at
    with pytest.MonkeyPatch.context() as patch:
        # finetune has one seed for start and batches; a study two.
        patch.setattr(loop, "batch_at", lambda blocks, step, size, seed: original(blocks, step, size, spec.data_seed))
        patch.setattr("fastlora.finetune.runner.make_blocks", lambda *a: trainer.make_blocks(*a[:3], 0))
        options = ["--steps", 2, "--rank", 4, "--targets", "q_proj,v_proj", "--seed", spec.start_seed]
        assert finetune(*options, "--output", tmp_path).code == 0
    tuned = json.loads((tmp_path / "report.json").read_text())["runs"]["fastlora"]
    assert run["losses"] == tuned["losses"] and run["held_out_loss"] == tuned["held_out_loss_after"]


def test_directions_come_from_the_kept_adapters(whole):
    directory, report = whole[0], report_of(whole[0])
    kept = {path.name for path in (directory / "runs").iterdir() if path.is_dir()}
    assert kept == {f"Wq+Wv-r{rank}-s{seed}" for rank in (1, 4, 8) for seed in (0, 1)}
    adapters = {name: read_adapter(directory / "runs" / name) for name in kept}
    path = "model.layers.1.self_attn.v_proj"
    tables = [
        subspace_similarity(adapters[f"Wq+Wv-r1-s{s}"][path].lora_a, adapters[f"Wq+Wv-r4-s{s}"][path].lora_a)
        for s in (0, 1)
    ]
    middle = report["directions"]["ranks"]["types"]["v_proj"]["middle"]
    assert middle["path"] == path
    assert (torch.tensor(middle["a"], dtype=torch.float64) - sum(tables) / 2).abs().max() <= 10**-DIGITS
    starts = subspace_similarity(adapters["Wq+Wv-r4-s0"][path].lora_a, adapters["Wq+Wv-r8-s0"][path].lora_a)
    assert starts[3, 7] < 0.9, "adapters of two ranks began with the same A"
    assert {(row["type"], row["rank"]) for row in report["directions"]["amplification"]} == {
        (kind, rank) for kind in ("q_proj", "v_proj") for rank in (1, 4)
    }


def test_a_finished_study_trains_nothing_again(study, whole, copied, monkeypatch):
    monkeypatch.setattr(trainer, "train", no_training)
    before = (copied / "study.json").stat().st_mtime_ns
    again = study("--output", copied)
    assert again.code == 0, again.err
    assert f"{RUNS} runs are there already" in again.out and (copied / "study.json").stat().st_mtime_ns == before
    (copied / "study.json").unlink()
    assert study("--output", copied).code == 0
    assert report_of(copied)["experiments"] == report_of(whole[0])["experiments"]


def test_a_study_may_grow(study, copied, monkeypatch):
    old = results(copied)
    grown = study("--output", copied, "--ranks", "1,4,40")
    assert grown.code == 0, grown.err
    new = results(copied)
    assert {key for key in new if key not in old} == {
        f"{label}-r40-s{seed}" for label in ("Wq", "Wq+Wv", "Wq+Wk+Wv+Wo") for seed in (0, 1)
    }
    assert all(new[key] == old[key] for key in old)
    assert "| r = 1 | r = 4 | r = 40 | r = 1 above r = 40," in grown.out
    # A rank beyond the layer's 32 dimensions: the tables say nothing past them.
    assert (
        torch.tensor(report_of(copied)["directions"]["ranks"]["types"]["q_proj"]["mean"]["a"][0][:32]).isfinite().all()
    )
    assert report_of(copied)["directions"]["ranks"]["types"]["q_proj"]["mean"]["a"][0][32] is None
    assert all(data.startswith(b"\x89PNG") for data in pictures.study_pictures(report_of(copied)).values())


def test_interrupted_and_resumed(study, whole, tmp_path, monkeypatch):
    """Runs that had ended are kept as they are; the one that was cut is trained again, to the same losses."""
    count, step = 0, loop._step

    def interrupted_step(*args):
        nonlocal count
        count += 1
        if count == 8:  # the second step of the fourth run
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    limited = ["--seeds", 1, "--output", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", interrupted_step)
        stopped = study(*limited)
    assert stopped.code == 130
    assert "Interrupted. 3 of 12 runs are stored" in stopped.out and "Go on with: fastlora" in stopped.out
    begun = results(tmp_path)
    assert len(begun) == 3 and not (tmp_path / "study.json").exists() and not list(tmp_path.rglob("*.partial"))
    assert study(*limited).code == 0
    ended, expected = results(tmp_path), results(whole[0])
    assert all(ended[key] == begun[key] for key in begun)
    assert len(ended) == 12 and all(run["losses"] == expected[key]["losses"] for key, run in ended.items())
    assert all(run["held_out_loss"] == expected[key]["held_out_loss"] for key, run in ended.items())


def test_a_run_that_diverges_is_a_result(study, tmp_path, monkeypatch):
    train = trainer.train

    def diverging(arm, blocks, settings, *rest, **options):
        if settings.rank == 4:
            raise DivergedError("the loss is nan at step 2")
        return train(arm, blocks, settings, *rest, **options)

    monkeypatch.setattr(trainer, "train", diverging)
    done = study("--seeds", 1, "--output", tmp_path)
    assert done.code == 0, done.err
    assert "diverged in 1 of 1" in done.out
    entries = [entry for entry in report_of(tmp_path)["experiments"]["ranks"] if entry["rank"] == 4]
    assert len(entries) == 3 and all(entry["mean"] is None and entry["diverged"] == 1 for entry in entries)
    assert report_of(tmp_path)["directions"]["ranks"] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--steps", 3], ["--steps 2", "another --output"]),
        (["--learning-rate", 0.02], ["--learning-rate 0.01"]),
        (["--alpha", 8], ["--alpha 16"]),
        (["--projections", "k_proj,q_proj,v_proj,o_proj"], ["--projections q_proj,k_proj,v_proj,o_proj"]),
    ],
)
def test_a_directory_holds_one_study(study, copied, change, words):
    before = results(copied)
    refused = study("--output", copied, *change)
    assert refused.code == 2
    assert all(word in refused.error_line for word in words)
    assert results(copied) == before


def test_changed_text_is_noticed(study, copied, text_file, tmp_path, monkeypatch):
    changed = tmp_path / "words.txt"
    changed.write_text(text_file.read_text()[::-1])
    monkeypatch.setattr(trainer, "read_text", lambda paths: changed.read_text())
    refused = study("--output", copied)
    assert refused.code == 2 and "another text" in refused.error_line


def test_damaged_files_are_named(study, copied):
    (copied / "study.json").unlink()
    (copied / "runs" / "Wq-r1-s0.json").write_text("{")
    refused = study("--output", copied)
    assert refused.code == 2
    assert "Wq-r1-s0.json" in refused.err and "delete it" in refused.err
    (copied / "runs" / "Wq-r1-s0.json").unlink()
    assert study("--output", copied).code == 0
    (copied / "study.json").unlink()
    shutil.rmtree(copied / "runs" / "Wq+Wv-r4-s0")
    refused = study("--output", copied)
    assert refused.code == 2 and "Wq+Wv-r4-s0" in refused.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "0,2"], ["--ranks", "0,2"]),
        (["--ranks", "two"], ["--ranks", "two"]),
        (["--projections", "q_proj,k_proj"], ["--projections", "four"]),
        (["--projections", "q,k,v,o"], ["--projections", "'q'", "q_proj"]),
        (["--preset", "huge"], ["huge", "quick"]),
        (["--budget", "0"], ["--budget"]),
        (["--seeds", "0"], ["--seeds"]),
        (["--device", "toaster"], ["toaster"]),
        (["--model", "./nowhere"], ["nowhere"]),
        (["--text", "nowhere.txt"], ["nowhere.txt"]),
    ],
)
def test_bad_options(study, tmp_path, arguments, words):
    refused = study("--output", tmp_path / "out", *arguments)
    assert refused.code == 2
    line = refused.err.strip().splitlines()[-1]
    assert line.startswith("fastlora: error: ") and all(word in line for word in words)
    assert not list(tmp_path.rglob("*.json"))


def test_output_that_cannot_be_written(study, tmp_path):
    (tmp_path / "file").write_text("")
    refused = study("--output", tmp_path / "file")
    assert refused.code == 2 and "cannot write" in refused.error_line


def test_readme_tables_come_from_the_report(whole):
    directory = whole[0]
    kinds = [kind for kind in readme_tables.TABLES if kind.startswith("study-")]
    assert len(kinds) == 4
    for kind in kinds:
        filled = readme_tables.fill(f"<!-- table: {kind} study.json -->\n<!-- end of table -->", directory)
        assert "[study.json](study.json)" in filled and "\n| " in filled
    assert study_report.REPORT == "study.json"
