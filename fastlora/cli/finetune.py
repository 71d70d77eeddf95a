"""`fastlora finetune`: the options, their validation, and what --resume takes from an interrupted run."""

import importlib.util
import math
from dataclasses import fields, replace
from pathlib import Path

import click

from fastlora.errors import CommandError
from fastlora.finetune.settings import DTYPES, PROJECTIONS, Settings

REQUIRED = ("transformers", "tqdm", "matplotlib", "safetensors")
DEFAULTS = Settings()


class FiniteFloat(click.FloatRange):
    """A float range without NaN and infinity, which pass click's own comparison."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not finite.", param, ctx)
        return number


def split_targets(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    """Names from a comma-separated list."""
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if not names:
        raise click.BadParameter("name at least one layer.", ctx, param)
    return names


@click.command()
@click.option("--model", help="Model directory, .gguf file or hub name.  [default: packaged SmolLM2-135M-Instruct]")
@click.option("--text", multiple=True, help="Text file to train on; may be repeated.  [default: Python's help topics]")
@click.option(
    "--targets",
    default=",".join(PROJECTIONS),
    callback=split_targets,
    show_default=True,
    help="Names of the linear layers to adapt, separated by commas; or all-linear.",
)
@click.option("--rank", type=click.IntRange(min=1), default=DEFAULTS.rank, show_default=True)
@click.option("--alpha", type=FiniteFloat(min=0, min_open=True), default=DEFAULTS.alpha, show_default=True)
@click.option("--rslora", is_flag=True, help="Scale by alpha / sqrt(rank) instead of alpha / rank.")
@click.option("--dropout", type=FiniteFloat(min=0, max=1, max_open=True), default=DEFAULTS.dropout, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=DEFAULTS.steps, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=DEFAULTS.batch_size, show_default=True)
@click.option(
    "--block-size",
    type=click.IntRange(min=2),
    default=DEFAULTS.block_size,
    show_default=True,
    help="Tokens in a sequence.",
)
@click.option(
    "--held-out",
    type=click.IntRange(min=1),
    default=DEFAULTS.held_out,
    show_default=True,
    help="Sequences kept out of training to measure the loss on.",
)
@click.option(
    "--learning-rate", type=FiniteFloat(min=0, min_open=True), default=DEFAULTS.learning_rate, show_default=True
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default=DEFAULTS.dtype, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto takes a CUDA device where there is one.")
@click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), default=DEFAULTS.seed, show_default=True)
@click.option(
    "--prompt",
    help="What the merged model has to continue.  [default: the start of a held-out sequence, or a line on Python]",
)
@click.option(
    "--via",
    type=click.Choice(["fastlora", "peft"]),
    default=DEFAULTS.via,
    show_default=True,
    help="fastlora: its own layers, injected. peft: a PEFT model whose layers fastlora patches.",
)
@click.option(
    "--compare", type=click.Choice(["peft"]), help="Repeat the run through PEFT and check that the losses agree."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("fastlora-output"),
    show_default=True,
    help="Directory for the adapter, loss.png and report.json.",
)
@click.option("--resume", is_flag=True, help="Go on with the interrupted run in --output, with its settings.")
@click.pass_context
def finetune(ctx: click.Context, output: Path, resume: bool, **options: object) -> int:
    """Fine-tune a language model with LoRA through fastlora's layers.

    Ctrl-C saves the state; --resume goes on from there, bit for bit. The exit code is 1 where the loss curves of
    --compare disagree or the merged model answers differently.
    """
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"finetune needs {', '.join(missing)}: pip install 'fastlora[finetune]'")
    # The command's module is imported for `fastlora --help` too, which should not wait for torch.
    from fastlora.finetune.models import check_device
    from fastlora.finetune.runner import Runner
    from fastlora.finetune.state import SavedState

    settings = Settings(**{**options, "dtype": DTYPES[options["dtype"]]})
    saved = None
    if resume:
        saved = SavedState(output)
        settings = resumed_settings(ctx, settings, saved.settings)
    settings = replace(settings, device=str(check_device(settings.device)))
    return Runner(settings, output, saved, click.echo).run()


def resumed_settings(ctx: click.Context, given: Settings, saved: Settings) -> Settings:
    """The saved settings, once what the user typed was found not to contradict them.

    Raises:
        CommandError: an option was given another value than the run was begun with.
    """
    for field in fields(Settings):
        typed = ctx.get_parameter_source(field.name) is click.core.ParameterSource.COMMANDLINE
        ours, theirs = getattr(given, field.name), getattr(saved, field.name)
        if typed and ours != theirs and not (field.name == "device" and ours == "auto"):
            option = "--" + field.name.replace("_", "-")
            raise CommandError(f"{option} is {ours!r}, but the run to resume was begun with {theirs!r}")
    return saved
