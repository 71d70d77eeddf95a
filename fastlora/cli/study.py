"""`fastlora study`: the LoRA paper's two budget questions on one's own model and text, and advice from the answers."""

import importlib.util
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import click

from fastlora.cli.finetune import REQUIRED, FiniteFloat, split_targets
from fastlora.errors import CommandError
from fastlora.finetune.settings import DTYPES
from fastlora.outputs import staged
from fastlora.study.plan import PRESETS, StudySettings
from fastlora.study.trend_plan import LEARNING_RATES, TREND_RANKS

DEFAULTS = StudySettings()


def _listed(values: tuple) -> str:
    return ",".join(f"{value:g}" for value in values)


INTERRUPTED = 130
SIZES = ("steps", "batch_size", "block_size", "held_out", "seeds")
PRESET_HELP = "; ".join(
    f"{name}: {size.steps} steps of {size.batch_size} x {size.block_size} tokens, {size.seeds} seeds"
    for name, size in PRESETS.items()
)


def split_ranks(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Distinct positive integers from a comma-separated list, in rising order."""
    if value is None:
        return ()
    try:
        ranks = sorted({int(part) for part in value.split(",") if part.strip()})
    except ValueError:
        ranks = []
    if not ranks or ranks[0] < 1:
        raise click.BadParameter(f"{value!r} is no list of ranks of at least 1.", ctx, param)
    return tuple(ranks)


def split_rates(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...]:
    """Distinct positive numbers from a comma-separated list, in rising order."""
    if value is None:
        return ()
    try:
        rates = sorted({float(part) for part in value.split(",") if part.strip()})
    except ValueError:
        rates = []
    if not rates or not 0 < rates[0] <= rates[-1] < math.inf:
        raise click.BadParameter(f"{value!r} is no list of learning rates above 0.", ctx, param)
    return tuple(rates)


def four_projections(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    """Four different names."""
    names = split_targets(ctx, param, value)
    if len(names) != 4 or len(set(names)) != 4:
        raise click.BadParameter("name four different layers: those that are Wq, Wk, Wv and Wo.", ctx, param)
    return names


@click.command()
@click.option("--preset", type=click.Choice(list(PRESETS)), default="quick", show_default=True, help=PRESET_HELP)
@click.option("--model", help="Model directory, .gguf file or hub name.  [default: packaged SmolLM2-135M-Instruct]")
@click.option("--text", multiple=True, help="Text file to train on; may be repeated.  [default: Python's help topics]")
@click.option(
    "--projections",
    default=",".join(DEFAULTS.projections),
    callback=four_projections,
    show_default=True,
    help="The names of the model's Wq, Wk, Wv and Wo.",
)
@click.option(
    "--ranks",
    callback=split_ranks,
    help=f"Ranks of the second experiment.  [default: {_listed(DEFAULTS.ranks)}; {_listed(TREND_RANKS)} with --trends]",
)
@click.option(
    "--budget",
    type=click.IntRange(min=1),
    help="Trainable parameters: those to spend in the first experiment, or to stay within with --suggest.  "
    "[default: a budget near the paper's that integer ranks meet well]",
)
@click.option("--seeds", type=click.IntRange(min=1), help="Runs of each configuration.  [default: the preset's]")
@click.option("--steps", type=click.IntRange(min=1), help="Training steps of a run.  [default: the preset's]")
@click.option("--batch-size", type=click.IntRange(min=1), help="[default: the preset's]")
@click.option("--block-size", type=click.IntRange(min=2), help="Tokens in a sequence.  [default: the preset's]")
@click.option("--held-out", type=click.IntRange(min=1), help="Sequences to measure on.  [default: the preset's]")
@click.option(
    "--learning-rate", type=FiniteFloat(min=0, min_open=True), default=DEFAULTS.learning_rate, show_default=True
)
@click.option(
    "--trends",
    is_flag=True,
    help="Instead of the two experiments: follow what adapters of Wq and Wv learn through their training, one of each "
    "rank and the largest from every seed, after 16, 64, 256, ... steps.",
)
@click.option(
    "--learning-rates",
    callback=split_rates,
    help="Candidates of --trends; the one with the lowest held-out loss is taken.  "
    f"[default: {_listed(LEARNING_RATES)}]",
)
@click.option("--alpha", type=FiniteFloat(min=0, min_open=True), default=DEFAULTS.alpha, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default=DEFAULTS.dtype, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto takes a CUDA device where there is one.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("fastlora-study"),
    show_default=True,
    help="Directory for the runs and the report. Processes that share it share the runs.",
)
@click.option("--suggest", is_flag=True, help="Train nothing: name a rank and targets from the runs in --output.")
def study(preset: str, device: str, output: Path, suggest: bool, trends: bool, dtype: str, **options: object) -> int:
    """Where to put a budget of trainable parameters, and which rank is enough: measured, on your model and text.

    (a) One budget spent on Wq, Wk, Wv, Wo, Wq+Wk, Wq+Wv and all four. (b) Several ranks on Wq, Wq+Wv and all four.
    Then what the adapters learned: similarity of their directions, amplification; with --trends how these grow. Each
    finished run is stored: the same command goes on after an interruption, and a second process with the same command
    takes its share.
    """
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"study needs {', '.join(missing)}: pip install 'fastlora[finetune]'")
    if suggest:
        _suggest(output, options["budget"])
        return 0
    if options["learning_rates"] and not trends:
        raise CommandError("--learning-rates are candidates of --trends; without it name one --learning-rate")
    options["ranks"] = options["ranks"] or (TREND_RANKS if trends else DEFAULTS.ranks)
    if trends:
        options["learning_rates"] = options["learning_rates"] or LEARNING_RATES
        if len(options["ranks"]) == 1:
            raise CommandError("--trends compares the two largest of --ranks: name at least two")
    sizes = {name: options[name] or getattr(PRESETS[preset], name) for name in SIZES}
    settings = replace(DEFAULTS, **{**options, **sizes, "dtype": DTYPES[dtype]})
    return _run(settings, device, output)


def _run(settings: StudySettings, device: str, output: Path) -> int:
    # The command's module is imported for `fastlora --help` too, which should not wait for torch.
    from fastlora.finetune.interrupt import Interrupted, Interruption
    from fastlora.finetune.models import check_device
    from fastlora.study.store import RunStore
    from fastlora.study.trainer import prepare

    store, trainer = RunStore(output), None
    with Interruption() as interruption:
        try:
            trainer = prepare(settings, check_device(device), store, interruption, click.echo)
            click.echo(_announcement(trainer))
            trainer.run_all(interruption, click.echo)
            _report(trainer)
        except Interrupted:
            interruption.caught()
            done = f"{len(store.finished(trainer.runs))} of {trainer.plan.count}" if trainer else "No"
            click.echo(f"Interrupted. {done} runs are stored in {output}. Go on with: {_command()}")
            return INTERRUPTED
    return 0


def _announcement(trainer) -> str:
    settings, runs = trainer.settings, trainer.runs
    tokens = settings.steps * settings.batch_size * settings.block_size
    return (
        f"{trainer.plan.count} runs of {settings.steps} steps, {tokens:,} tokens each; {len(trainer.blocks.held_out)} "
        f"blocks of {settings.block_size} held out; {trainer.plan.aim}; "
        f"{len(trainer.store.finished(runs))} runs are there already"
    )


def _command() -> str:
    return shlex.join(["fastlora", *sys.argv[1:]])


def _report(trainer) -> None:
    """Writes the report, unless another process has just done that, and shows its tables."""
    from fastlora.study.report import make_report, report_is_current, report_tables

    output = trainer.store.directory
    with trainer.store.lock("report", wait=True):
        report = report_is_current(trainer)
        if report is None:
            report, files = make_report(trainer, _command())
            with staged(output) as stage:
                for name, data in files.items():
                    (stage / name).write_bytes(data)
    for table in report_tables(report):
        click.echo(table.to_markdown())
    advice = "" if "trends" in report else f"; advice: fastlora study --suggest --output {output}"
    click.echo(f"Wrote the report and its pictures to {output}{advice}")


def _suggest(output: Path, budget: int | None) -> None:
    from fastlora.study.plan import default_budget
    from fastlora.study.results import summarize
    from fastlora.study.store import RunStore
    from fastlora.study.suggest import rank_by_loss, suggestion_lines

    store = RunStore(output)
    header = store.header()
    results = store.all_results()
    settings = header["settings"]
    limit = budget or settings["budget"] or default_budget(tuple(header["costs"]))
    tokens = settings["steps"] * settings["batch_size"] * settings["block_size"]
    source = f"{len(results)} runs of {tokens:,} tokens on {header['model']} in {output}"
    for line in suggestion_lines(rank_by_loss(summarize(results), limit), limit, source, settings):
        click.echo(line)
