"""`fastlora tune`: times all backends, and configurations of the Triton kernels, on this GPU and keeps what wins; over
a packed base weight the two ways to decode it as well."""

import datetime
import shlex
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path

import click

from fastlora.cli.progress import progress
from fastlora.errors import CommandError, first_line
from fastlora.finetune.settings import BASE_QUANTS
from fastlora.outputs import reported_write_errors

PRESET_HELP = "headline: 4096 x 4096 at R 16 and 64, large and small M; llama8b: its projections."


@click.command()
@click.option(
    "--preset", default="headline", type=click.Choice(("headline", "llama8b")), show_default=True, help=PRESET_HELP
)
@click.option("--case", "cases", multiple=True, metavar="M,N,K,R[,P[,DTYPE]]", help="These layers (bfloat16).")
@click.option(
    "--base-quant", type=click.Choice(BASE_QUANTS), help="Over base weights in this format, and how to decode them."
)
@click.option("--seconds", default=20.0, type=click.FloatRange(0), show_default=True, help="Search budget of a kernel.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), help="Keep them in this folder, not your cache's."
)
@click.option("--dry-run", is_flag=True, help="Measure and print, but keep nothing.")
@click.option("--show", is_flag=True, help="Print what was kept earlier for this GPU, and stop.")
def tune(
    preset: str, cases: tuple[str, ...], base_quant: str | None, seconds: float, output: Path | None, dry_run: bool,
    show: bool,
) -> None:  # fmt: skip
    """Time all backends and tune the Triton kernels on this GPU; the choice serves every later run of this user."""
    import torch

    from fastlora.backends import tuning

    if not torch.cuda.is_available():
        raise CommandError("tuning measures a GPU, and torch finds none here")
    name = torch.cuda.get_device_name()
    if show:
        _show(tuning, name, output)
        return
    if base_quant:
        from fastlora.finetune.quantise import require_library

        require_library(base_quant)
    failures = []
    shipped = tuning.load_choices(name, tuning.SHIPPED) if output is None else ()
    chosen = _cases(preset, cases, base_quant)
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
    for key, (backend, config, in_loop) in choices.items():
        ways = "".join(f", {name} decodes {_way(found)}" for name, found in in_loop.items())
        click.echo(f"{key}: {backend or 'the default backend'}" + (f", {config}" if config else "") + ways)


def _way(in_loop: bool) -> str:
    return "in the loop" if in_loop else "once"


def _cases(preset: str, cases: tuple[str, ...], base_quant: str | None) -> list:
    from fastlora.bench.cases import LLAMA_8B, LayerCase, PackedCase
    from fastlora.cli.bench import parse_case

    if cases:
        chosen = [parse_case(text, "bfloat16") for text in cases]
    elif preset == "llama8b":
        chosen = [LayerCase(m, n, k, 16) for n, k in LLAMA_8B for m in (16, 512, 2048, 8192)]
    else:
        few = (64,) if base_quant else ()  # where the ways to decode differ
        chosen = [LayerCase(m, 4096, 4096, r) for r in (16, 64) for m in (8192, 512, *few)]
    return [PackedCase(**asdict(case), base=base_quant) for case in chosen] if base_quant else chosen


def _tune(
    case, seconds: float, shipped: Collection[str], say: Callable[[str], None]
) -> tuple[dict[str, dict], list[str], list[str]]:
    """Both directions of a case: shape class -> what to keep, where something beat the default or the table, or where
    these beat what is ``shipped``; the classes where nothing did; and why a direction could not be tuned."""
    import torch

    from fastlora import __version__
    from fastlora.backends.tuning import DIRECTIONS, shape_class
    from fastlora.bench.cases import PackedCase

    base = case.base if isinstance(case, PackedCase) else None
    device = torch.device("cuda", torch.cuda.current_device())
    found, stays, failed = {}, [], []
    for direction in DIRECTIONS:
        key = shape_class(direction, case.m, case.n, case.k, case.r, case.torch_dtype, case.dropout > 0, base)
        changes, measured = (_tune_packed if base else _tune_dense)(case, direction, device, seconds, say, failed)
        if not changes and key not in shipped:
            stays.append(key)
            continue
        found[key] = {
            **measured,
            "measured_at": case.label,
            "fastlora": __version__,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["fastlora", *sys.argv[1:]]),
        }
    return found, stays, failed


