"""What the counters of count.py say: in passes over X and dY, and as tables.

A pass over a matrix is its size in bytes. A tiled product reads its left operand once for every column of tiles; so
many passes are its own, and the frozen layer's row, with the same tile, says how many. What a low-rank branch costs is
what a row reads beyond that.
"""

from dataclasses import dataclass

from fastlora.tables import Table

ELEMENT = 2  # bytes: every row is bf16
FROZEN = "frozen layer"
# Copies of X and dY that others make count as X and dY.
X_LIKE, DY_LIKE = ("X", "drop(X)"), ("dY", "scaled dY")
NAMED = ("X", "W0", "dY", "Y", "dX")
NARROW = {"A", "B", "S", "dS", "dA", "dB", "partial sums", "S again", "dS again", "fp32 dB", "fp32 dS"}  # R wide


@dataclass(frozen=True)
class Claims:
    """What a row does beyond the frozen layer's two products, in passes.

    forward_x: over X (or a copy of it) in the forward.
    backward_dy: over dY (or a copy of it) in the backward.
    backward_x: over X (or a copy of it) in the backward; the frozen layer reads none.
    wide_bytes: written to anything as large as Y or dX, but for the first writing of Y and of dX.
    """

    forward_x: float
    backward_dy: float
    backward_x: float
    wide_bytes: int


# Of all bytes that are read, and of those that a launch reads for the first time: the rest it finds in the last cache.
ALLOWED = {
    "read": Claims(forward_x=0.0, backward_dy=1.0, backward_x=1.0, wide_bytes=0),
    "read_distinct": Claims(forward_x=0.0, backward_dy=0.0, backward_x=1.0, wide_bytes=0),
}


def key_of(row: dict) -> tuple[str, str, float]:
    return row["group"], row["order"], row["dropout"]


def is_ours(row: dict) -> bool:
    return row["order"].startswith("fastlora")


def _read(direction: dict, names: tuple[str, ...], counter: str = "read") -> int:
    return sum(direction["tensors"][name][counter] for name in names if name in direction["tensors"])


def claims(row: dict, frozen: dict, shape: dict[str, int], counter: str = "read") -> Claims:
    """What a row does beyond ``frozen``, the frozen layer's row of the same tile; ``counter``: a key of ALLOWED."""
    m, n, k = shape["m"], shape["n"], shape["k"]
    forward, backward = row["forward"], row["backward"]
    wide = sum(
        tensor["written"]
        for direction in (forward, backward)
        for name, tensor in direction["tensors"].items()
        if name not in NARROW
    )
    return Claims(
        forward_x=(_read(forward, X_LIKE, counter) - _read(frozen["forward"], X_LIKE, counter)) / (m * k * ELEMENT),
        backward_dy=(_read(backward, DY_LIKE, counter) - _read(frozen["backward"], DY_LIKE, counter))
        / (m * n * ELEMENT),
        backward_x=_read(backward, X_LIKE, counter) / (m * k * ELEMENT),
        wide_bytes=wide - m * (n + k) * ELEMENT,
    )


def excess(row: dict, frozen: dict, shape: dict[str, int], counter: str = "read") -> dict[str, float]:
    """The claims that a row breaks, with what it does instead."""
    allowed = vars(ALLOWED[counter])
    return {what: value for what, value in vars(claims(row, frozen, shape, counter)).items() if value > allowed[what]}


def frozen_rows(table: dict) -> dict[str, dict]:
    """The frozen layer's row of every group."""
    return {row["group"]: row for row in table["rows"] if row["order"] == FROZEN}


# What rows of ours may break, by their label: (counter, claim), and why.
EXEMPT = {
    # S is made by tiles of its own, which read X (dY) once more; but this reading is not the launch's first.
    "separate shrink": {("read", "forward_x"), ("read", "backward_dy")},
    # Parts of tiles meet in fp32 memory.
    "2 parts": {("read", "wide_bytes"), ("read_distinct", "wide_bytes")},
}


