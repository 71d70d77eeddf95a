"""fastlora study --trends on a tiny model: its runs, what is kept on the way, and what the report makes of it."""

import dataclasses
import json
import math

import pytest
import torch

from benchmarks import readme_tables
from fastlora.adapters.files import read_adapter
from fastlora.analysis import amplification, subspace_similarity
from fastlora.finetune.loop import DivergedError
from fastlora.study import report as study_report
from fastlora.study import trainer
from fastlora.study.directions import DIGITS
from fastlora.study.plan import RunSpec, StudySettings
from fastlora.study.trend_plan import make_trend_plan
from fastlora.study.trend_tables import NOT_HERE, ON_ITS_WAY, REPRODUCED, findings_table

STEPS = 18  # kept: 16 and 18
RATES = (0.001, 0.03)
QV = (0, 2)


@pytest.fixture(scope="module")
def options(tiny_model, text_file):
    sizes = ["--steps", STEPS, "--batch-size", 1, "--block-size", 24, "--held-out", 4, "--seeds", 2]
    rates = ["--learning-rates", ",".join(map(str, RATES))]
    return ["--trends", "--model", tiny_model, "--text", text_file, *sizes, "--ranks", "8,2,4", *rates]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """The directory of a finished study and what the command printed."""
    from click.testing import CliRunner

    from fastlora.cli.study import study

    directory = tmp_path_factory.mktemp("trends")
    torch.set_num_threads(1)
    words = [str(option) for option in (*options, "--device", "cpu", "--output", directory)]
    outcome = CliRunner().invoke(study, words)
    assert outcome.exception is None, outcome.output
    return directory, outcome.output


def report_of(directory):
    return json.loads((directory / "study.json").read_text())


def results(directory):
    return {path.stem: json.loads(path.read_text()) for path in (directory / "runs").glob("*.json")}


class TestPlan:
    PLAN = make_trend_plan(StudySettings(ranks=(64, 4, 8), seeds=3, learning_rates=(1.0, 2.0, 3.0)), (10,) * 4)

    def test_the_second_largest_rank_is_trained_at_every_rate(self):
        assert self.PLAN.runs == [RunSpec(QV, 8, 0, rate) for rate in (1.0, 2.0, 3.0)]
        assert self.PLAN.count == 3 + 4

    @pytest.mark.parametrize(
        ("losses", "best"), [((3.0, 2.0, 2.5), 2.0), ((None, 2.0, 1.5), 3.0), ((1.0, 1.0, 2.0), 1.0)]
    )
    def test_the_lowest_loss_decides(self, losses, best):
        stored = {spec: {"held_out_loss": loss} for spec, loss in zip(self.PLAN.runs, losses, strict=True)}
        assert self.PLAN.chosen_rate(stored.get) == best
        assert self.PLAN.further_runs(stored.get) == [
            RunSpec(QV, 64, 0, best), RunSpec(QV, 4, 0, best), RunSpec(QV, 64, 1, best), RunSpec(QV, 64, 2, best),
        ]  # fmt: skip

    def test_nothing_is_decided_before_all_have_ended(self):
        stored = {spec: {"held_out_loss": 1.0} for spec in self.PLAN.runs[:2]}
        assert self.PLAN.chosen_rate(stored.get) is None and self.PLAN.further_runs(stored.get) == []

    @pytest.mark.parametrize(("steps", "kept"), [(1000, [16, 64, 256, 1000]), (16, [16]), (17, [16, 17]), (3, [3])])
    def test_kept_steps(self, steps, kept):
        assert self.PLAN.kept_steps(steps) == kept


