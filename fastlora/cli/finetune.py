"""`fastlora finetune`: the options, their validation, and what --resume takes from an earlier run."""

import importlib.util
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastlora.errors import CommandError
from fastlora.finetune.settings import BASE_QUANTS, DTYPES, PROJECTIONS, Settings

if TYPE_CHECKING:
    from fastlora.finetune.state import SavedState

REQUIRED = ("transformers", "tqdm", "matplotlib", "safetensors")
DEFAULTS = Settings()
CHANGEABLE = ("steps", "learning_rate", "eval_every", "measure_full")  # by --resume
SCHEDULED = ("steps", "learning_rate")


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
@click.option(
    "--text",
    multiple=True,
    metavar="FILE",
    help="What to train on, UTF-8; may be repeated. In .jsonl or .json files rows of {messages}, {prompt, completion} "
    "or {text}; any other file is one text.  [default: Python's help topics]",
)
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
@click.option("--dora", is_flag=True, help="DoRA: a magnitude trains for each output, beside A and B.")
@click.option("--dropout", type=FiniteFloat(min=0, max=1, max_open=True), default=DEFAULTS.dropout, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=DEFAULTS.steps, show_default=True)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=DEFAULTS.batch_size,
    show_default=True,
    help="Sequences at once.",
)
@click.option(
    "--grad-accum",
    type=click.IntRange(min=1),
    default=DEFAULTS.grad_accum,
    show_default=True,
    help="Batches a step, their gradients summed: the step of one large batch in the memory of a small one.",
)
@click.option(
    "--block-size",
    type=click.IntRange(min=2),
    default=DEFAULTS.block_size,
    show_default=True,
    help="Tokens in a sequence; longer rows are cut.",
)
@click.option(
    "--held-out",
    type=click.IntRange(min=1),
    default=DEFAULTS.held_out,
    show_default=True,
    help="Sequences kept out of training to measure the loss on, at most half.",
)
@click.option(
    "--eval-every",
    type=click.IntRange(min=0),
    default=DEFAULTS.eval_every,
    show_default=True,
    help="Steps between two held-out losses; 0: before and after alone.",
)
@click.option(
    "--learning-rate",
    type=FiniteFloat(min=0, min_open=True),
    default=DEFAULTS.learning_rate,
    show_default=True,
    help="The peak of the schedule.",
)
@click.option(
    "--base-quant",
    type=click.Choice(BASE_QUANTS),
    help="Quantise the base model's linear layers: nf4, fp4 (by bitsandbytes; QLoRA) or int8, float8 (by torchao).",
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default=DEFAULTS.dtype, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto takes a CUDA device where there is one.")
@click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), default=DEFAULTS.seed, show_default=True)
@click.option(
    "--prompt",
    help="What the sample continues.  [default: the start of a held-out sequence, or a line on Python]",
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
    help="Directory for the adapter, loss.png, report.json, the log of the steps and the state.",
)
@click.option("--log", type=click.Choice(["csv", "jsonl"]), default="csv", show_default=True, help="Format of the log.")
@click.option(
    "--save-every",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Steps between two saves of the state; 0: at the end, and when stopped.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the run in --output, with its settings; with --steps further than it was to go.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier run's files in --output; others stay.")
@click.option(
    "--measure-full", is_flag=True, help="Also take one step of full fine-tuning, to measure the memory it needs."
)
@click.pass_context
def finetune(
    ctx: click.Context, output: Path, log: str, save_every: int, resume: bool, overwrite: bool, **options: object
) -> int:
    """Fine-tune a language model with LoRA through fastlora's layers.

    The loss counts every token of a text, the completion of a prompt, and the assistant's turns of messages, as the
    model's chat template writes them. Texts follow each other with an end-of-sequence token between.

    The optimiser is AdamW without weight decay. Its schedule: a linear warm-up over the first tenth of the steps, then
    a cosine down to a tenth of the learning rate.

    Ctrl-C, SIGTERM and SIGHUP save the state; --resume goes on from there, bit for bit. With more --steps or another
    --learning-rate, the schedule is the new one's from there on. The exit code is 1 where the loss curves of --compare
    disagree or the merged model answers differently.

    For datasets by name, logging services (wandb, TensorBoard) or YAML: Trainer, TRL or axolotl, with one line of
    fastlora.integrations.peft.patch; its module's pages show how.
    """
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"finetune needs {', '.join(missing)}: pip install 'fastlora[finetune]'")
    if resume and overwrite:
        raise CommandError("--resume goes on with a run, --overwrite replaces it: choose one")
    if options["base_quant"] and options["measure_full"]:
        raise CommandError("--measure-full trains every weight, and quantised ones cannot train: leave one out")
    # The command's module is imported for `fastlora --help` too, which should not wait for torch.
    from fastlora.finetune.directory import check_output
    from fastlora.finetune.models import check_device
    from fastlora.finetune.runner import Runner
    from fastlora.finetune.state import SavedState

    settings = Settings(**{**options, "dtype": DTYPES[options["dtype"]]})
    check_output(output, resume, overwrite)
    saved = None
    if resume:
        saved = SavedState(output)
        settings = resumed_settings(ctx, settings, saved)
    settings = replace(settings, device=str(check_device(settings.device)))
    return Runner(settings, output, saved, click.echo, save_every, log).run()


def resumed_settings(ctx: click.Context, given: Settings, state: "SavedState") -> Settings:
    """The saved settings, with what the user typed of those that may change.

    Raises:
        CommandError: an option was given another value than the run was begun with; or a value that a run cannot go on
            with: fewer steps than are done, or another schedule in the middle of a comparison.
    """
    changed = {}
    for field in fields(Settings):
        typed = ctx.get_parameter_source(field.name) is click.core.ParameterSource.COMMANDLINE
        ours, theirs = getattr(given, field.name), getattr(state.settings, field.name)
        if not typed or ours == theirs or (field.name == "device" and ours == "auto"):
            continue
        option = "--" + field.name.replace("_", "-")
        if field.name not in CHANGEABLE:
            raise CommandError(f"{option} is {ours!r}, but the run to resume was begun with {theirs!r}")
        changed[field.name] = ours
    settings = replace(state.settings, **changed)
    done = {name: record.step for name, record in state.records.items()}
    if settings.steps < max(done.values()):
        raise CommandError(f"--steps is {settings.steps}, but the run to resume has done {max(done.values())}")
    arms = 1 if settings.compare is None else 2
    if changed.keys() & set(SCHEDULED) and (len(done) < arms or len(set(done.values())) > 1):
        steps = ", ".join(f"{name} {step}" for name, step in done.items())
        raise CommandError(f"--compare needs one schedule: finish the run ({steps} steps) before you change it")
    return settings
