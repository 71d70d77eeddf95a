"""The table as Markdown."""

import re

from benchmarks.cuda_resources.count import COLUMNS

_RESOURCES = ("registers", "shared", "stack", "spilled")
_OF_KERNEL = ("code", "products", "copies", "stores", "waterfalls", "spills")

_HEAD = """# The CUDA kernels' machine code

Made by `python -m benchmarks.cuda_resources` with nvcc {nvcc} for sm_90a; {kernels} kernels, {remarks} performance
remarks of the assembler, {waterfalls} waterfalls. Nothing here was timed: it is counted in the disassembly.

168 registers a thread at entry become 40 for the producer warpgroup and 232 for each of the two consumer warpgroups.
Shared memory, stack and spills are in bytes.
"""

_LOOPS = """
## By loop

Kernels of the largest tile in bf16, at two ranks, and the one whose products decode a packed weight, whose loop has a
way for each format; all are in the JSON file. Loops are named by the functions of
`csrc/sm90/` that they come from, by the compiler's line information; the rest is straight code, which runs once a tile.

- code: instructions as they lie in memory, loops inside counted once; step: those on the costliest way through one step
  of the loop, a producer's without what is not done in every step (claiming a tile, the bias, in a base tile the
  shrinking factor); stalls: the cycles between their issues that the control bits demand, so a lower bound of a step's
  time for one warp that has its scheduler to itself.
- waterfalls: loops that the assembler puts around an instruction whose operands it cannot prove to be the same in all
  lanes. copies: into shared memory by the copy engine, in the code; issued: of those, by one CTA in a step. stores: by
  the copy engine.
- products: HGMMA; waits: for products, or for copies out of shared memory; barriers: of a warpgroup, a block or a
  cluster; mbarriers: operations on those; fences: of the copy engine's view; membars: wider than a block; invalidates:
  of the first cache.
"""


def as_markdown(table: dict) -> str:
    kernels = table["kernels"]
    waterfalls = sum(kernel["rows"]["all"]["waterfalls"] for kernel in kernels.values())
    head = _HEAD.format(nvcc=table["nvcc"], kernels=len(kernels), remarks=len(table["remarks"]), waterfalls=waterfalls)
    lines = [head, *_header(("kernel", *_RESOURCES, *_OF_KERNEL))]
    for name, kernel in kernels.items():
        cells = [kernel[what] for what in _RESOURCES] + [kernel["rows"]["all"][what] for what in _OF_KERNEL]
        lines.append(_row(name, cells))
    lines += [_LOOPS, *_header(("kernel", "what", *COLUMNS))]
    for name, kernel in kernels.items():
        if re.search("_bf16_(128x256_r(16|64)($|_)|.*_in_loop)", name):
            rows = ((what, counts) for what, counts in kernel["rows"].items() if what != "all")
            lines += [_row(name, [what, *(counts[column] for column in COLUMNS)]) for what, counts in rows]
    return "\n".join(lines) + "\n"


def _header(titles: tuple[str, ...]) -> list[str]:
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]


def _row(name: str, cells: list) -> str:
    return f"| {name.removeprefix('lora_sm90_')} | {' | '.join(map(str, cells))} |"
