"""Fills the tables of README pages from result files, so that none is typed.

A table stands between two comments; the first names the table and the file that it comes from:

    <!-- table: step benchmarks/results/cpu/bench.json -->
    ...
    <!-- end of table -->

``python -m benchmarks.readme_tables`` rewrites them; ``--check`` only says whether they are up to date.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks import ROOT, dora, experts, quantised_memory, recipes, saved_bytes, segments
from benchmarks.defects import report as defects
from benchmarks.mutation import report as mutation
from benchmarks.schedule import projections as projection_schedule
from benchmarks.traffic import projections as projection_traffic
from benchmarks.traffic import report as traffic_report
from benchmarks.traffic import segments as segment_traffic
from fastlora.bench.claims import claims_tables
from fastlora.bench.tables import case_label, host_table, model_table, ratio_table
from fastlora.study.results import amplification_table, budget_table, ranks_table, similarity_table
from fastlora.study.trend_tables import amplification_trend_table, findings_table, similarity_trend_table
from fastlora.tables import MIB, Table

PAGES = ("README.md", "benchmarks/results/README.md")
BLOCK = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def memory_table(rows: list[dict]) -> Table:
    """Bytes kept for backward and allocated by a step, at the first case."""
    steps = [row for row in rows if row["pass"] == "step"]
    chosen = [row for row in steps if case_label(row) == case_label(steps[0])]
    lines = [[r["variant"], f"{r['saved_bytes'] / MIB:.2f}", f"{r['peak_bytes'] / MIB:.2f}"] for r in chosen]
    return Table("Memory", case_label(steps[0]), ["variant", "kept for backward, MiB", "peak of a step, MiB"], lines)


def mark_table(rows: list[dict]) -> Table:
    """The mark: every variant against cuBLAS's frozen product; one that is wrong or was not timed says so."""
    clocks = [row["clocks"]["sm_mhz"] for row in rows if row.get("clocks")]
    at = f", SM clock {min(c[0] for c in clocks):.0f} to {max(c[2] for c in clocks):.0f} MHz" if clocks else ""
    sizes = " ".join(f"{name.upper()}={rows[0][name]}" for name in "mnk")
    lines = []
    for row in rows:
        timed = "ratio" in row
        lines.append(
            [
                row["pass"], str(row["r"]), row["variant"],
                f"{row['median_us']:.1f}" if timed else row.get("failure", "not timed"),
                f"{row['frozen_us']:.1f}" if timed else "",
                f"{row['ratio']:.3f}" if timed else "",
                f"{row['noise']:.1%}" if timed else "",
                f"{row['mark']:.2f}" if row["mark"] else "",
            ]
        )  # fmt: skip
    header = ["pass", "R", "variant", "µs", "cuBLAS, µs", "ratio", "noise", "mark"]
    return Table("The mark", f"{sizes} {rows[0]['dtype']}{at}", header, lines)


TABLES: dict[str, Callable[[dict], Table]] = {
    "step": lambda report: ratio_table(report["layer"], "step"),
    "forward": lambda report: ratio_table(report["layer"], "forward"),
    "backward": lambda report: ratio_table(report["layer"], "backward"),
    "mark": lambda report: mark_table(report["rows"]),
    "memory": lambda report: memory_table(report["layer"]),
    "host": lambda report: host_table(report["host"]),
    "decoder": lambda report: model_table(report["decoder"]),
    "finetune": lambda report: model_table(report["finetune"]),
    "claims": lambda report: claims_tables(report)[0],
    "claims-shares": lambda report: claims_tables(report)[1],
    "claims-runs": lambda report: claims_tables(report)[2],
    "claims-memory": lambda report: claims_tables(report)[3],
    "study-budget": budget_table,
    "study-ranks": ranks_table,
    "study-similarity": similarity_table,
    "study-amplification": amplification_table,
    "trends-findings": findings_table,
    "trends-similarity": similarity_trend_table,
    "trends-amplification": amplification_trend_table,
    "traffic": traffic_report.readme_table,
    "saved": saved_bytes.readme_table,
    "quantised": quantised_memory.readme_table,
    "dora": dora.results_table,
    "recipes": recipes.results_table,
    "segments": segments.segments_table,
    "segment-traffic": segment_traffic.segment_table,
    "projection-traffic": projection_traffic.projection_table,
    "projection-schedule": projection_schedule.projection_table,
    "experts": experts.results_table,
    "mutation": mutation.readme_table,
    "defects": defects.readme_table,
}
# What makes a report of a file that is none.
READERS: dict[str, Callable[[Any], dict]] = {"mutation": mutation.readme_report, "defects": defects.readme_report}


def block_text(kind: str, path: str, root: Path, folder: str = "") -> str:
    """A table and the line that says where it comes from, for a page in a folder under the root.

    Raises:
        ValueError: no such kind of table, or no such file.
    """
    if kind not in TABLES:
        raise ValueError(f"unknown table {kind!r}; choose one of {', '.join(TABLES)}")
    try:
        report = json.loads((root / path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    report = READERS.get(kind, dict)(report)
    heading, body = TABLES[kind](report).to_markdown().split("\n", 1)
    source = ", ".join(filter(None, (f"[{path}]({os.path.relpath(path, folder or '.')})", made_with(report))))
    note = f"{source}: `{report['command']}`"
    return f"**{heading.removeprefix('## ')}**\n{body}\n{note}\n"


def made_with(report: dict) -> str:
    """The machine that was measured, or, of a report that counts and does not measure, the versions."""
    if "environment" not in report:
        return ", ".join(f"{name} {version}" for name, version in report.get("versions", {}).items())
    env = report["environment"]
    source = f"{env['device_name']}, {env['cpu_threads']} CPU threads" if env["device"] == "cpu" else env["device_name"]
    commit = env["commit"] or "not a checkout"
    return f"{source}, torch {env['versions']['torch']}, commit {commit}, {env['date'][:10]}"


def fill(text: str, root: Path, folder: str = "") -> str:
    """The text of a page in a folder under the root, with every marked table made anew."""
    return BLOCK.sub(lambda found: found[1] + block_text(found[2], found[3], root, folder) + found[4], text)


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 where a table is not up to date.")
def main(check: bool) -> None:
    """Rewrite the pages' tables from benchmarks/results."""
    for name in PAGES:
        page = ROOT / name
        text = page.read_text()
        try:
            filled = fill(text, ROOT, str(Path(name).parent))
        except ValueError as error:
            raise click.UsageError(f"{name}: {error}") from error
        if check and filled != text:
            raise click.ClickException(f"{name} has tables that are not those of benchmarks/results")
        if not check:
            page.write_text(filled)
        click.echo(f"{name}: {len(BLOCK.findall(text))} tables, {'up to date' if filled == text else 'rewritten'}")


if __name__ == "__main__":
    main()
