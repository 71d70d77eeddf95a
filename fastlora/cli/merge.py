"""`fastlora merge`: a model and an adapter, both from files, to a plain model that transformers loads."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from fastlora.errors import CommandError, first_line
from fastlora.outputs import directory_for_results, reported_write_errors

REQUIRED = ("transformers", "safetensors")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
    "*processor_config.json",
)


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "--base",
    required=True,
    help="What the adapter was trained on: model directory, .gguf file, hub name, or 'packaged' (SmolLM2).",
)
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="Directory for the merged model; new or empty."
)
def merge(adapter: Path, base: str, output: Path) -> None:
    """Merge the adapter in the directory ADAPTER into its base model and write the result as a plain model.

    The weights keep the dtype that they are stored in. The tokenizer comes along: the adapter's, where there is one
    beside it, or else the base model's. The output directory appears when it is complete, or not at all.
    """
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"merge needs {', '.join(missing)}: pip install 'fastlora[finetune]'")
    check_vacant(output)
    # The command's module is imported for `fastlora --help` too, which should not wait for torch.
    from fastlora.adapters.files import read_config
    from fastlora.finetune.models import find_model, save_tokenizer

    source = find_model(base)
    try:
        config = read_config(adapter)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read the adapter {adapter}: {first_line(error)}") from error
    with complete_directory(output) as stage:
        model, layers = merged_model(adapter, config, source)
        model.save_pretrained(stage)
        if any((adapter / name).is_file() for name in _TOKENIZERS):
            copy_tokenizer(adapter, stage)
        elif source.gguf_file is None and source.local:
            copy_tokenizer(Path(source.location), stage)
        else:
            save_tokenizer(source, stage)
    click.echo(f"Merged {layers} layers; wrote {output}")


def merged_model(adapter: Path, config: dict, source):
    """The plain model, and how many layers were merged.

    Raises:
        CommandError: the base cannot be loaded, lacks weights that the adapter does not bring, or does not fit the
            adapter; or a merged weight is not finite.
    """
    import torch

    from fastlora.adapters.io import load_adapter
    from fastlora.finetune.models import load_for_task
    from fastlora.model import merge_and_unload

    model, drawn = load_for_task(source, config.get("task_type"), torch.device("cpu"))
    brought = config.get("modules_to_save") or []
    lacking = sorted(name for name in drawn if not set(name.split(".")) & set(brought))
    if lacking:
        raise CommandError(
            f"the base model has no weights for {', '.join(lacking[:5])}, nor has the adapter: they would be random"
        )
    try:
        layers = load_adapter(model, adapter)
        return merge_and_unload(model.eval(), safe=True), len(layers)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot merge {adapter}: {first_line(error)}") from error


def check_vacant(output: Path) -> None:
    """Nothing is overwritten: old shards beside new ones would be taken for parts of one model.

    Raises:
        CommandError: the output is there and is not an empty directory.
    """
    if output.is_dir():
        if any(output.iterdir()):
            raise CommandError(f"output directory {output} is not empty; name a new one")
    elif output.exists() or output.is_symlink():
        raise CommandError(f"output {output} is not a directory")


@contextmanager
def complete_directory(output: Path) -> Iterator[Path]:
    """A directory beside the output, which takes the output's place when the block succeeds.

    Raises:
        CommandError: something cannot be written; the output is as it was.
    """
    output = output.absolute()
    with directory_for_results(output.parent), reported_write_errors(output):
        stage = output.with_name(f".{output.name}.{os.getpid()}.partial")
        stage.mkdir()
        try:
            yield stage
            for path in stage.iterdir():
                if path.is_file():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
            os.rename(stage, output)  # over an empty directory, too, but over no other
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the files of a tokenizer and of processors as they are."""
    for path in {path for pattern in _TOKENIZER_FILES for path in source.glob(pattern)}:
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
