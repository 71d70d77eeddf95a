"""The paper's figures as PNG: heat maps of φ, bars of the amplification, spectra of ΔW."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastlora.analysis.tables import shown, types_of

DPI = 90
BARS = (("delta_projection", "of ΔW"), ("weight_projection", "of W"), ("random_projection", "of a random matrix"))
_MOST_TYPES = 40  # a picture of more rows has more pixels than a PNG may have
_FLOOR = 1e-12  # what a logarithmic axis shows instead of zero

Panel = tuple[str, Sequence[Sequence[float]]]


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def similarity_png(title: str, panels: Sequence[Panel], axes_names: tuple[str, str] = ("i", "j")) -> bytes:
    """Heat maps of φ(i, j), a row a panel: the whole table, and its lower triangle j ≤ i enlarged.

    Args:
        panels: label and table [r1][r2] of each row; NaN stays blank.
        axes_names: what i and j count.
    """
    figure = Figure(figsize=(10, 0.6 + 2.9 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 2, squeeze=False, width_ratios=(2, 1))
    figure.suptitle(_plain(title))
    for (whole, zoom), (label, table) in zip(grid, panels, strict=True):
        values = np.array(table, dtype=float)
        side = min(values.shape)
        square = values[:side, :side]
        triangle = np.where(np.tri(side, dtype=bool), square, np.nan)
        image = _heat_map(whole, values, label, axes_names)
        _heat_map(zoom, triangle, "lower triangle", axes_names)
        figure.colorbar(image, ax=[whole, zoom], label="φ", shrink=0.9)
    return png_bytes(figure)


def _heat_map(axes, values: np.ndarray, title: str, names: tuple[str, str]):
    rows, columns = values.shape
    image = axes.imshow(
        values,
        vmin=0,
        vmax=1,
        cmap="magma",
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, columns + 0.5, rows + 0.5, 0.5),
    )
    axes.set(title=_plain(title), ylabel=names[0], xlabel=names[1])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return image


def amplification_png(title: str, rows: list[dict], along: str = "layer") -> bytes:
    """A row a matrix type: bars of ‖UᵀWV‖ for every layer, and the amplification factor.

    Args:
        rows: layers with "amplification", as `analyze_layers` returns them; what has no layer number shows its path.
        along: what stands side by side.
    """
    types, title = _first_types(rows, title)
    figure = Figure(figsize=(11, 0.6 + 2.4 * len(types)), layout="constrained")
    grid = figure.subplots(len(types), 2, squeeze=False, width_ratios=(3, 2))
    figure.suptitle(_plain(title))
    for (norms, factors), (kind, members) in zip(grid, types.items(), strict=True):
        places = np.arange(len(members))
        for index, (field, label) in enumerate(BARS):
            heights = [np.maximum(_finite(row["amplification"][field]), _FLOOR) for row in members]
            norms.bar(places + 0.27 * (index - 1), heights, width=0.27, label=label)
        norms.set(title=_plain(kind), ylabel="‖UᵀWV‖", yscale="log")
        factors.bar(places, [_finite(row["amplification"]["factor"]) for row in members], color="tab:purple")
        factors.set(title=f"{_plain(kind)}: ‖ΔW‖ / ‖UᵀWV‖", ylabel="factor")
        for axes in (norms, factors):
            _name_layers(axes, members, along)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return png_bytes(figure)


def spectra_png(title: str, rows: list[dict]) -> bytes:
    """A panel a matrix type: the singular values of ΔW, a line a layer, coloured from the first layer to the last."""
    types, title = _first_types(rows, title)
    columns = min(4, len(types))
    lines = -(-len(types) // columns)
    figure = Figure(figsize=(1 + 3.2 * columns, 0.6 + 2.8 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flat
    figure.suptitle(_plain(title))
    for axes, (kind, members) in zip(grid, types.items(), strict=False):
        for index, row in enumerate(members):
            values = np.maximum(row["spectrum"], _FLOOR)
            colour = _colour(index, len(members))
            axes.plot(range(1, len(values) + 1), values, marker=".", linewidth=0.9, color=colour)
        axes.set(
            title=f"{_plain(kind)}: {len(members)} layers, dark to light", xlabel="i", ylabel="σᵢ of ΔW", yscale="log"
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in list(grid)[len(types) :]:
        axes.remove()
    return png_bytes(figure)


def _plain(text: str, most: int = 120) -> str:
    """Text of others, in which a dollar begins no formula."""
    return shown(text, most).replace("$", r"\$")


def _first_types(rows: list[dict], title: str) -> tuple[dict[str, list[dict]], str]:
    """The matrix types that a picture has room for, and a title that tells of the others."""
    types = types_of(rows)
    if len(types) <= _MOST_TYPES:
        return types, title
    return dict(list(types.items())[:_MOST_TYPES]), f"{title}, the first {_MOST_TYPES} of {len(types)} types"


def _finite(value: float | None) -> float:
    return value if value is not None and np.isfinite(value) else np.nan


def _colour(index: int, count: int) -> tuple:
    from matplotlib import colormaps

    return colormaps["viridis"](index / max(1, count - 1))


def _name_layers(axes, members: list[dict], along: str) -> None:
    names = [_plain(row["path"], 30) if row["layer"] is None else str(row["layer"]) for row in members]
    step = max(1, len(names) // 10)
    axes.set_xticks(range(0, len(names), step), names[::step])
    axes.set_xlabel(along)
