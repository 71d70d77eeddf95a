"""The paper's figures as PNG: heat maps of φ, the amplification, spectra of ΔW. Each title says what to see."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastlora.analysis.tables import NONE, number, shown, types_of

DPI = 90
SERIES = (
    ("weight_projection", "along W's own strongest directions", "s-"),
    ("delta_projection", "along ΔW's directions", "o-"),
    ("random_projection", "along random directions", "^:"),
)
WHAT_TO_SEE = "bright: the first i directions lie within the others' first j; dark: they have nothing in common"
_MOST_TYPES = 40  # a picture of more rows has more pixels than a PNG may have
_MOST_LABELS = 8  # points of a line that have room for their values
_LEAST_SHARE = 1e-6  # of the largest singular value; what is smaller is rounding, and would stretch the scale

Panel = tuple[str, Sequence[Sequence[float]]]


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def similarity_png(title: str, panels: Sequence[Panel], axes_names: tuple[str, str] = ("i", "j")) -> bytes:
    """Heat maps of φ(i, j), a row a panel: the whole table, and its lower triangle j ≤ i enlarged. Each row's title has
    φ(1, 1), whether the strongest directions are the same.

    Args:
        panels: label and table [r1][r2] of each row; NaN stays blank.
        axes_names: what i and j count.
    """
    figure = Figure(figsize=(10, 1.1 + 2.5 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 2, squeeze=False, width_ratios=(2, 1))
    figure.suptitle(f"{_plain(title)}\n{WHAT_TO_SEE}")
    for (whole, zoom), (label, table) in zip(grid, panels, strict=True):
        values = np.array(table, dtype=float)
        side = min(values.shape)
        square = values[:side, :side]
        triangle = np.where(np.tri(side, dtype=bool), square, np.nan)
        image = _heat_map(whole, values, f"{label}: φ(1, 1) = {number(values[0, 0], 2)}", axes_names)
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
    """A row a matrix type: at the left how large W is along three sets of directions, at the right the amplification
    factor, which is ‖ΔW‖ over the first of them. Logarithmic, one scale for all types.

    Args:
        rows: layers with "amplification", as `analyze_layers` returns them; what has no layer number shows its path.
        along: what stands side by side.
    """
    types, title = _first_types(rows, title)
    figure = Figure(figsize=(11, 1.2 + 2.3 * len(types)), layout="constrained")
    grid = figure.subplots(len(types), 2, squeeze=False, sharey="col")
    figure.suptitle(f"{_plain(title)}\nright, above 1: along ΔW's directions, ΔW is larger than W")
    for (norms, factors), (kind, members) in zip(grid, types.items(), strict=True):
        for field, label, style in SERIES:
            _points(norms, [row["amplification"][field] for row in members], style, label=label)
        of_factors = [row["amplification"]["factor"] for row in members]
        _points(factors, of_factors, "D-", color="tab:red", values_shown=len(members) <= _MOST_LABELS)
        factors.axhline(1.0, color="black", linewidth=1, linestyle="--")
        norms.set(title=f"{_plain(kind, 40)}: how large W is, ‖UᵀWV‖", yscale="log")
        factors.set(title=f"{_plain(kind, 40)}: ‖ΔW‖ ÷ ‖UᵀWV‖ is {_range_text(of_factors)}", yscale="log")
        for axes in (norms, factors):
            _name_layers(axes, members, along)
            axes.grid(axis="y", alpha=0.3)
            axes.minorticks_off()  # half of the time that drawing takes
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return png_bytes(figure)


def _points(axes, values: Sequence[float | None], style: str, *, values_shown: bool = False, **options) -> None:
    """Markers, joined, each with its value on request. A logarithmic axis shows what is above 0 alone."""
    heights = [value if value > 0 else np.nan for value in map(_finite, values)]
    axes.plot(range(len(values)), heights, style, markersize=5, **options)
    axes.margins(y=0.2)
    for place, value in enumerate(heights if values_shown else ()):
        if np.isfinite(value):
            offset = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": "small"}
            axes.annotate(number(value, 2), (place, value), **offset)


def _range_text(values: Sequence[float | None]) -> str:
    """The least and the greatest of the values that are numbers."""
    known = [value for value in map(_finite, values) if np.isfinite(value)]
    if not known:
        return NONE
    least, most = number(min(known), 2), number(max(known), 2)
    return least if least == most else f"{least} to {most}"


def spectra_png(title: str, rows: list[dict]) -> bytes:
    """A panel a matrix type: the singular values of ΔW, a line a layer, coloured from the first layer to the last. All
    panels have one scale; values below a millionth of the largest are left out."""
    types, title = _first_types(rows, title)
    columns = min(4, len(types))
    lines = -(-len(types) // columns)
    figure = Figure(figsize=(2 + 2.8 * columns, 1.0 + 2.6 * lines), layout="constrained")
    cells = list(figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes in cells[len(types) :]:
        axes.remove()
    figure.suptitle(
        f"{_plain(title)}\nhow strongly each of ΔW's directions acts: steep means that a lower rank would do"
    )
    largest = max((value for row in rows for value in row["spectrum"] if np.isfinite(value)), default=0.0)
    most_layers = max(map(len, types.values()))
    for place, (axes, (kind, members)) in enumerate(zip(cells, types.items(), strict=False)):
        for index, row in enumerate(members):
            values = np.array(row["spectrum"], dtype=float)
            values[~(values > _LEAST_SHARE * largest)] = np.nan
            colour = _colour(index, len(members))
            axes.plot(range(1, len(values) + 1), values, marker=".", linewidth=0.9, color=colour)
        axes.set(title=_plain(kind, 40), yscale="log" if largest > 0 else "linear")
        axes.grid(alpha=0.3)
        axes.minorticks_off()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if place % columns == 0:
            axes.set_ylabel("σᵢ of ΔW")
        if place + columns >= len(types):
            axes.set_xlabel("i")
            axes.tick_params(labelbottom=True)
    if most_layers > 1:
        scale = ScalarMappable(Normalize(1, most_layers), "viridis")
        figure.colorbar(scale, ax=cells[: len(types)], label="layer of its type", ticks=MaxNLocator(integer=True))
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
    return colormaps["viridis"](index / max(1, count - 1))


def _name_layers(axes, members: list[dict], along: str) -> None:
    names = [_plain(row["path"], 30) if row["layer"] is None else str(row["layer"]) for row in members]
    step = max(1, len(names) // 10)
    axes.set_xticks(range(0, len(names), step), names[::step])
    axes.set_xlabel(along)
