"""`fastlora bench`: what a LoRA layer costs on this machine, against what one would otherwise use."""

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import click

from fastlora.bench.names import PRESETS, SECTIONS
from fastlora.cli.progress import progress
from fastlora.errors import CommandError, first_line
from fastlora.outputs import directory_for_results, reported_write_errors

CASE = "M,N,K,R[,P[,DTYPE]]"
DEFAULT_DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
QUIET_SHARE = 0.95  # a thread that had less of its CPU was kept from it by others for as long as differences matter


@click.command()
@click.option("--preset", default="quick", type=click.Choice(PRESETS), show_default=True, help="Layers to measure.")
@click.option("--case", "cases", multiple=True, metavar=CASE, help="These layers instead (bfloat16 on a GPU).")
@click.option("--only", "sections", multiple=True, type=click.Choice(SECTIONS), help="These sections; may be repeated.")
@click.option("--peer", "wanted", multiple=True, metavar="NAME", help="Also a real package, or your module:function.")
@click.option("--skip", multiple=True, metavar="NAME", help="Leave a peer out; may be repeated.")
@click.option("--device", default=None, type=click.Choice(("cpu", "cuda")), help="[default: a GPU if there is one]")
@click.option("--seconds", default=3.0, type=click.FloatRange(0), show_default=True, help="Timing budget of a case.")
@click.option(
    "--output", default="fastlora-bench", type=click.Path(path_type=Path), show_default=True, help="Directory."
)
@click.option("--from", "source", type=click.Path(path_type=Path), help="Write the report of this bench.json anew.")
@click.option("--claims", is_flag=True, help="Measure LoRA's own claims on the demo model instead.")
@click.option("--steps", default=40, type=click.IntRange(1), show_default=True, help="Training steps of --claims.")
@click.option("--list-peers", is_flag=True, help="Name the peers and stop.")
def bench(preset, cases, sections, wanted, skip, device, seconds, output, source, claims, steps, list_peers):
    """Measure a LoRA layer against the frozen layer and its peers; write JSON, Markdown, HTML and pictures."""
    if list_peers:
        _list_peers()
        return
    with directory_for_results(output):
        if claims:
            _run_claims(output, device, steps)
        elif source:
            _write(_load(source), output)
        else:
            _measure(_options(preset, cases, sections, wanted, skip, _device(device), seconds), output)


def _command() -> str:
    return shlex.join(["fastlora", *sys.argv[1:]])


def _list_peers() -> None:
    from fastlora.bench.peers import ON_REQUEST, ORDINARY

    for peer in (*ORDINARY, *ON_REQUEST):
        click.echo(f"{peer.name:18} {peer.kind}{' (with --peer)' if peer in ON_REQUEST else ''}")


def _device(name: str | None) -> str:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: this machine has no CUDA device that torch can use")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def parse_case(text: str, dtype: str):
    """ "M,N,K,R[,dropout[,dtype]]" as a LayerCase; ``dtype`` where it names none.

    Raises:
        CommandError: it is not one.
    """
    from fastlora.bench.cases import LayerCase

    parts = text.split(",")
    if len(parts) > 6:
        raise CommandError(f"--case {text!r} is not {CASE}: {len(parts)} values")
    try:
        sizes = [int(part) for part in parts[:4]]
        dropout = float(parts[4]) if len(parts) > 4 else 0.0
        return LayerCase(*sizes, dropout, *(parts[5:] or [dtype]))
    except (ValueError, TypeError) as error:
        raise CommandError(f"--case {text!r} is not {CASE}: {first_line(error)}") from error


def _run_claims(output: Path, device: str | None, steps: int) -> None:
    from fastlora.bench.claims import claims_tables, measure_claims, write_claims
    from fastlora.finetune.settings import Settings

    found = measure_claims(Settings(device=_device(device), steps=steps), click.echo)
    found["command"] = _command()
    for table in claims_tables(found):
        click.echo(table.to_markdown())
    with reported_write_errors(output):
        for path in write_claims(found, output):
            click.echo(f"wrote {path}")


def _load(source: Path) -> dict:
    from fastlora.bench.report import load_report

    try:
        return load_report(source)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {source}: {first_line(error)}") from error


def _options(preset, cases, sections, wanted, skip, device, seconds):
    from fastlora.bench.peers import find_peer, preset_peers
    from fastlora.bench.run import BenchOptions

    if any(":" in name for name in wanted):
        sys.path.append(os.getcwd())  # where users keep modules of their own
    try:
        peers = tuple(dict.fromkeys((*preset_peers("quick" if cases else preset), *map(find_peer, wanted))))
    except ValueError as error:
        raise CommandError(first_line(error)) from error
    for name in skip:
        if name not in (peer.name for peer in peers):
            raise CommandError(f"--skip {name}: no such peer; --list-peers names them")
    return BenchOptions(
        preset="cases" if cases else preset,
        device=device,
        sections=sections or (("layer",) if cases else SECTIONS),
        seconds=seconds,
        peers=tuple(peer for peer in peers if peer.name not in skip),
        cases=tuple(parse_case(text, DEFAULT_DTYPES[device]) for text in cases) if cases else None,
        command=_command(),
    )


def _measure(options, output: Path) -> None:
    """Measures and writes the report, also of a run that ended early.

    Raises:
        CommandError: something of ours is wrong, or memory was too little.
        KeyboardInterrupt: Ctrl-C or SIGTERM asked to stop.
    """
    import torch

    from fastlora.bench.correctness import WrongResult
    from fastlora.bench.run import Unfinished, run_bench, steps_of
    from fastlora.finetune.interrupt import Interruption

    report = reason = None
    with Interruption(), progress("part", steps_of(options)) as shown:
        try:
            report = run_bench(replace(options, on_progress=shown.begin))
        except Unfinished as ended:
            report, reason = ended.report, ended.__cause__
        except (WrongResult, torch.OutOfMemoryError) as error:
            reason = error
    if report is not None:
        _write(report, output)
    if isinstance(reason, WrongResult):
        raise CommandError(f"not timed, because it is wrong: {first_line(reason)}") from reason
    if isinstance(reason, torch.OutOfMemoryError):
        raise CommandError(f"out of memory: {first_line(reason)}") from reason
    if reason is not None:
        raise reason


def _write(report: dict, output: Path) -> None:
    """Writes the files, and shows what matters most in 80 columns."""
    from fastlora.bench.report import write_report
    from fastlora.bench.run import lowest_cpu_share
    from fastlora.bench.tables import host_table, top_table
    from fastlora.tables import wrapped

    with reported_write_errors(output):
        files = write_report(report, output)
    if report["layer"]:
        click.echo(top_table(report["layer"], "step").to_text() + "\n")
    if report["host"]:
        click.echo(host_table(report["host"]).to_text() + "\n")
    for name, reasons in report["missing"].items():
        click.echo(wrapped(f"not measured: {name}: {'; '.join(reasons)}"))
    if "unfinished" in report:
        click.echo(wrapped(f"not finished: {report['unfinished']}"))
    share = lowest_cpu_share(report)
    if share is not None and share < QUIET_SHARE:
        click.echo(wrapped(
            f"WARNING: busy machine: the timed work had {share:.0%} of a CPU at worst, so that times are too long; end "
            "what else runs and measure again"
        ))  # fmt: skip
    click.echo(wrapped(f"wrote {', '.join(path.name for path in files)} in {output}"))
