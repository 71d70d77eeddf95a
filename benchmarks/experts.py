"""LoRA on MoE experts on the CPU: bytes saved, peak and time of a step, beside stock PEFT and a loop over experts.

The variants are those of ``fastlora bench --only experts`` in float32: a quarter of the experts, of the widths and of
the tokens of 128 experts x 2048 x 768 with 4096 tokens, so that an expert has as many rows. All are checked against
float64 before they are timed, and take turns in one run, by the CPU time of one thread; stock PEFT runs twice, so that
the noise stands beside the ratios. ``load`` is how many processes wanted a CPU when it began. Writes results/experts.*.
"""

import json
import os
import time
from dataclasses import asdict

import click
import torch

from benchmarks import RESULTS
from fastlora.bench.experts import STOCK, ExpertsCase, build_variants, make_inputs
from fastlora.bench.grouped import check, counts, stage_of
from fastlora.bench.timing import time_calls
from fastlora.environment import describe
from fastlora.tables import MIB, Table

RESULT = RESULTS / "experts.json"
NOISE = f"{STOCK}, again"
CASE = ExpertsCase(experts=32, hidden=512, intermediate=192, tokens=1024, top_k=8, r=16, dtype="float32")


def measure(case: ExpertsCase, seconds: float) -> list[dict]:
    """Bytes and times of every variant.

    Raises:
        WrongResult: a variant is wrong.
        ImportError: PEFT is not installed.
    """
    variants, exact, missing = build_variants(case, "cpu")
    if missing:
        raise ImportError(f"nothing to compare with: {missing}")
    inputs = make_inputs(case, "cpu")
    check(variants, exact, *inputs)
    variants = {NOISE: variants[STOCK], **variants}
    stages = {name: stage_of(variant, *inputs) for name, variant in variants.items()}

    def step_of(stage):
        def step() -> None:
            stage.forward()
            stage.backward()

        return step

    steps = {name: step_of(stage) for name, stage in stages.items()}
    timings = time_calls(steps, "cpu", seconds, calls=1, clock=time.thread_time)
    return [
        {"variant": name, **asdict(timings[name]), **counts(variant, stages[name], "cpu", variant.held.buffers())}
        for name, variant in variants.items()
    ]


def results_table(report: dict) -> Table:
    rows = report["rows"]
    median = {row["variant"]: row["median_us"] for row in rows}
    note = (
        f"{report['case']['experts']} experts, {ExpertsCase(**report['case']).note} Forward and backward; CPU time of "
        f"one thread, {rows[0]['rounds']} rounds in turn, load {report['load']:.1f} on "
        f"{report['environment']['cpu_count']} CPUs; saved: without parameters; `{report['command']}`."
    )
    lines = [
        [
            row["variant"],
            f"{row['saved_bytes'] / MIB:.1f}",
            f"{row['peak_bytes'] / MIB:.1f}",
            f"{row['median_us'] / 1e3:.0f} ({row['q25_us'] / 1e3:.0f} – {row['q75_us'] / 1e3:.0f})",
            f"{row['median_us'] / median[STOCK]:.2f}",
        ]
        for row in rows
    ]
    columns = ["variant", "saved for backward, MiB", "peak of a step, MiB", "ms (quartiles)", f"/ {STOCK}"]
    return Table("LoRA on experts", note, columns, lines)


@click.command(help=__doc__)
@click.option("--seconds", type=float, default=40.0, show_default=True, help="For the times.")
def main(seconds: float) -> None:
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    report = {
        "command": "python -m benchmarks.experts",
        "case": asdict(CASE),
        "load": load,
        "environment": describe("cpu"),
        "rows": measure(CASE, seconds),
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(results_table(report).to_markdown())


if __name__ == "__main__":
    main()
