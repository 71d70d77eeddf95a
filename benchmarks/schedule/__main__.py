"""Makespan, stalls and DRAM bytes of a one-launch schedule, from a model and not from a measurement.

python -m benchmarks.schedule --m 8192 --n 4096 --k 4096 --r 16
python -m benchmarks.schedule --sweep                               writes results/schedule.{json,md}
python -m benchmarks.schedule --sweep --measured results/layer.json calibrated by measured times
python -m benchmarks.schedule --stages                              three stages or four in the CUDA kernels' pipeline
python -m benchmarks.schedule --decoding                            a packed weight decoded once or in the loop
python -m benchmarks.schedule --experts                             rows in segments: 8 to 128 experts, skewed loads
python -m benchmarks.schedule --projections                         q, k, v and gate, up in one launch
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import click

from benchmarks import RESULTS
from benchmarks.schedule import decoding as packed_weights
from benchmarks.schedule import projections as shared_input
from benchmarks.schedule import segments as rows_in_segments
from benchmarks.schedule.fit import as_launched, fit, read_measured
from benchmarks.schedule.machine import Machine
from benchmarks.schedule.model import LABEL, Problem, frozen_baseline, simulate
from benchmarks.schedule.queue_order import Schedule
from benchmarks.schedule.stages import as_text
from benchmarks.schedule.sweep import calibration_text, sweep, write_sweep


@click.command(context_settings={"show_default": True})
@click.option("--m", default=8192, type=click.IntRange(1), help="Tokens.")
@click.option("--n", default=4096, type=click.IntRange(1), help="Out features.")
@click.option("--k", default=4096, type=click.IntRange(1), help="In features.")
@click.option("--r", default=16, type=click.IntRange(1), help="Rank.")
@click.option("--dropout", is_flag=True, help="With dropout's mask generation.")
@click.option("--block-m", default=128, type=click.IntRange(1))
@click.option("--block-n", default=256, type=click.IntRange(1))
@click.option("--group-m", default=16, type=click.IntRange(1), help="Row blocks per group.")
@click.option("--fused/--separate", default=None, help="Whether column 0 makes S; by default as the kernels choose.")
@click.option(
    "--gradients-last/--gradients-between",
    default=None,
    help="Where gradient tiles are; by default as kernels choose.",
)
@click.option("--overlap/--serial", default=True, help="Whether a tile's store overlaps the next tile.")
@click.option("--cluster", default=2, type=click.IntRange(1), help="CTAs that share each load of the weight.")
@click.option(
    "--sweep", "run_sweep", is_flag=True, help="All shapes and schedules; writes schedule.json and schedule.md."
)
@click.option("--stages", is_flag=True, help="Print what a fourth stage of the pipeline would cost and gain.")
@click.option("--decoding", is_flag=True, help="Print where a packed weight is better decoded in its product's loop.")
@click.option("--experts", is_flag=True, help="Print which tile suits experts, by their number and load (minutes).")
@click.option("--projections", is_flag=True, help="q, k, v and gate, up in one launch; writes projection_schedule.*.")
@click.option("--measured", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="fastlora bench JSON.")
@click.option("--output", default=RESULTS, type=click.Path(file_okay=False, path_type=Path))
def main(
    m,
    n,
    k,
    r,
    dropout,
    run_sweep,
    stages,
    decoding,
    experts,
    projections,
    measured,
    output,
    fused,
    gradients_last,
    **queue,
):
    """The one-launch schedule's cost, by a discrete-event model."""
    if stages:
        click.echo(as_text())
        return
    if decoding:
        click.echo(packed_weights.as_text())
        return
    if experts:
        click.echo(rows_in_segments.as_text(rows_in_segments.sweep()))
        return
    if projections:
        found = shared_input.report(shared_input.sweep())
        (output / "projection_schedule.json").write_text(json.dumps(found, indent=1) + "\n")
        (output / "projection_schedule.md").write_text(shared_input.projection_table(found).to_markdown())
        return
    schedule, fitted, machine = Schedule(**queue), None, Machine()
    choices = {"fused": fused, "gradients_last": gradients_last}
    asked = {name: choice for name, choice in choices.items() if choice is not None}
    if measured:
        try:
            fitted = fit(read_measured(measured), schedule, machine)
        except (ValueError, KeyError) as error:
            raise click.UsageError(f"cannot calibrate from {measured}: {error}") from error
        machine = fitted.machine
    click.echo(calibration_text(fitted))
    if run_sweep:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise click.ClickException(f"cannot write to {output}: {error.strerror}") from error
        command = " ".join(["python -m benchmarks.schedule", *sys.argv[1:]])
        for path in write_sweep(output, sweep(machine), machine, fitted, command):
            click.echo(f"wrote {path}")
        return
    click.echo(f"{LABEL}: M {m}, N {n}, K {k}, R {r}{', dropout' if dropout else ''}")
    for backward in (False, True):
        problem = Problem(m, n, k, r, backward, dropout)
        schedule = replace(as_launched(problem, schedule, machine), **asked)
        try:
            found, base = simulate(problem, schedule, machine), frozen_baseline(problem, schedule, machine)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        click.echo(
            f"{'backward' if backward else 'forward'}, {schedule}:\n"
            f"  {found.makespan:.1f} µs, {found.makespan / base.makespan:.3f}x "
            f"the GEMM alone ({base.makespan:.1f} µs)  stalls {found.stall:.1f} µs/SM  "
            f"DRAM {found.dram_bytes / 2**30:.3f} GiB ({base.dram_bytes / 2**30:.3f} alone)  {found.tiles} tiles"
        )


if __name__ == "__main__":
    main()
