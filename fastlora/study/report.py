"""The finished study: its report as a dictionary, and the files that show it."""

import json

from tqdm import tqdm

from fastlora.analysis.layers import json_text, json_values
from fastlora.environment import describe
from fastlora.errors import CommandError
from fastlora.study.directions import measure_directions, parts
from fastlora.study.pictures import study_pictures
from fastlora.study.plan import Plan
from fastlora.study.results import FORMAT, experiments_of, study_tables, summarize
from fastlora.study.trainer import Trainer
from fastlora.study.trend_pictures import trend_pictures
from fastlora.study.trend_plan import TrendPlan
from fastlora.study.trend_tables import trend_tables
from fastlora.study.trends import measure_trends, trend_parts
from fastlora.tables import Table

REPORT = "study.json"
TITLES = ("Where a LoRA budget goes, and which rank is enough", "What adapters learn through their training")


def make_report(trainer: Trainer, command: str) -> tuple[dict, dict[str, bytes]]:
    """Everything that the runs show; and study.json, study.md and the pictures, as bytes by name.

    Raises:
        CommandError: a stored run or adapter cannot be read, or no candidate learning rate trained.
    """
    settings, specs, store = trainer.settings, trainer.runs, trainer.store
    results = [store.result(spec) for spec in specs]
    report = {
        "format": FORMAT,
        "command": command,
        "environment": describe(trainer.device.type),
        "model": trainer.label,
        "settings": settings.to_dict(),
        "held_out_tokens": trainer.blocks.held_out.tokens,
        "text": {"sha256": trainer.blocks.fingerprint(), "tokens": trainer.blocks.tokens},
        "base_loss": trainer.base_loss(),
        "runs": sorted(spec.key for spec in specs),
        "started": min(result["started"] for result in results),
        "ended": max(result["ended"] for result in results),
        "processes": len({result["process"] for result in results}),
        "commits": sorted({result["commit"] or "not a checkout" for result in results}),
        "training_seconds": round(sum(result["seconds"] for result in results), 3),
    }
    if isinstance(trainer.plan, TrendPlan):
        report |= _trends(trainer, trainer.plan)
    else:
        report |= _experiments(trainer, trainer.plan, results)
    report = json_values(report)
    files = trend_pictures(report) if "trends" in report else study_pictures(report)
    files[REPORT] = json_text(report).encode()
    files["study.md"] = _markdown(report, [name for name in files if name.endswith(".png")]).encode()
    return report, files


def report_tables(report: dict) -> list[Table]:
    """All tables of a report, whichever study it is of."""
    return trend_tables(report) if "trends" in report else study_tables(report)


def _experiments(trainer: Trainer, plan: Plan, results: list[dict]) -> dict:
    """What the two experiments show."""
    ranks = trainer.settings.ranks
    with tqdm(total=parts(ranks), desc="directions", unit="part") as bar:
        directions = measure_directions(trainer.store, plan, ranks, trainer.base, bar.update)
    experiments = experiments_of(plan, summarize(results))
    return {"budget": plan.budget, "experiments": experiments, "directions": directions}


def _trends(trainer: Trainer, plan: TrendPlan) -> dict:
    """What a study of trends shows. Raises CommandError where every candidate learning rate diverged."""
    steps = trainer.settings.steps
    if plan.chosen_rate(trainer.store.result) is None:
        raise CommandError("every run diverged: try lower --learning-rates")
    with tqdm(total=trend_parts(plan, steps), desc="directions", unit="part") as bar:
        trends = measure_trends(trainer.store, plan, steps, trainer.base, bar.update)
    return {"directions": trends.pop("directions"), "trends": trends}


def report_is_current(trainer: Trainer) -> dict | None:
    """The report in the directory where it covers this plan's runs and is younger than all of them; else None."""
    path = trainer.store.directory / REPORT
    if not path.exists():
        return None
    youngest = max((trainer.store.runs / f"{spec.key}.json").stat().st_mtime_ns for spec in trainer.runs)
    if path.stat().st_mtime_ns < youngest:
        return None
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    same = report.get("runs") == sorted(spec.key for spec in trainer.runs) and report.get("format") == FORMAT
    return report if same else None


def _markdown(report: dict, pictures: list[str]) -> str:
    env = report["environment"]
    facts = [
        f"{env['device_name']}, {report['processes']} processes, "
        f"{env['cpu_threads']} CPU threads each, torch {env['versions']['torch']}, "
        f"commit {', '.join(report['commits'])}",
        f"Runs from {report['started']} to {report['ended']}; {report['training_seconds']:.0f} s of training steps",
        f"`{report['command']}`",
    ]
    title = TITLES["trends" in report]
    lines = [f"# {title}", "", *(f"- {fact}" for fact in facts), ""]
    for table in report_tables(report):
        lines += [table.to_markdown()]
    return "\n".join([*lines, *(f"![{name}]({name})" for name in pictures), ""])
