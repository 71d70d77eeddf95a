"""`fastlora tune`: times all backends, and configurations of the Triton kernels, on this GPU and keeps what wins."""

import datetime
import shlex
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import click

from fastlora.cli.progress import progress
from fastlora.errors import CommandError, first_line
from fastlora.outputs import reported_write_errors

PRESET_HELP = "headline: 4096 x 4096 at R 16 and 64, large and small M; llama8b: its projections."


@click.command()
@click.option(
    "--preset", default="headline", type=click.Choice(("headline", "llama8b")), show_default=True, help=PRESET_HELP
)
@click.option("--case", "cases", multiple=True, metavar="M,N,K,R[,P[,DTYPE]]", help="These layers (bfloat16).")
@click.option("--seconds", default=20.0, type=click.FloatRange(0), show_default=True, help="Search budget of a kernel.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), help="Keep them in this folder, not your cache's."
)
@click.option("--dry-run", is_flag=True, help="Measure and print, but keep nothing.")
@click.option("--show", is_flag=True, help="Print what was kept earlier for this GPU, and stop.")
def tune(preset: str, cases: tuple[str, ...], seconds: float, output: Path | None, dry_run: bool, show: bool) -> None:
    """Time all backends and tune the Triton kernels on this GPU; the choice serves every later run of this user."""
    import torch

    from fastlora.backends import tuning

    if not torch.cuda.is_available():
        raise CommandError("tuning measures a GPU, and torch finds none here")
    name = torch.cuda.get_device_name()
    if show:
        _show(tuning, name, output)
        return
    failures = []
    shipped = tuning.load_choices(name, tuning.SHIPPED) if output is None else ()
    chosen = _cases(preset, cases)
    with progress("case", len(chosen)) as shown:
        for case in chosen:
            shown.begin(case.label)
            found, stays, failed = _tune(case, seconds, shipped, shown.say)
            failures += failed
            if not dry_run and (found or stays):  # after each case: what ends the search early takes none of them back
                with reported_write_errors(tuning.cache_file(name, output)):
                    path = tuning.save_choices(name, found, stays, output)
    if not dry_run and len(failures) < len(chosen) * len(tuning.DIRECTIONS):
        click.echo(f"wrote {path}")
    if failures:
        raise CommandError(f"{len(failures)} not tuned: {failures[0]}")


def _show(tuning, name: str, directory: Path | None) -> None:
    choices = tuning.load_choices(name, directory)
    click.echo(f"{tuning.cache_file(name, directory)}: {len(choices)} choices for {name}")
    for key, (backend, config) in choices.items():
        click.echo(f"{key}: {backend or 'the default backend'}" + (f", {config}" if config else ""))


def _cases(preset: str, cases: tuple[str, ...]) -> list:
    from fastlora.bench.cases import LLAMA_8B, LayerCase
    from fastlora.cli.bench import parse_case

    if cases:
        return [parse_case(text, "bfloat16") for text in cases]
    if preset == "llama8b":
        return [LayerCase(m, n, k, 16) for n, k in LLAMA_8B for m in (16, 512, 2048, 8192)]
    return [LayerCase(m, 4096, 4096, r) for r in (16, 64) for m in (8192, 512)]


def _tune(
    case, seconds: float, shipped: Collection[str], say: Callable[[str], None]
) -> tuple[dict[str, dict], list[str], list[str]]:
    """Both directions of a case: shape class -> what to keep, where something beat the default or the table, or where
    these beat what is ``shipped``; the classes where nothing did; and why a direction could not be tuned."""
    import torch

    from fastlora import __version__
    from fastlora.backends.tuning import DIRECTIONS, shape_class
    from fastlora.bench.contest import compare_backends

    device = torch.device("cuda", torch.cuda.current_device())
    found, stays, failed = {}, [], []
    for direction in DIRECTIONS:
        key = shape_class(direction, case.m, case.n, case.k, case.r, case.torch_dtype, case.dropout > 0)
        choice = None
        try:
            choice = _tune_triton(case, direction, device, seconds, say)
        except RuntimeError as error:  # Triton's kernels do not run; the others may
            failed.append(first_line(error))
            say(failed[-1])
        contest = compare_backends(case, direction, device, choice and choice.best.config)
        say(f"{case.label} {direction}: {_verdict(contest)}")
        beats_table = choice is not None and choice.best.config != choice.table.config
        if not beats_table and contest.winner == contest.default and key not in shipped:
            stays.append(key)
            continue
        found[key] = {
            "backend": contest.winner,
            "config": choice.best.config if choice else None,
            "median_us": {each.backend: each.median_us for each in contest.entrants},
            "table_us": choice.table.median_us if choice else None,
            "measured_at": case.label,
            "fastlora": __version__,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["fastlora", *sys.argv[1:]]),
        }
    return found, stays, failed


def _tune_triton(case, direction: str, device, seconds: float, say: Callable[[str], None]):
    """The best configuration of Triton's kernels, a tuner.Choice; None where they cannot serve the case."""
    from fastlora.backends.target import target_of
    from fastlora.bench.contest import describe
    from fastlora.bench.tuner import tune_case
    from fastlora.selection import backend_module, why_unsupported

    reason = why_unsupported("triton", describe(case, direction, device))
    if reason is not None:
        say(f"{case.label} {direction}: {reason}")
        return None
    choice = tune_case(case, direction, target_of(device), backend_module("triton"), seconds)
    kept = choice.best.config != choice.table.config
    verdict = f"{choice.gain:.1%} faster: {choice.best.config}" if kept else "the table's choice stays"
    say(
        f"{case.label} {direction}: table {choice.table.median_us:.1f} µs, best {choice.best.median_us:.1f} µs "
        f"of {choice.tried} ({choice.failed} did not run, or not right): {verdict}"
    )
    return choice


def _verdict(contest) -> str:
    """Each backend's time, or why it has none, and who serves such calls from now on."""
    times = (f"{each.backend} {each.median_us:.1f} µs" for each in contest.entrants if each.median_us is not None)
    others = (f"{each.backend} none ({each.error})" for each in contest.entrants if each.median_us is None)
    outcome = "as before" if contest.winner == contest.default else f"instead of {contest.default}"
    return f"{', '.join((*times, *others))}: {contest.winner} serves it, {outcome}"
