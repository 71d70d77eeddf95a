"""`fastlora bench`: what a LoRA layer costs on this machine, against what one would otherwise use."""

import importlib.util
import shlex
import sys
from pathlib import Path

import click

from fastlora.bench.names import PRESETS, SECTIONS
from fastlora.cli.errors import CommandError, first_line
from fastlora.cli.files import check_writable, reported_write_errors

REQUIRED = ("tqdm", "matplotlib")
CASE = "M,N,K,R[,P[,DTYPE]]"


@click.command()
@click.option("--preset", default="quick", type=click.Choice(PRESETS), show_default=True, help="Layers to measure.")
@click.option("--case", "cases", multiple=True, metavar=CASE, help="These layers instead; may be repeated.")
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
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"bench needs {', '.join(missing)}: pip install 'fastlora[finetune]'")
    check_writable(output)
    if claims:
        _run_claims(output, device, steps)
        return
    report = _load(source) if source else _measure(preset, cases, sections, wanted, skip, _device(device), seconds)
    _write(report, output)


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


def parse_case(text: str):
    """ "M,N,K,R[,dropout[,dtype]]" as a LayerCase.

    Raises:
        CommandError: it is not one.
    """
    from fastlora.bench.cases import LayerCase

    parts = text.split(",")
    try:
        sizes = [int(part) for part in parts[:4]]
        dropout = float(parts[4]) if len(parts) > 4 else 0.0
        return LayerCase(*sizes, dropout, *(parts[5:] or ["float32"]))
    except (ValueError, TypeError) as error:
        raise CommandError(f"--case {text!r} is not {CASE}: {first_line(error)}") from error


def _run_claims(output: Path, device: str | None, steps: int) -> None:
    from fastlora.cli.claims import claims_tables, measure_claims, write_claims
    from fastlora.cli.training.settings import Settings

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


def _measure(preset, cases, sections, wanted, skip, device, seconds) -> dict:
    from tqdm import tqdm

    from fastlora.bench.correctness import WrongResult
    from fastlora.bench.peers import ORDINARY, find_peer
    from fastlora.bench.run import BenchOptions, run_bench, steps_of

    try:
        peers = tuple(dict.fromkeys((*ORDINARY, *map(find_peer, wanted))))
    except ValueError as error:
        raise CommandError(first_line(error)) from error
    for name in skip:
        if name not in (peer.name for peer in peers):
            raise CommandError(f"--skip {name}: no such peer; --list-peers names them")
    with tqdm(unit="part", file=sys.stderr) as bar:

        def advance(label: str) -> None:
            bar.set_description(label)
            bar.update()

        options = BenchOptions(
            preset="cases" if cases else preset,
            device=device,
            sections=sections or (("layer",) if cases else SECTIONS),
            seconds=seconds,
            peers=tuple(peer for peer in peers if peer.name not in skip),
            cases=tuple(parse_case(text) for text in cases) if cases else None,
            command=_command(),
            on_progress=advance,
        )
        bar.total = steps_of(options)
        try:
            return run_bench(options)
        except WrongResult as error:
            raise CommandError(f"nothing was timed, because it is wrong: {first_line(error)}") from error


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
