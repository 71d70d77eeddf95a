"""`fastlora analyze`: what a trained adapter does, layer by layer, as tables, JSON and pictures."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import click

from fastlora.errors import CommandError, first_line
from fastlora.outputs import check_writable, staged

REQUIRED = ("tqdm", "matplotlib")
FORMAT = "fastlora-analysis-1"
PACKAGED = "packaged"
_SHOWN = 4


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "--base",
    metavar="MODEL",
    help=f"The frozen model: directory, .gguf file, hub name, or '{PACKAGED}' for SmolLM2-135M-Instruct. "
    "Adds the amplification of its directions.",
)
@click.option(
    "--against", type=click.Path(path_type=Path), help="A second adapter on the same layers: adds what they share."
)
@click.option("--modules", help="Only these layers: names or ends of their paths, separated by commas.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("fastlora-analysis"),
    show_default=True,
    help="Directory for analysis.json, analysis.md and the pictures.",
)
def analyze(adapter: Path, base: str | None, against: Path | None, modules: str | None, output: Path) -> None:
    """Say what an adapter learned: spectra and effective ranks of ΔW; with a base model, which directions it amplifies;
    with a second adapter, which directions they share. Matrix types are shown, every layer is in the files.

    ADAPTER is a directory in PEFT's format. ΔW is never formed.
    """
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"analyze needs {', '.join(missing)}: pip install 'fastlora[finetune]'")
    # The command's module is imported for `fastlora --help` too, which should not wait for torch.
    from tqdm import tqdm

    from fastlora.analysis.layers import analyze_layers

    layers = _chosen(_read(adapter), modules, adapter)
    others = None
    if against is not None:
        others = _chosen(_read(against), modules, against)
        _check_same_layers(layers, others, adapter, against)
    check_writable(output)
    weights = _weights(base, layers) if base else None
    with tqdm(total=len(layers), unit="layer", file=sys.stderr) as bar:
        try:
            rows = analyze_layers(layers, weights, others, bar.update)
        except (ValueError, TypeError) as error:
            raise CommandError(f"cannot analyse {adapter}: {first_line(error)}") from error
    report = {
        "format": FORMAT,
        "command": shlex.join(["fastlora", *sys.argv[1:]]),
        "adapter": str(adapter),
        "base": base,
        "against": None if against is None else str(against),
        "layers": rows,
    }
    _write(report, output)


def _read(directory: Path) -> dict:
    from fastlora.adapters.files import read_adapter

    try:
        return read_adapter(directory)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read adapter {directory}: {first_line(error)}") from error


def _chosen(layers: dict, modules: str | None, directory: Path) -> dict:
    """The layers that --modules names; all where it is not given."""
    if modules is None:
        return layers
    names = [name.strip() for name in modules.split(",") if name.strip()]
    chosen = {path: layer for path, layer in layers.items() if any(f".{path}".endswith(f".{name}") for name in names)}
    if not chosen:
        kinds = sorted({path.rpartition(".")[2] for path in layers})
        raise CommandError(f"--modules {modules}: {directory} has none of these; it has {', '.join(kinds)}")
    return chosen


def _check_same_layers(layers: dict, others: dict, first: Path, second: Path) -> None:
    """Raises CommandError where the two adapters are not on the same layers of the same shape; ranks may differ."""
    problems = []
    for names, directory in ((layers.keys() - others.keys(), second), (others.keys() - layers.keys(), first)):
        if names:
            problems.append(f"{directory} lacks {_some(sorted(names))}")
    different = [
        f"{path} (N×K {_shape(layer)} and {_shape(others[path])})"
        for path, layer in layers.items()
        if path in others and _shape(layer) != _shape(others[path])
    ]
    if different:
        problems.append(f"shapes differ: {_some(different)}")
    if problems:
        hint = "; --modules picks common ones" if layers.keys() & others.keys() and not different else ""
        raise CommandError(f"{first} and {second} do not adapt the same layers: {'; '.join(problems)}{hint}")


def _shape(layer) -> str:
    return f"{layer.lora_b.shape[0]}×{layer.lora_a.shape[1]}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _weights(name: str, layers: dict) -> dict:
    """The base model's frozen weights of the adapter's layers.

    Raises:
        CommandError: the model cannot be loaded, or does not have these layers in these shapes.
    """
    import torch

    from fastlora.conv1d import is_conv1d
    from fastlora.finetune.models import find_model, load_weights
    from fastlora.tables import wrapped

    source = find_model(name)
    click.echo(wrapped(source.announcement))
    modules = dict(load_weights(source, "auto", torch.device("cpu")).named_modules())
    weights = {path: getattr(modules.get(path), "weight", None) for path in layers}
    weights |= {path: weight.t() for path, weight in weights.items() if is_conv1d(modules.get(path))}
    absent = [path for path, weight in weights.items() if weight is None]
    if absent:
        raise CommandError(f"{source.label} has no layers {_some(absent)}: the adapter is of another model")
    different = [
        f"{path} (weight {'×'.join(map(str, weight.shape))}, adapter {_shape(layers[path])})"
        for path, weight in weights.items()
        if "×".join(map(str, weight.shape)) != _shape(layers[path])
    ]
    if different:
        raise CommandError(f"{source.label} does not fit the adapter: {_some(different)}")
    return {path: weight.detach() for path, weight in weights.items()}


def _write(report: dict, output: Path) -> None:
    from fastlora.analysis.layers import json_text
    from fastlora.analysis.plots import amplification_png, spectra_png
    from fastlora.analysis.sentences import narrow_table, sentences
    from fastlora.analysis.tables import layer_table, shown, type_table
    from fastlora.tables import wrapped

    rows = report["layers"]
    tables = [type_table(rows), layer_table(rows)]
    files = {"analysis.json": json_text(report).encode()}
    files["spectra.png"] = spectra_png(f"Singular values of ΔW: {_short(report['adapter'])}", rows)
    if report["base"] is not None:
        title = f"What W has where ΔW acts: {_short(report['adapter'])} on {_short(report['base'])}"
        files["amplification.png"] = amplification_png(title, rows)
    if report["against"] is not None:
        files |= _similarity_files(report)
    pictures = [f"![{name}]({name})" for name in files if name.endswith(".png")]
    text = [f"# What {shown(report['adapter'])} learned", "", f"`{shown(report['command'], 2000)}`", "", *pictures, ""]
    said = sentences(rows)
    files["analysis.md"] = "\n".join([*text, *said, "", *(table.to_markdown() for table in tables)]).encode()
    with staged(output) as stage:
        for name, data in files.items():
            (stage / name).write_bytes(data)
    click.echo(narrow_table(rows).to_text())
    click.echo()
    click.echo("\n".join(map(wrapped, said)))
    click.echo()
    click.echo(wrapped(f"Every layer: analysis.md in {shown(str(output))}, beside {', '.join(sorted(files))}"))


def _similarity_files(report: dict) -> dict[str, bytes]:
    """A picture a matrix type: φ of B and of A in the middle layer, and B's mean over the layers of one shape."""
    import numpy as np

    from fastlora.analysis.plots import similarity_png
    from fastlora.analysis.tables import middle, types_of

    files = {}
    for kind, members in types_of(report["layers"]).items():
        row = middle(members)
        tables = {key: np.array(row["similarity"][key]) for key in "ba"}
        panels = [(f"{key.upper()} of {row['path']}", table) for key, table in tables.items()]
        alike = [np.array(m["similarity"]["b"]) for m in members]
        alike = [table for table in alike if table.shape == tables["b"].shape]
        if len(alike) > 1:
            panels.append((f"B, mean over {len(alike)} layers", np.mean(alike, axis=0)))
        title = f"φ(i, j) of {kind}: {_short(report['adapter'])} (i) against {_short(report['against'])} (j)"
        name = re.sub(r"[^\w.-]", "_", kind)[:50]  # as many characters of four bytes as a file name may have
        while f"similarity_{name}.png" in files:
            name += "_"
        files[f"similarity_{name}.png"] = similarity_png(title, panels)
    return files


def _short(path: str) -> str:
    """The end of a path, which fits a picture's title."""
    return "/".join(Path(path).parts[-2:])