def faults(table: dict) -> list[str]:
    """Rows of ours that break a claim they are held to."""
    frozen, found = frozen_rows(table), []
    for row in filter(is_ours, table["rows"]):
        exempt = set().union(*(what for label, what in EXEMPT.items() if label in row["order"]))
        for counter in ALLOWED:
            broken = excess(row, frozen[row["group"]], table["shape"], counter)
            found += [
                f"{key_of(row)}: {what} is {value:g} ({counter})"
                for what, value in broken.items()
                if (counter, what) not in exempt
            ]
    return found


def moved(row: dict, what: str) -> int:
    """Bytes read and written in both directions: "all", or "distinct" ones of each launch."""
    suffix = "" if what == "all" else "_distinct"
    return sum(
        tensor[f"{verb}{suffix}"]
        for direction in (row["forward"], row["backward"])
        for tensor in direction["tensors"].values()
        for verb in ("read", "written")
    )


def _both(row: dict, counter: str) -> str:
    return f"{row['forward'][counter]} + {row['backward'][counter]}"


def _label(row: dict) -> str:
    return row["order"] + (f", dropout {row['dropout']:g}" if row["dropout"] else "")


def _passes(row: dict, frozen: dict, shape: dict[str, int]) -> list[str]:
    """Passes over X forward, dY backward and X backward; in brackets those of first touches, where they are fewer."""
    found, first = (claims(row, frozen, shape, counter) for counter in ALLOWED)
    return [
        f"{getattr(found, what):.4g}" + f" ({getattr(first, what):.4g})" * (getattr(first, what) < getattr(found, what))
        for what in ("forward_x", "backward_dy", "backward_x")
    ]


def summary_table(table: dict, group: str) -> Table:
    """A group's rows: what each does beyond the frozen layer."""
    frozen = frozen_rows(table)[group]
    lines = []
    for row in (row for row in table["rows"] if row["group"] == group):
        found = claims(row, frozen, table["shape"])
        macs = [sum(each[d]["multiply_adds"] for d in ("forward", "backward")) for each in (row, frozen)]
        lines.append(
            [
                _label(row),
                _both(row, "launches"),
                *_passes(row, frozen, table["shape"]),
                f"{found.wide_bytes / 1024:.4g}",
                f"{moved(row, 'distinct') / moved(frozen, 'distinct'):.2f}",
                f"{moved(row, 'all') / moved(frozen, 'all'):.2f}",
                f"{macs[0] / macs[1]:.3f}",
                _both(row, "matrix_instructions"),
                _both(row, "barriers"),
            ]
        )
    columns = ["order", "launches", "X, forward", "dY, backward", "X, backward", "wide KiB", "distinct bytes"]
    columns += ["all bytes", "multiply-adds", "matrix instructions", "barriers"]
    m, n, k = (table["shape"][name] for name in "mnk")
    x, dy = _read(frozen["forward"], X_LIKE) / (m * k * ELEMENT), _read(frozen["backward"], DY_LIKE) / (m * n * ELEMENT)
    note = f"The frozen layer reads X {x:g} times and dY {dy:g} times, once for every column of tiles."
    return Table(group, note, columns, lines)


def _shape_text(shape: dict[str, int]) -> str:
    return ", ".join(f"{name.upper()} = {size}" for name, size in shape.items()) + ", bf16."


def _kib(tensors: list[dict]) -> str:
    """What is read (r) and written (w), with the distinct KiB of each launch in brackets where they are fewer."""
    parts = []
    for verb in ("read", "written"):
        total, distinct = (sum(t[f"{verb}{suffix}"] for t in tensors) / 1024 for suffix in ("", "_distinct"))
        if total:
            parts.append(f"{verb[0]} {total:.4g}" + (f" ({distinct:.4g})" if distinct < total else ""))
    return ", ".join(parts)


def tensor_table(table: dict, group: str) -> Table:
    """A group's rows: KiB of each tensor in each direction."""
    lines = []
    for row in (row for row in table["rows"] if row["group"] == group):
        for name in ("forward", "backward"):
            tensors = row[name]["tensors"]
            wide = [tensor for n, tensor in tensors.items() if n not in NAMED and n not in NARROW]
            narrow = [tensor for n, tensor in tensors.items() if n in NARROW]
            cells = [_kib([tensors[n]]) if n in tensors else "" for n in NAMED]
            lines.append([_label(row), name, *cells, _kib(wide), _kib(narrow)])
    columns = ["order", "direction", *NAMED, "other M×N, M×K", "R wide"]
    note = "Read (r) and written (w); in brackets the distinct KiB, summed over launches, where they are fewer."
    return Table(f"{group}: KiB", note, columns, lines)


