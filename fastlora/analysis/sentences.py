"""An analysis for a terminal: one row a matrix type in 80 columns, and what it says in three sentences."""

from collections.abc import Callable

from fastlora.analysis.tables import last, mean_of, number, shown, types_of
from fastlora.tables import Table

_NAME = 16  # characters of a type in the table
_Value = Callable[[dict], float | None]


def narrow_table(rows: list[dict]) -> Table:
    """Means over the layers of each matrix type, of the columns that matter most."""
    columns: list[tuple[str, _Value]] = [("‖ΔW‖", _norm), ("eff. rank", _effective_rank)]
    if "amplification" in rows[0]:
        columns.append(("factor", _factor))
    if "similarity" in rows[0]:
        columns += [("cos ΔW", _cosine), ("φ_B", _shared_b), ("φ_A", _shared_a)]
    lines = []
    for kind, members in types_of(rows).items():
        ranks = [row["rank"] for row in members]
        r = str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}"
        cells = [shown(kind, _NAME), str(len(members)), r]
        lines.append(cells + [number(mean_of([value(row) for row in members])) for _, value in columns])
    return Table("Matrix types", "Means over their layers.", ["type", "layers", "r", *(n for n, _ in columns)], lines)


def sentences(rows: list[dict]) -> list[str]:
    """Three: how large ΔW is, how many directions it has, and what these do to W or share with another adapter. And a
    warning where a common start, not training, is what two adapters share."""
    norms = _by_type(rows, _norm)
    if not any(norms.values()):
        return [
            "The adapter changes nothing: every ΔW is 0, as before training.",
            "It therefore has no directions to count.",
            "Train it first, or name another adapter.",
        ]
    return [_size(norms), _directions(rows), _effect(rows), *_warning(rows)]


def _size(norms: dict[str, float]) -> str:
    most, least = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
    if len(norms) == 1:
        return f"The mean ‖ΔW‖ of {shown(most)} is {number(norms[most])}."
    return (
        f"ΔW is largest in {shown(most)}, with a mean norm of {number(norms[most])}, and smallest in {shown(least)}, "
        f"with {number(norms[least])}."
    )


def _directions(rows: list[dict]) -> str:
    ranks = [row["rank"] for row in rows]
    of = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    used = number(mean_of([_effective_rank(row) for row in rows]))
    by_type = _by_type(rows, _effective_rank)
    fewest = min(by_type, key=by_type.__getitem__)
    return (
        f"Of rank {of}, a layer's ΔW uses {used} directions on average (its effective rank), in {shown(fewest)} the "
        f"fewest, {number(by_type[fewest])}."
    )


def _effect(rows: list[dict]) -> str:
    parts = []
    if "amplification" in rows[0]:
        by_type = _by_type(rows, _factor)
        most = max(by_type, key=by_type.__getitem__, default=None)
        mean = number(mean_of([_factor(row) for row in rows]))
        where = f", most in {shown(most)}: {number(by_type[most])} times" if most is not None else ""
        parts.append(f"in its own directions ΔW is {mean} times what W has there{where}")
    if "similarity" in rows[0]:
        cosine, b, of_b, a, of_a = (
            number(mean_of([value(row) for row in rows]))
            for value in (_cosine, _shared_b, _chance_b, _shared_a, _chance_a)
        )
        parts.append(
            f"the two adapters' ΔW have a cosine of {cosine}; of their leading directions they share in "
            f"B φ = {b} ({of_b} by chance) and A φ = {a} ({of_a}); 1: the same, 0: orthogonal"
        )
    if not parts:
        return (
            "With --base MODEL this says which directions of W are amplified, with --against ADAPTER what two adapters "
            "share."
        )
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _warning(rows: list[dict]) -> list[str]:
    alike = [row for row in rows if "similarity" in row and row["similarity"]["same_start"]]
    if not alike:
        return []
    cosine = number(mean_of([row["similarity"]["rows_of_a"] for row in alike]))
    return [
        f"In {len(alike)} of {len(rows)} layers both adapters began with the same random A (its rows still correspond, "
        f"with a mean cosine of {cosine}): there φ_A says nothing of what they learned. Go by B and ΔW."
    ]


def _by_type(rows: list[dict], value: _Value) -> dict[str, float]:
    """The mean of each type that has one."""
    means = {kind: mean_of([value(row) for row in members]) for kind, members in types_of(rows).items()}
    return {kind: mean for kind, mean in means.items() if mean is not None}


def _norm(row: dict) -> float:
    return row["delta_norm"]


def _effective_rank(row: dict) -> float:
    return row["effective_rank"]


def _factor(row: dict) -> float | None:
    return row["amplification"]["factor"]


def _cosine(row: dict) -> float | None:
    return row["similarity"]["delta_cosine"]


def _shared_a(row: dict) -> float | None:
    return last(row["similarity"]["a"])


def _shared_b(row: dict) -> float | None:
    return last(row["similarity"]["b"])


def _chance_a(row: dict) -> float | None:
    return last(row["similarity"]["random"])


def _chance_b(row: dict) -> float | None:
    return last(row["similarity"]["random_b"])
