"""The study's parts alone: budgets and ranks, claims between processes, the suggestion."""

import dataclasses
import json
import shlex
import subprocess
import sys

import pytest

from fastlora.errors import CommandError
from fastlora.study.plan import RunSpec, StudySettings, default_budget, make_plan, rank_for
from fastlora.study.results import summarize
from fastlora.study.store import RunStore
from fastlora.study.suggest import finetune_command, indistinguishable, rank_by_loss, suggestion_lines

SMOLLM2 = (34560, 23040, 23040, 34560)  # 30 layers of 576 x 576 and, for keys and values, 192 x 576
SPEC = RunSpec((0, 2), 8, 1)
START_TIMEOUT_S = 120


class TestPlan:
    def test_without_grouped_keys_the_budget_is_the_papers(self):
        """Rank 8 on one matrix, 4 on two, 2 on four."""
        plan = make_plan(StudySettings(), (100,) * 4)
        assert plan.budget == 800
        assert [rank for _, rank in plan.experiments["budget"]] == [8, 8, 8, 8, 4, 4, 2]

    def test_the_demo_models_budget_is_met_exactly(self):
        plan = make_plan(StudySettings(), SMOLLM2)
        assert [rank for _, rank in plan.experiments["budget"]] == [10, 15, 15, 10, 6, 6, 3]
        assert {plan.parameters(group, rank) for group, rank in plan.experiments["budget"]} == {345600}

    @pytest.mark.parametrize(("budget", "cost", "rank"), [(1, 100, 1), (149, 100, 1), (150, 100, 1), (151, 100, 2)])
    def test_ranks_are_the_nearest(self, budget, cost, rank):
        assert rank_for(budget, cost) == rank

    def test_a_budget_of_ones_own(self):
        plan = make_plan(StudySettings(budget=SMOLLM2[0] * 2), SMOLLM2)
        assert [rank for _, rank in plan.experiments["budget"]] == [2, 3, 3, 2, 1, 1, 1]
        assert default_budget(SMOLLM2) == 345600

    def test_runs_are_unique_and_no_two_configurations_start_alike(self):
        runs = make_plan(
            StudySettings(ranks=(1, 2, 4, 8, 10, 64)), SMOLLM2
        ).runs  # rank 10 on Wq is in both experiments
        assert len(runs) == len({run.key for run in runs}) == 3 * (7 + 18 - 1)
        assert len({run.start_seed for run in runs}) == len(runs)
        assert len({run.data_seed for run in runs}) == 3
        assert [run.seed for run in runs] == sorted(run.seed for run in runs)


