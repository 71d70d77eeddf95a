"""Draws the README's picture: kernel launches of a LoRA layer, and what it saves for backward.

``python -m benchmarks.readme_picture`` draws it from benchmarks/results; ``--check`` says whether the picture shows the
numbers that are there, which it carries with it as text.
"""

import json
from pathlib import Path

import click
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks import ROOT, saved_bytes
from fastlora.tables import MIB

TRAFFIC = ROOT / "benchmarks" / "results" / "traffic.json"
PICTURE = ROOT / "benchmarks" / "results" / "readme.png"
KEY = "fastlora numbers"  # of the text within the PNG
OURS, OTHERS = "tab:blue", "0.6"


def launches(traffic: dict) -> dict[str, tuple[int, int]]:
    """Order of work -> launches forward and backward, of the rows with dropout where an order knows it, for Hopper."""
    found = {}
    for row in traffic["rows"]:
        hopper = row["group"].startswith("Triton, sm_90") and "separate" not in row["order"]
        if hopper and (row["dropout"] or row["order"] not in found):
            found[row["order"]] = (row["forward"]["launches"], row["backward"]["launches"])
    return found


def numbers(traffic: dict, saved: dict) -> dict:
    """What the picture shows: launches by order of work; MiB saved by PEFT and by fastlora, by base, adapters, p."""
    kinds = {
        f"{row['base']} base, {row['adapters']} adapter, dropout {row['dropout']:g}": [
            round(row[name] / MIB, 1) for name in ("peft", "fastlora")
        ]
        for row in saved["rows"]
    }
    sizes = {name: saved["shape"][name] for name in "mnkr"}
    return {"launches": launches(traffic), "saved MiB": kinds, "saved at": sizes}


def draw(shown: dict) -> Figure:
    """The two panels; lower is better in both."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    for place, (name, (forward, backward)) in enumerate(shown["launches"].items()):
        colour = OURS if name.startswith("fastlora") else OTHERS
        left.barh(place, forward + backward, color=colour)
        left.text(forward + backward, place, f" {forward} + {backward}", va="center", fontsize="small")
    left.set_yticks(range(len(shown["launches"])), list(shown["launches"]), fontsize="small")
    left.set_xlim(right=1.2 * max(map(sum, shown["launches"].values())))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(title="Kernel launches of one layer", xlabel="forward + backward; lower is better")
    for place, values in enumerate(shown["saved MiB"].values()):
        for index, (who, value, colour) in enumerate(zip(("PEFT", "fastlora"), values, (OTHERS, OURS), strict=True)):
            height = place + 0.38 * (index - 0.5)
            right.barh(height, value, height=0.36, color=colour, label=who if place == 0 else None)
            right.text(value, height, f" {value:.1f}", va="center", fontsize="x-small")
    names = [name.replace(", dropout", "\ndropout") for name in shown["saved MiB"]]
    right.set_yticks(range(len(names)), names, fontsize="x-small")
    sizes = ", ".join(f"{name.upper()} {size}" for name, size in shown["saved at"].items())
    right.set(title="MiB that one layer saves for backward", xlabel=f"{sizes}; lower is better")
    right.set_xlim(right=1.12 * max(max(values) for values in shown["saved MiB"].values()))
    right.legend(fontsize="small", loc="upper right")
    for axes in (left, right):
        axes.invert_yaxis()
    return figure


def current() -> dict:
    """The numbers of the results as they are."""
    return numbers(json.loads(TRAFFIC.read_text()), json.loads(saved_bytes.RESULT.read_text()))


def carried(path: Path) -> dict | None:
    """The numbers that a picture was drawn from; None where it carries none."""
    from PIL import Image

    with Image.open(path) as image:
        text = image.info.get(KEY)
    return None if text is None else json.loads(text)


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Draw nothing; exit code 1 where the picture shows other numbers.")
def main(check: bool) -> None:
    text = json.dumps(current())
    if not check:
        draw(current()).savefig(PICTURE, dpi=100, metadata={KEY: text})
    elif carried(PICTURE) != json.loads(text):
        raise click.ClickException(f"{PICTURE.relative_to(ROOT)} shows other numbers than benchmarks/results has")
    click.echo(f"{PICTURE.relative_to(ROOT)}: {'up to date' if check else 'drawn'}")


if __name__ == "__main__":
    main()
