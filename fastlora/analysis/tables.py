"""The layers of an analysis as tables, one row a layer and one row a matrix type."""

import math
from collections.abc import Callable
from statistics import mean

from fastlora.tables import Table

NONE = "–"


def number(value: float | None, digits: int = 3) -> str:
    """A value for people; a dash where there is none."""
    if value is None or math.isnan(value):
        return NONE
    return f"{value:.{digits}g}" if math.isfinite(value) else "∞"


def shown(name: str, most: int = 120) -> str:
    """A name of others in a table or a title: on one line, printable, its middle left out where it is long."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in name)
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


def types_of(rows: list[dict]) -> dict[str, list[dict]]:
    """The layers of each matrix type, in the order in which the types first occur."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["type"], []).append(row)
    return found


def middle(rows: list[dict]) -> dict:
    """The layer halfway through the model, as the paper shows the 48th of 96."""
    return rows[len(rows) // 2]


def mean_of(values: list[float | None]) -> float | None:
    """The mean of the values that are numbers."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return mean(known) if known else None


_Column = tuple[str, Callable[[dict], float | None]]

_SPECTRUM: list[_Column] = [
    ("‖ΔW‖", lambda row: row["delta_norm"]),
    ("σ₁", lambda row: row["spectrum"][0]),
    ("effective rank", lambda row: row["effective_rank"]),
]
_AMPLIFICATION: list[_Column] = [
    ("‖UᵀWV‖ of ΔW", lambda row: row["amplification"]["delta_projection"]),
    ("of W", lambda row: row["amplification"]["weight_projection"]),
    ("of random", lambda row: row["amplification"]["random_projection"]),
    ("‖W‖", lambda row: row["amplification"]["weight_norm"]),
    ("factor", lambda row: row["amplification"]["factor"]),
]
_SIMILARITY: list[_Column] = [
    ("cos ΔW", lambda row: row["similarity"]["delta_cosine"]),
    ("φ_B(1, 1)", lambda row: row["similarity"]["b"][0][0]),
    ("φ_B(r, r)", lambda row: last(row["similarity"]["b"])),
    ("by chance", lambda row: last(row["similarity"]["random_b"])),
    ("φ_A(1, 1)", lambda row: row["similarity"]["a"][0][0]),
    ("φ_A(r, r)", lambda row: last(row["similarity"]["a"])),
    ("by chance", lambda row: last(row["similarity"]["random"])),
    ("rows of A", lambda row: row["similarity"]["rows_of_a"]),
]


def layer_table(rows: list[dict]) -> Table:
    """Every layer."""
    columns = _columns(rows)
    lines = []
    for row in rows:
        place = NONE if row["layer"] is None else str(row["layer"])
        cells = [place, shown(row["type"]), "×".join(map(str, row["shape"])), str(row["rank"])]
        lines.append(cells + [number(value(row)) for _, value in columns])
    head = ["layer", "type", "N×K", "r", *(name for name, _ in columns)]
    return Table("Layers", _note(rows), head, lines)


def type_table(rows: list[dict]) -> Table:
    """Means over the layers of each matrix type."""
    columns = _columns(rows)
    lines = []
    for kind, members in types_of(rows).items():
        ranks = sorted({row["rank"] for row in members})
        cells = [shown(kind), str(len(members)), ", ".join(map(str, ranks))]
        lines.append(cells + [number(mean_of([value(row) for row in members])) for _, value in columns])
    head = ["type", "layers", "r", *(name for name, _ in columns)]
    return Table("Matrix types, means over their layers", _note(rows), head, lines)


def _columns(rows: list[dict]) -> list[_Column]:
    columns = list(_SPECTRUM)
    if "amplification" in rows[0]:
        columns += _AMPLIFICATION
    if "similarity" in rows[0]:
        columns += _SIMILARITY
    return columns


def _note(rows: list[dict]) -> str:
    notes = ["Frobenius norms; ΔW includes the scaling."]
    if "amplification" in rows[0]:
        notes.append("‖UᵀWV‖ with U, V from ΔW, from W, from a random matrix; factor is ‖ΔW‖ over the first.")
    if "similarity" in rows[0]:
        notes.append(
            "cos ΔW is the cosine of both updates; φ compares the leading r directions of both, r the smaller rank: 1 "
            "the same, 0 orthogonal; rows of A: the mean cosine of those that correspond, near 0 unless both began "
            "with the same random A, after which φ_A says nothing of training."
        )
    return " ".join(notes)


def last(table: list[list[float]]) -> float:
    """φ(r, r) at the smaller of the two ranks."""
    r = min(len(table), len(table[0]))
    return table[r - 1][r - 1]