NOTES = """\
Counted by the emulator on the kernels' own PTX; `{command}` makes this page and
[traffic.json](traffic.json), in which every tensor of every row is on its own. torch {torch}, triton {triton}. Every
row's Y, dX, dA and dB passed the error rule of `tests/support/numerics.py`. fastlora's rows are the launchers' own,
the others are each package's order of products and passes from plain kernels of our own with the same tile
(`benchmarks/traffic/peer_orders.py`), adapters in bf16.

- X, forward: passes over X (or its dropped copy) beyond those of the frozen layer's product, which reads X once for
  every column of tiles. 0: S costs no pass over X. In brackets, here and in the next two columns, where they are fewer:
  passes of first touches, which memory must deliver; what a launch reads again, the last cache can.
- dY, backward: passes over dY (or its scaled copy) beyond those of the frozen layer's dX. dB needs one.
- X, backward: passes over X (or its dropped copy). dA needs one.
- wide KiB: written to anything of M×N or M×K elements, but for Y and dX once each.
- distinct bytes: the sum over launches of the bytes that a launch touches at all, as a ratio to the frozen layer's two
  products: what memory must move where a launch's working set fits the last cache and nothing outlives a launch in it.
- all bytes: everything that crosses between the last cache and the multiprocessors, as a ratio. A cluster's shared
  copy counts once; lanes of a warp that ask for the same bytes count once.
- multiply-adds: of the tensor cores, padding included, as a ratio; matrix instructions are mma.sync or wgmma, whose
  sizes differ between tiles; barriers are a CTA's (each once) and a cluster's. Forward + backward.
- "fastlora": the first column's tiles make S from the blocks of X that they multiply anyway, as they do in launches of
  many waves of tiles. "separate shrink": tiles of their own make it, which read X (dY) once more, out of the last
  cache, and their row block has S four times as soon: what shorter launches do, and ranks above 64
  (`fastlora.backends.configs.fuses_shrink`). "2 parts": the contraction of each tile is cut in two, for want of
  tiles; the parts meet in fp32 memory.
"""


def readme_table(table: dict) -> Table:
    """The Hopper rows, in the words of a reader who has not read this module."""
    (group,) = (name for name in frozen_rows(table) if name.startswith("Triton, sm_90"))
    frozen, lines = frozen_rows(table)[group], []
    rows = [row for row in table["rows"] if row["group"] == group]
    dropped = {row["order"] for row in rows if row["dropout"]}
    for row in rows:
        if row["order"] in dropped and not row["dropout"]:
            continue  # one row for each order: the one with dropout, where it knows dropout
        found = claims(row, frozen, table["shape"])
        lines.append(
            [
                _label(row),
                _both(row, "launches"),
                *_passes(row, frozen, table["shape"]),
                f"{found.wide_bytes / 1024:.4g}",
                f"{moved(row, 'distinct') / moved(frozen, 'distinct'):.2f}",
            ]
        )
    columns = ["order of work", "launches", "X for S", "dY for dB and dS", "X for dA", "written besides Y and dX, KiB"]
    note = (
        f"{_shape_text(table['shape'])} Further passes over X and dY beyond the frozen layer's two products, in "
        "brackets those of a launch's first touches where they are fewer; what is written of Y's or X's size besides Y "
        "and dX; and the bytes that every launch touches, as a ratio."
    )
    return Table("Counted traffic of one layer, forward + backward", note, [*columns, "bytes / frozen"], lines)


def as_markdown(table: dict) -> str:
    names = list(frozen_rows(table))
    notes = NOTES.format(command=table["command"], **table["versions"])
    parts = [f"# Bytes, products and barriers of a LoRA layer\n\n{_shape_text(table['shape'])}\n\n{notes}"]
    parts += [summary_table(table, name).to_markdown() for name in names]
    parts += [tensor_table(table, name).to_markdown() for name in names]
    return "\n".join(parts)