def test_runs_rates_and_states(whole):
    directory, printed = whole
    found, report = results(directory), report_of(directory)
    rate = report["trends"]["rate"]
    losses = {r: found[f"Wq+Wv-r4-s0-lr{r:g}"]["held_out_loss"] for r in RATES}
    assert rate == min(losses, key=losses.get), "the lowest held-out loss decides"
    names = {f"Wq+Wv-r4-s0-lr{r:g}" for r in RATES} | {
        f"Wq+Wv-r{r}-s{s}-lr{rate:g}" for r, s in ((8, 0), (2, 0), (8, 1))
    }
    assert set(found) == names and report["runs"] == sorted(names)
    for run in found.values():
        assert [state["step"] for state in run["states"]] == [16, STEPS] and len(run["losses"]) == STEPS
        assert run["held_out_loss"] == run["states"][-1]["held_out_loss"]
        changes = [state["relative_change_of_a"] for state in run["states"]]
        assert 0 < changes[0] != changes[1] > 0
    assert "5 runs of 18 steps" in printed and "the best of the learning rates 0.001, 0.03" in printed
    assert {(run["rank"], run["seed"]) for run in report["trends"]["runs"]} == {(4, 0), (8, 0), (2, 0), (8, 1)}
    for title in ("The paper's findings on directions", "Learning rate", "Similarity through training"):
        assert f"## {title}" in printed and f"## {title}" in (directory / "study.md").read_text()
    assert f"| {rate:g} (chosen) |" in printed
    assert {path.name for path in directory.glob("*.png")} == {"trends.png", "projections.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in directory.glob("*.png"))


def test_a_kept_state_is_that_of_its_step(whole, finetune, tmp_path):
    """What fine-tuning has after 16 of the run's 18 steps."""
    directory, _ = whole
    rate = report_of(directory)["trends"]["rate"]
    run = results(directory)[f"Wq+Wv-r8-s1-lr{rate:g}"]
    key = directory / "runs" / run["key"]
    early, late = read_adapter(key.with_name(key.name + "-step16")), read_adapter(key)
    path = "model.layers.1.self_attn.v_proj"
    assert not torch.equal(early[path].lora_b, late[path].lora_b)
    spec = RunSpec(QV, 8, 1, rate)
    from fastlora.finetune import loop

    original = loop.batch_at
    with pytest.MonkeyPatch.context() as patch:
        # finetune has one seed for start and batches; a study two.
        patch.setattr(loop, "batch_at", lambda blocks, step, size, seed: original(blocks, step, size, spec.data_seed))
        patch.setattr("fastlora.finetune.runner.make_blocks", lambda *a: trainer.make_blocks(*a[:3], 0))
        options = ["--steps", STEPS, "--rank", 8, "--targets", "q_proj,v_proj", "--seed", spec.start_seed]
        options += ["--batch-size", 1, "--learning-rate", rate, "--eval-every", 16, "--output", tmp_path]
        assert finetune(*options).code == 0
    tuned = json.loads((tmp_path / "report.json").read_text())["runs"]["fastlora"]
    assert run["losses"] == tuned["losses"]
    held_out = {step: loss for step, loss in tuned["held_out_losses"]}
    assert run["states"][0]["held_out_loss"] == held_out[16]
    assert run["states"][1]["held_out_loss"] == held_out[STEPS]


def test_points_come_from_the_kept_adapters(whole):
    directory, _ = whole
    report = report_of(directory)
    rate, path = report["trends"]["rate"], "model.layers.1.self_attn.v_proj"
    runs = directory / "runs"
    for point, suffix in zip(report["trends"]["points"], ("-step16", ""), strict=True):
        key = {r: read_adapter(runs / f"Wq+Wv-r{r}-s0-lr{rate:g}{suffix}") for r in (4, 8)}
        expected = subspace_similarity(key[4][path].lora_b, key[8][path].lora_b, side="left")
        (row,) = (r for r in point["similarity"] if (r["pair"], r["type"], r["side"]) == ("ranks", "v_proj", "b"))
        assert row["first_middle"] == pytest.approx(expected[0, 0].item(), abs=10**-DIGITS)
        (row,) = (r for r in point["amplification"] if (r["type"], r["rank"]) == ("v_proj", 4))
        weight = report_weight(report, path)
        a, b, scaling = key[4][path]
        assert row["middle"]["factor"] == pytest.approx(amplification(weight, a, b, scaling).factor, rel=1e-6)
    assert report["directions"]["ranks"]["i"] == "r = 4" and report["directions"]["ranks"]["j"] == "r = 8"
    assert report["directions"]["seeds"] is not None


def report_weight(report, path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(report["settings"]["model"]).get_parameter(f"{path}.weight").detach()


def test_a_finished_study_trains_nothing_again(fastlora_cli, options, whole, monkeypatch):
    monkeypatch.setattr(trainer, "train", lambda *a, **k: pytest.fail("a run was trained"))
    again = fastlora_cli("study", *options, "--device", "cpu", "--output", whole[0])
    assert again.code == 0, again.err
    assert "5 runs are there already" in again.out


def test_a_rate_that_diverges_is_not_taken(fastlora_cli, options, tmp_path, monkeypatch):
    train = trainer.train

    def diverging(arm, blocks, settings, *rest, **named):
        if settings.learning_rate == max(RATES) or everything:
            raise DivergedError("the loss is nan at step 2")
        return train(arm, blocks, settings, *rest, **named)

    monkeypatch.setattr(trainer, "train", diverging)
    monkeypatch.setattr(study_report, "trend_pictures", lambda report: {})
    everything = False
    done = fastlora_cli("study", *options, "--device", "cpu", "--output", tmp_path / "one")
    assert done.code == 0, done.err
    assert report_of(tmp_path / "one")["trends"]["rate"] == min(RATES)
    assert "the loss is nan at step 2" in done.out
    everything = True
    refused = fastlora_cli("study", *options, "--device", "cpu", "--output", tmp_path / "all")
    assert refused.code == 2 and "every run diverged" in refused.err and "--learning-rates" in refused.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--learning-rates", "0.1"], ["--trends"]),
        (["--trends", "--learning-rates", "0,1"], ["'0,1'"]),
        (["--trends", "--learning-rates", "fast"], ["'fast'"]),
        (["--trends", "--learning-rates", "inf"], ["'inf'"]),
        (["--trends", "--ranks", "4"], ["at least two"]),
    ],
)
def test_bad_options(fastlora_cli, tmp_path, arguments, words):
    refused = fastlora_cli("study", *arguments, "--output", tmp_path / "out")
    assert refused.code == 2
    assert all(word in refused.err.strip().splitlines()[-1] for word in words)
    assert not (tmp_path / "out").exists()


