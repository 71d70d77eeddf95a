"""`fastlora convert`: an adapter file of another tool to an adapter directory in PEFT's format."""

import importlib.util
import json
from pathlib import Path

import click

from fastlora.cli.finetune import FiniteFloat
from fastlora.cli.merge import check_vacant
from fastlora.errors import CommandError, first_line
from fastlora.outputs import reported_write_errors


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--base",
    required=True,
    help="The model that the adapter is for, of which the configuration alone is read: model directory (of "
    "transformers, or one model of a diffusers pipeline), .gguf file, hub name, or 'packaged' (SmolLM2).",
)
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="Directory for the adapter; new or empty."
)
@click.option("--alpha", type=FiniteFloat(), help="For a file that holds none.  [default: the rank; loralib: refused]")
@click.option("--prefix", default="", help="Read only entries that begin with this: lora_unet_, lora_te1_, unet., ...")
def convert(file: Path, base: str, output: Path, alpha: float | None, prefix: str) -> None:
    """Read the LoRA in FILE, a safetensors file of kohya's or ComfyUI's, of diffusers or of loralib, and write it as
    PEFT keeps one.

    The factors keep their values and dtypes, each layer its rank and alpha. A file whose names do not all stand for
    linear layers of the model is refused with the list; the directory is written whole or not at all.
    """
    missing = [name for name in ("transformers", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"convert needs {', '.join(missing)}: pip install 'fastlora[finetune]'")
    check_vacant(output)
    # The command's module is imported for `fastlora --help` too, which should not wait for torch.
    from safetensors.torch import save

    from fastlora.adapters.config import plain_config
    from fastlora.adapters.files import CONFIG_NAME, PREFIX, WEIGHTS_NAME
    from fastlora.adapters.foreign import read_foreign
    from fastlora.conv1d import is_conv1d
    from fastlora.files import write_files
    from fastlora.finetune.models import find_model, load_structure

    model = load_structure(find_model(base))
    try:
        found = read_foreign(file, model, alpha, prefix)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot convert: {first_line(error)}") from error
    layers = found.layers
    config = plain_config(
        model,
        {path: layer.lora_a.shape[0] for path, layer in layers.items()},
        {path: layer.alpha for path, layer in layers.items()},
        rslora=found.rslora,
        transposed=any(is_conv1d(model.get_submodule(path)) for path in layers),
    )
    tensors = {f"{PREFIX}{path}.lora_A.weight": layer.lora_a.contiguous() for path, layer in layers.items()}
    tensors |= {f"{PREFIX}{path}.lora_B.weight": layer.lora_b.contiguous() for path, layer in layers.items()}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with reported_write_errors(output):
        write_files(output, {WEIGHTS_NAME: save(tensors, metadata={"format": "pt"}), CONFIG_NAME: text.encode()})
    left = f"; left out {found.skipped} entries that do not begin with {prefix}" if found.skipped else ""
    click.echo(f"Converted {len(layers)} layers; wrote {output}{left}")
