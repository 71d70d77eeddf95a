"""The table of what the compiled kernels are made of: made, compared with the built library, and judged."""

import json
import os
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.cuda_resources import sass, toolkit
from benchmarks.cuda_resources.count import COLUMNS, count_kernel
from benchmarks.cuda_resources.naming import Names

SHARED_LIMIT = 227 * 1024
RESOURCES = ("registers", "shared", "stack")
REQUIRED = ("products", "copies", "stores")  # of a whole kernel
# A loop of products waits for all memory of the GPU in front of every step's.
UNWANTED_IN_LOOPS = ("membars",)
UNWANTED = ("waterfalls", "spills")


def read_library(library: Path, variants: list[dict], only: str = "") -> dict[str, dict]:
    """Resources and counts of a library's kernels, those whose names match ``only``.

    Raises:
        ValueError: its machine code is compressed, or it was built before the sources last changed, by whose lines
            loops are named.
    """
    newest = max(toolkit.sources(), key=lambda path: path.stat().st_mtime)
    if library.stat().st_mtime < newest.stat().st_mtime:
        raise ValueError(f"{library.name} is older than csrc/{newest.relative_to(toolkit.CSRC)}: build it again")
    clusters = {variant["name"]: variant["cluster"] for variant in variants}
    usage = toolkit.resource_usage(library)
    shared = {variant["name"]: variant["shared_bytes"] for variant in variants}
    kernels = {name: {**usage[name], "shared": shared[name]} for name in sorted(usage) if re.search(only, name)}
    images = sass.cubins(library.read_bytes())
    wanted = {name: clusters[name] for name in kernels}
    with ProcessPoolExecutor(min(len(images), os.cpu_count() or 1)) as pool:
        for found in pool.map(_count_image, images, [wanted] * len(images)):
            for name, rows in found.items():
                kernels[name]["rows"] = rows
    return kernels


def _count_image(image: bytes, clusters: dict[str, int]) -> dict[str, dict]:
    if not any(name.encode() in image for name in clusters):
        return {}
    kernels = sass.disassemble(toolkit.tool("nvdisasm"), image)
    names = Names(toolkit.CSRC)
    return {name: count_kernel(code, names, clusters[name]) for name, code in kernels.items() if name in clusters}


def make_table(library: Path, variants: list[dict]) -> dict:
    """Compiles the sources for the assembler's remarks, and reads the library, which must be built from them."""
    kernels = read_library(library, variants)
    remarks, spills = toolkit.compile_report()
    for name, kernel in kernels.items():
        kernel["spilled"] = spills[name]
    return {
        "nvcc": toolkit.nvcc_version(),
        "source": toolkit.source_digest(),
        "remarks": remarks,
        "kernels": kernels,
    }


def faults(table: dict) -> list[str]:
    """What breaks the gate, whatever was recorded before."""
    found = [f"performance remark: {remark}" for remark in table["remarks"]]
    for name, kernel in table["kernels"].items():
        found += [f"{name}: no {what} among its instructions" for what in REQUIRED if not kernel["rows"]["all"][what]]
        found += [f"{name}: {kernel[what]} bytes of {what}" for what in ("stack", "spilled") if kernel.get(what)]
        if kernel["shared"] > SHARED_LIMIT:
            found.append(f"{name}: {kernel['shared']} bytes of shared memory are more than a block may have")
        for row, counts in kernel["rows"].items():
            unwanted = UNWANTED + (UNWANTED_IN_LOOPS if "loop" in row and counts["products"] else ())
            if row != "all":
                found += [f"{name}, {row}: {counts[what]} {what}" for what in unwanted if counts[what]]
    return found


def differences(recorded: dict[str, dict], built: dict[str, dict]) -> list[str]:
    """Where the built kernels differ from the recorded ones; a count that fell is to be recorded as well."""
    found = [f"{name}: in the table only" for name in recorded.keys() - built.keys()]
    found += [f"{name}: in the library only" for name in built.keys() - recorded.keys()]
    for name in built.keys() & recorded.keys():
        old, new = recorded[name], built[name]
        found += [_change(f"{name}: {what}", old[what], new[what]) for what in RESOURCES if old[what] != new[what]]
        found += [f"{name}, {row}: in the table only" for row in old["rows"].keys() - new["rows"].keys()]
        found += [f"{name}, {row}: in the library only" for row in new["rows"].keys() - old["rows"].keys()]
        for row in old["rows"].keys() & new["rows"].keys():
            before, after = old["rows"][row], new["rows"][row]
            changed = [what for what in COLUMNS if before.get(what) != after[what]]
            found += [_change(f"{name}, {row}: {what}", before.get(what, 0), after[what]) for what in changed]
    return sorted(found)


def _change(what: str, before: int, after: int) -> str:
    return f"{what} {'grew' if after > before else 'fell'} from {before} to {after}"


def to_json(table: dict) -> str:
    """The table as text, a row of counts a line, in the order of its columns."""
    kernels = {
        name: {**kernel, "rows": {row: list(counts.values()) for row, counts in kernel["rows"].items()}}
        for name, kernel in table["kernels"].items()
    }
    text = json.dumps({**table, "columns": COLUMNS, "kernels": kernels}, indent=1)
    return re.sub(r"\[([^\[\]{}]*)\]", lambda row: "[" + " ".join(row[1].split()) + "]", text) + "\n"


def from_json(text: str) -> dict:
    """What :func:`to_json` wrote."""
    table = json.loads(text)
    columns = table.pop("columns")
    for kernel in table["kernels"].values():
        kernel["rows"] = {row: dict(zip(columns, counts, strict=True)) for row, counts in kernel["rows"].items()}
    return table


def as_text(kernel: str, rows: dict[str, dict[str, int]]) -> str:
    """The rows of a kernel, in columns."""
    lines = [kernel, " " * 32 + "".join(f"{what:>12}" for what in COLUMNS)]
    lines += [f"{name:32}" + "".join(f"{counts[what]:>12}" for what in COLUMNS) for name, counts in rows.items()]
    return "\n".join(lines)
