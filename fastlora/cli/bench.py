"""`fastlora bench`: what a LoRA layer costs on this machine, against what one would otherwise use."""

import shlex
import sys
from pathlib import Path

import click
import torch
from tqdm import tqdm

from fastlora.bench.cases import PRESETS, LayerCase
from fastlora.bench.correctness import WrongResult
from fastlora.bench.peers import ON_REQUEST, ORDINARY, find_peer
from fastlora.bench.run import SECTIONS, BenchOptions, run_bench, steps_of
from fastlora.cli.errors import CommandError
from fastlora.cli.files import check_writable, reported_write_errors


def parse_case(text: str) -> LayerCase:
    """ "M,N,K,R[,dropout[,dtype]]" as a case.

    Raises:
        CommandError: it is not one.
    """
    parts = text.split(",")
    try:
        sizes = [int(part) for part in parts[:4]]
        dropout = float(parts[4]) if len(parts) > 4 else 0.0
        dtype = parts[5] if len(parts) > 5 else "float32"
        return LayerCase(*sizes, dropout, dtype)
    except (ValueError, TypeError) as error:
        raise CommandError(f"--case {text!r} is not M,N,K,R[,dropout[,dtype]]: {error}") from error


@click.command(context_settings={"show_default": True})
@click.option("--preset", default="quick", type=click.Choice(PRESETS), help="Which layers to measure.")
@click.option(
    "--case", "cases", multiple=True, metavar="M,N,K,R[,P[,DTYPE]]", help="These layers instead (repeatable)."
)
@click.option("--only", "sections", multiple=True, type=click.Choice(SECTIONS), help="These sections (repeatable).")
@click.option(
    "--peer", "requested", multiple=True, metavar="NAME", help="Also a real package, or your module:function."
)
@click.option("--skip", multiple=True, metavar="NAME", help="Leave a peer out (repeatable).")
@click.option("--device", default=None, type=click.Choice(("cpu", "cuda")), help="Where; a GPU if there is one.")
@click.option("--seconds", default=3.0, type=click.FloatRange(min=0.0), help="Timing budget of each case.")
@click.option("--output", default="fastlora-bench", type=click.Path(file_okay=False, path_type=Path), help="Directory.")
@click.option(
    "--from", "source", type=click.Path(path_type=Path), help="Write the report of an earlier bench.json anew."
)
@click.option("--claims", is_flag=True, help="LoRA's own claims on the demo model, as a table, instead.")
@click.option("--list-peers", is_flag=True, help="Name the peers and stop.")
def bench(preset, cases, sections, requested, skip, device, seconds, output, source, claims, list_peers):
    """Measure a LoRA layer against the frozen layer and its peers, and write a report."""
    if list_peers:
        for peer in (*ORDINARY, *ON_REQUEST):
            click.echo(f"{peer.name:18} {peer.kind}{' (with --peer)' if peer in ON_REQUEST else ''}")
        return
    check_writable(output)
    if claims:
        _run_claims(output)
        return
    if source is not None:
        report = _load(source)
    else:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and not torch.cuda.is_available():
            raise CommandError("--device cuda: this machine has no CUDA device that torch can use")
        report = _measure(preset, cases, sections, requested, skip, device, seconds)
    _write(report, output)


def _run_claims(output: Path) -> None:
    from fastlora.bench.claims import measure_claims, write_claims

    with reported_write_errors(output):
        for path in write_claims(measure_claims(), output):
            click.echo(f"wrote {path}")


def _load(source: Path) -> dict:
    from fastlora.bench.report import load_report

    try:
        return load_report(source)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {source}: {error}") from error


def _measure(preset, cases, sections, requested, skip, device, seconds) -> dict:
    try:
        extra = tuple(find_peer(name) for name in requested)
    except ValueError as error:
        raise CommandError(str(error)) from error
    known = {peer.name for peer in (*ORDINARY, *extra)}
    unknown = [name for name in skip if name not in known]
    if unknown:
        raise CommandError(f"--skip {unknown[0]}: no such peer; choose from {', '.join(sorted(known))}")
    peers = tuple(dict.fromkeys(peer for peer in (*ORDINARY, *extra) if peer.name not in skip))
    with tqdm(unit="part", file=sys.stderr) as bar:

        def advance(label: str) -> None:
            bar.set_description(label)
            bar.update()

        options = BenchOptions(
            preset="cases" if cases else preset,
            device=device,
            sections=sections or (("layer",) if cases else SECTIONS),
            seconds=seconds,
            peers=peers,
            cases=tuple(parse_case(text) for text in cases) if cases else None,
            command=shlex.join(["fastlora", *sys.argv[1:]]),
            on_progress=advance,
        )
        bar.total = steps_of(options)
        try:
            return run_bench(options)
        except WrongResult as error:
            raise CommandError(f"not timed, because it is wrong: {error}") from error


def _write(report: dict, output: Path) -> None:
    from fastlora.bench.report import write_report
    from fastlora.bench.tables import host_table, ratio_table

    with reported_write_errors(output):
        files = write_report(report, output)
    if report["layer"]:
        click.echo(ratio_table(report["layer"], "step").to_markdown())
    if report["host"]:
        click.echo(host_table(report["host"]).to_markdown())
    for name, reasons in report["missing"].items():
        click.echo(f"not measured: {name}: {'; '.join(reasons)}")
    for path in files:
        click.echo(f"wrote {path}")