HOLDER = """
import sys, time
from pathlib import Path
from fastlora.study.store import RunStore
with RunStore(Path(sys.argv[1])).lock(sys.argv[2]) as mine:
    print(mine, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def store(tmp_path):
    (tmp_path / "runs").mkdir()
    return RunStore(tmp_path)


class TestClaims:
    def test_one_owner_at_a_time(self, store):
        other = RunStore(store.directory)
        with store.claim(SPEC) as mine, other.claim(SPEC) as theirs, other.claim(RunSpec((0, 2), 8, 2)) as unrelated:
            assert mine and not theirs and unrelated
        with other.claim(SPEC) as theirs:
            assert theirs

    def test_a_finished_run_is_nobodys(self, store):
        store.save(SPEC, {"held_out_loss": 1.0})
        with store.claim(SPEC) as mine:
            assert not mine

    def test_the_claim_of_a_killed_process_is_free(self, store):
        command = [sys.executable, "-c", HOLDER, str(store.directory), SPEC.key]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
            assert owner.stdout.readline().strip() == "True"
            with store.claim(SPEC) as mine:
                assert not mine
            owner.kill()
        assert (store.runs / f"{SPEC.key}.lock").exists()
        with store.claim(SPEC) as mine:
            assert mine

    def test_two_processes_share_the_runs(self, fastlora_cli, tiny_model, text_file, tmp_path):
        sizes = ["--steps", "2", "--batch-size", "1", "--block-size", "24", "--held-out", "2", "--seeds", "1"]
        options = ["study", "--model", tiny_model, "--text", text_file, *sizes, "--ranks", "1", "--device", "cpu"]
        options = [str(option) for option in (*options, "--output", tmp_path)]
        command = [sys.executable, "-m", "fastlora.cli.main", *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as other:
            for line in other.stderr:  # its bar appears when it has begun to train
                if "step" in line:
                    break
            ours = fastlora_cli(*options)
            _, rest = other.communicate(timeout=START_TIMEOUT_S)
        assert ours.code == 0, ours.err
        assert other.returncode == 0, rest
        runs = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json")]
        assert len(runs) == 7 + 3
        assert len({run["process"] for run in runs}) == 2
        assert json.loads((tmp_path / "study.json").read_text())["processes"] == 2


def run_result(label, rank, parameters, losses, first_seed=0):
    return [
        {
            "label": label,
            "targets": [f"{name[1:]}_proj" for name in label.split("+")],
            "rank": rank,
            "seed": first_seed + seed,
            "parameters": parameters,
            "held_out_loss": loss,
            "relative_change_of_a": 0.1,
            "seconds": 1.0,
        }
        for seed, loss in enumerate(losses)
    ]


MEASURED = [
    *run_result("Wq", 7, 700, [3.0, 3.2]),
    *run_result("Wq+Wv", 4, 800, [2.5, 2.7]),
    *run_result("Wq+Wv", 1, 200, [2.49, 2.74]),
    *run_result("Wq+Wv", 8, 1600, [2.4, 2.6]),
    *run_result("Wo", 4, 400, [2.0, None]),
    *run_result("Wv", 8, 800, [2.1]),
]


SETTINGS = StudySettings().to_dict()


class TestSuggestion:
    def test_lowest_mean_loss_within_the_budget(self):
        """Wo diverged once and Wv lacks a seed: neither counts, whatever its other losses."""
        ordered = rank_by_loss(summarize(MEASURED), 800)
        assert [(entry["label"], entry["rank"]) for entry in ordered] == [("Wq+Wv", 4), ("Wq+Wv", 1), ("Wq", 7)]
        assert rank_by_loss(summarize(MEASURED), 5000)[0]["rank"] == 8
        assert rank_by_loss(summarize(MEASURED), 300)[0]["rank"] == 1

    def test_one_seed_is_said(self, fastlora_cli, store):
        store.begin(StudySettings(), {"model": "a model", "text": "0", "costs": [100] * 4})
        for result in MEASURED:
            if result["seed"] == 0:
                (store.runs / f"{result['label']}-r{result['rank']}-s0.json").write_text(json.dumps(result))
        advice = fastlora_cli("study", "--suggest", "--output", store.directory)
        assert "By one seed alone" in advice.out and "--seeds 3" in advice.out
        assert "not told apart" not in advice.out

    def test_what_is_within_the_spread_is_said_where_nothing_is_cheaper(self):
        results = [*run_result("Wq", 4, 400, [3.0, 3.2]), *run_result("Wv", 8, 800, [2.99, 3.25])]
        lines = suggestion_lines(rank_by_loss(summarize(results), 800), 800, "runs", SETTINGS)
        (doubt,) = (line for line in lines if "not told apart" in line)
        assert "1 of the 1 others; none of them cheaper; the first: --rank 8 --targets v_proj" in doubt
        results = [*run_result("Wq", 4, 400, [3.0, 3.2]), *run_result("Wv", 8, 800, [3.99, 4.2])]
        lines = suggestion_lines(rank_by_loss(summarize(results), 800), 800, "runs", SETTINGS)
        assert not any("not told apart" in line for line in lines), "a difference that every seed shows"

    def test_the_command_trains_what_the_study_did(self, fastlora_cli, tmp_path, tiny_model, text_file):
        settings = dataclasses.replace(
            StudySettings(), model=str(tiny_model), text=(str(text_file),), steps=1, block_size=24, held_out=2
        )
        entry = {"rank": 2, "targets": ["q_proj", "v_proj"]}
        words = shlex.split(finetune_command(entry, settings.to_dict()))
        assert words[:2] == ["fastlora", "finetune"]
        done = fastlora_cli(*words[1:], "--output", tmp_path / "out", "--device", "cpu")
        assert done.code == 0, done.err
        report = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]
        assert report["rank"] == 2 and report["targets"] == ["q_proj", "v_proj"] and report["alpha"] == 16.0
        assert report["learning_rate"] == settings.learning_rate and report["steps"] == 1
        assert "--model" not in finetune_command(entry, StudySettings().to_dict())

    def test_cheaper_ones_that_the_seeds_cannot_tell_apart(self):
        """Rank 1 is 0.015 behind on average, -0.01 and +0.04 by seed; Wq is 0.5 behind on each."""
        found = indistinguishable(rank_by_loss(summarize(MEASURED), 800))
        assert [(entry["label"], entry["rank"]) for entry in found] == [("Wq+Wv", 1)]

    @pytest.mark.parametrize(
        ("results", "budget", "words"),
        [
            ([], 800, ["no finished runs"]),
            (MEASURED, 100, ["100", "Wq+Wv at rank 1", "200"]),
            (run_result("Wq", 8, 800, [None]), 800, ["diverged"]),
        ],
    )
    def test_nothing_to_suggest(self, results, budget, words):
        with pytest.raises(CommandError) as refusal:
            rank_by_loss(summarize(results), budget)
        assert all(word in str(refusal.value) for word in words)

    def test_command(self, fastlora_cli, store):
        store.begin(StudySettings(), {"model": "a model", "text": "0", "costs": [100] * 4})
        refused = fastlora_cli("study", "--suggest", "--output", store.directory)
        assert refused.code == 2 and "no finished runs" in refused.error_line
        for result in MEASURED:
            (store.runs / f"{result['label']}-r{result['rank']}-s{result['seed']}.json").write_text(json.dumps(result))
        advice = fastlora_cli("study", "--suggest", "--output", store.directory)
        assert advice.code == 0, advice.err
        best = "For at most 800 trainable parameters: --rank 4 --targets q_proj,v_proj (800 parameters)"
        assert f"{best}, held-out loss 2.6000 ± 0.1414" in advice.out
        assert "--rank 1 --targets q_proj,v_proj (200 parameters), held-out loss 2.6150" in advice.out
        assert "Within the spread of the seeds, not told apart from it: 1 of the 2 others; the cheapest" in advice.out
        assert "To train it: fastlora finetune --rank 4 --targets q_proj,v_proj --alpha 16.0" in advice.out
        assert "11 runs of 2,048 tokens on a model" in advice.out
        larger = fastlora_cli("study", "--suggest", "--budget", 2000, "--output", store.directory)
        assert "--rank 8 --targets q_proj,v_proj (1,600 parameters)" in larger.out

    @pytest.mark.parametrize("content", ["{", "[]", '{"rank": 1}', "\xff"])
    def test_a_damaged_run_is_named(self, fastlora_cli, store, content):
        store.begin(StudySettings(), {"model": "a model", "text": "0", "costs": [100] * 4})
        (store.runs / "Wq-r1-s0.json").write_text(content, encoding="latin-1")
        refused = fastlora_cli("study", "--suggest", "--output", store.directory)
        assert refused.code == 2 and "Wq-r1-s0.json" in refused.error_line and "delete it" in refused.error_line

    def test_without_a_study(self, fastlora_cli, tmp_path):
        refused = fastlora_cli("study", "--suggest", "--output", tmp_path / "nowhere")
        assert refused.code == 2 and "no runs in" in refused.error_line
        assert not (tmp_path / "nowhere").exists()