def _tune_dense(
    case, direction: str, device, seconds: float, say: Callable[[str], None], failed: list[str]
) -> tuple[bool, dict]:
    """Whether something beat the default, and what to keep of it."""
    from fastlora.bench.contest import compare_backends, describe
    from fastlora.selection import backend_module, why_unsupported

    choice, reason = None, why_unsupported("triton", describe(case, direction, device))
    if reason is not None:
        say(f"{case.label} {direction}: {reason}")
    else:
        choice = _tune_triton(case, direction, device, seconds, say, failed, backend_module("triton"))
    contest = compare_backends(case, direction, device, choice and choice.best.config)
    say(f"{case.label} {direction}: {_verdict(contest)}")
    return _beats_table(choice) or contest.winner != contest.default, {
        "backend": contest.winner,
        "config": choice.best.config if choice else None,
        "median_us": {each.backend: each.median_us for each in contest.entrants},
        "table_us": choice.table.median_us if choice else None,
    }


def _tune_packed(
    case, direction: str, device, seconds: float, say: Callable[[str], None], failed: list[str]
) -> tuple[bool, dict]:
    """Likewise over a packed weight: Triton's kernels are tuned for each way to decode it that is possible, half of the
    time for each of two; then all ways of all backends are timed together."""
    from fastlora.bench.packed import sets_of
    from fastlora.bench.ways import compare_ways, describe_packed, possible_ways

    spec = describe_packed(case, direction, sets_of(case, device.type)[0], device)
    triton = {way.in_loop: module for way, module in possible_ways(spec)[0].items() if way.backend == "triton"}
    choices = {}
    for in_loop, module in triton.items():
        share = seconds / len(triton)
        choice = _tune_triton(case, direction, device, share, say, failed, module, in_loop)
        if choice is not None:
            choices[in_loop] = choice
    outcome = compare_ways(case, direction, device, {way: each.best.config for way, each in choices.items()})
    say(f"{case.label} {direction}: {_verdict_on_ways(outcome)}")
    choice = choices.get(outcome.in_loop.get("triton", False))
    other_way = any(in_loop != outcome.untuned[name] for name, in_loop in outcome.in_loop.items())
    return _beats_table(choice) or other_way or outcome.winner.backend != outcome.default.backend, {
        "backend": outcome.winner.backend,
        "config": choice.best.config if choice else None,
        "in_loop": outcome.in_loop,
        "median_us": {way.describe(): median for way, median in outcome.median_us.items()},
        "table_us": choice.table.median_us if choice else None,
    }


def _beats_table(choice) -> bool:
    return choice is not None and choice.best.config != choice.table.config


def _tune_triton(
    case, direction: str, device, seconds: float, say: Callable[[str], None], failed: list[str], module,
    in_loop: bool | None = None,
):  # fmt: skip
    """The best configuration of Triton's kernels, a tuner.Choice; None where they do not run: the others may."""
    from fastlora.backends.target import target_of
    from fastlora.bench.tuner import tune_case

    way = {} if in_loop is None else {"in_loop": in_loop}
    try:
        choice = tune_case(case, direction, target_of(device), module, seconds, **way)
    except RuntimeError as error:
        failed.append(first_line(error))
        say(failed[-1])
        return None
    verdict = f"{choice.gain:.1%} faster: {choice.best.config}" if _beats_table(choice) else "the table's choice stays"
    label = f"{case.label} {direction}" + ("" if in_loop is None else f", decoded {_way(in_loop)}")
    say(
        f"{label}: table {choice.table.median_us:.1f} µs, best {choice.best.median_us:.1f} µs "
        f"of {choice.tried} ({choice.failed} did not run, or not right): {verdict}"
    )
    return choice


def _verdict_on_ways(outcome) -> str:
    """Likewise of each way to decode a packed weight."""
    times = (f"{way.describe()} {us:.1f} µs" for way, us in outcome.median_us.items() if us is not None)
    others = (f"{name} none ({error})" for name, error in outcome.errors.items())
    stays = outcome.winner == outcome.default
    served = "as before" if stays else f"instead of {outcome.default.describe()}"
    return f"{', '.join((*times, *others))}: {outcome.winner.describe()} serves it, {served}"


def _verdict(contest) -> str:
    """Each backend's time, or why it has none, and who serves such calls from now on."""
    times = (f"{each.backend} {each.median_us:.1f} µs" for each in contest.entrants if each.median_us is not None)
    others = (f"{each.backend} none ({each.error})" for each in contest.entrants if each.median_us is None)
    outcome = "as before" if contest.winner == contest.default else f"instead of {contest.default}"
    return f"{', '.join((*times, *others))}: {contest.winner} serves it, {outcome}"