def test_stored_runs_of_the_other_kind_are_named(fastlora_cli, options, whole):
    plain = [option for option in options if option != "--trends"]
    plain = plain[: plain.index("--learning-rates")]
    refused = fastlora_cli("study", *plain, "--device", "cpu", "--output", whole[0])
    assert refused.code == 2 and "--learning-rates 0.001,0.03" in refused.error_line


def test_runs_of_an_older_version_are_joined():
    """Its header lacks the settings that came later."""
    stored = StudySettings().to_dict()
    del stored["learning_rates"]
    assert StudySettings().differences(stored) == []
    assert dataclasses.replace(StudySettings(), learning_rates=(1.0,)).differences(stored)


def point(step, similarity, factor):
    row = {"pair": "ranks", "type": "q_proj", "side": "b", "first": similarity}
    mean = {"factor": factor, "delta_projection": 3.0, "random_expected": 2.0}
    return {"step": step, "similarity": [row], "amplification": [{"type": "q_proj", "rank": 4, "mean": mean}]}


@pytest.mark.parametrize(
    ("similarities", "factors", "verdicts"),
    [
        ((0.1, 0.5), (1.0, 10.75), (REPRODUCED, REPRODUCED)),
        ((0.1, 0.12), (1.0, 1.19), (ON_ITS_WAY, NOT_HERE)),
        ((0.4, 0.3), (5.0, 6.1), (NOT_HERE, ON_ITS_WAY)),
        ((0.49,), (1.0,), (NOT_HERE, NOT_HERE)),
    ],
)
def test_verdicts(similarities, factors, verdicts):
    points = [point(step, *values) for step, values in enumerate(zip(similarities, factors, strict=True))]
    rows = findings_table({"trends": {"points": points}}).rows
    assert [row[-1] for row in rows] == [*verdicts, NOT_HERE]  # 1.5 times what chance gives is below 2
    assert not any(math.isnan(value) for value in similarities)


def test_readme_tables_come_from_the_report(whole):
    directory = whole[0]
    kinds = [kind for kind in readme_tables.TABLES if kind.startswith("trends-")]
    assert len(kinds) == 3
    for kind in kinds:
        filled = readme_tables.fill(f"<!-- table: {kind} study.json -->\n<!-- end of table -->", directory)
        assert "[study.json](study.json)" in filled and "\n| " in filled
