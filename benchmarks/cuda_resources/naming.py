"""What a piece of machine code is, from the line information that the compiler left: by the functions that it was
inlined from, of which the sources give the names and the template arguments.

The parts of a kernel, as functions of csrc/sm90/: a producer's loops and a consumer's, and between them what runs once
a tile. Nothing here knows an address or an instruction.
"""

import bisect
import re
from collections import Counter
from collections.abc import Collection
from functools import cache
from pathlib import Path

from benchmarks.cuda_resources.loops import Loop
from benchmarks.cuda_resources.sass import Instruction

_DEFINITION = re.compile(r"\s{0,2}(?:template <.*> )?(?:static )?__device__ __forceinline__ .*?(\w+)\(")
# The tile that a consumer's function computes, by its template arguments.
TILES = {
    ("multiply", "true, false"): "base",
    ("multiply", "true, true"): "fused",
    ("multiply", "false, true"): "shrink",
    ("compute_gradient", "true, false"): "dA",
    ("compute_gradient", "false, false"): "dB",
    ("compute_gradient", "false, true"): "dB, dbias",
}
# Of a tile that decodes a packed weight, likewise.
CODES = {
    "FourBitCodes, NestedScale": "4 bits, nested",
    "FourBitCodes, FloatScale": "4 bits",
    "ByteCodes<CodeFormat::kInt8>, AnyScale": "int8",
    "ByteCodes<CodeFormat::kFloat8E4M3>, AnyScale": "e4m3",
    "ByteCodes<CodeFormat::kFloat8E5M2>, AnyScale": "e5m2",
}
# Of a step that decodes a packed weight's stage, by the line of the call.
_RUN = re.compile(r"body\(Run<CodeFormat::k(\w+)>")
RUNS = {"Nf4": "nf4", "Fp4": "fp4", "Int8": "int8", "Float8E4M3": "e4m3", "Float8E5M2": "e5m2"}
LOADS = {"load_output": "base", "load_shrink": "shrink", "load_gradient": "gradient"}
# What a function does for the tile, the first that is met on the way outwards.
PARTS = {
    "drop_in_place": "mask",
    "append": "mask",
    "load_expand": "expand",
    "finish_tile": "epilogue",
    "run_several": "epilogue",
    "store_s": "store S",
    "reduce_splits": "reduce splits",
    "store_gradient": "store",
    "transfer_partials": "reduce",
}
_OUTPUT_TILES = ("compute_output_tile", "compute_shared_tile")
# On the line of a call that the CTAs of a cluster take turns at, where there is one for some of them only.
TURN = "box < kBoxes"


class Names:
    """Names for the code that was compiled from the sources under ``csrc``."""

    def __init__(self, csrc: Path):
        self._text = {path.name: path.read_text().splitlines() for path in sorted(csrc.rglob("*")) if path.is_file()}
        self._definitions = {
            file: [(i, found[1]) for i, line in enumerate(lines, 1) if (found := _DEFINITION.match(line))]
            for file, lines in self._text.items()
        }
        self.calls = cache(self._calls)  # thousands of instructions come from the same places

    def function_at(self, file: str, line: int) -> tuple[int, str] | None:
        """(line, name) of the definition that a line belongs to."""
        known = self._definitions.get(file, [])
        at = bisect.bisect_right(known, (line, "\uffff"))
        return known[at - 1] if at else None

    def source(self, file: str, line: int) -> str:
        lines = self._text.get(file, [])
        return lines[line - 1] if 0 < line <= len(lines) else ""

    def _calls(self, places: tuple[tuple[str, int], ...]) -> tuple[tuple[str, str], ...]:
        """(function, template arguments) of each call, from the outermost. A function that computes several kinds of
        tile one below the other, each with its own call of multiply(), has that call's arguments."""
        found: list[tuple[str, str]] = []
        caller = ""
        for file, line in places:
            function = self.function_at(file, line)
            if function is None:
                caller = ""
                continue
            first, name = function
            arguments = re.search(rf"\b{name}<([^;()]*)>\(", caller)
            text = [self.source(file, i) for i in range(first, line + 1)]
            kinds = re.findall(r"\bmultiply<([^;()]*)>\(", "\n".join(text))
            found.append((name, arguments[1] if arguments else kinds[-1] if kinds else ""))
            caller = self.source(file, line)
        return tuple(found)

    def name(self, places: tuple[tuple[str, int], ...]) -> str:
        """What code from these places is: "consumer base: epilogue"."""
        calls = self.calls(places)
        names = [name for name, _ in calls]
        part = next((PARTS[name] for name in reversed(names) if name in PARTS), "rest")
        for name, arguments in reversed(calls):
            function = "multiply" if name in _OUTPUT_TILES else name
            if function in ("multiply", "compute_gradient") and arguments:
                return f"consumer {TILES.get((function, arguments), f'<{arguments}>')}: {part}"
            if name == "decode_part":
                return f"consumer decode {CODES.get(arguments, f'<{arguments}>')}: {part}"
            if name == "decode_tile":
                return f"consumer decode: {part}"
            if name in LOADS:
                return f"producer {LOADS[name]}: {part}"
        if "consume" in names:
            return "consumer: tile switch"
        return "producer: tile switch" if names.count("run") > 1 else "start and exit"

    def name_of_loop(self, loop: Loop) -> str:
        """The name that most of a loop's instructions have. The compiler's line information gives both loops of dB the
        places of one; of them one alone multiplies by a column of ones, eight wide."""
        votes = Counter(self.name(each.places) for each in loop.code)
        name = max(votes, key=lambda name: votes[name])
        sums_columns = any(each.opcode.startswith("HGMMA.64x8x16") for each in loop.code)
        return name if sums_columns else name.replace("dB, dbias", "dB")

    def format_of(self, instruction: Instruction) -> str | None:
        """The one format of a packed weight, of RUNS, whose codes an instruction in the loop of a product loads."""
        if not instruction.is_a("LDS"):
            return None  # the last of several formats may share their code
        found = (_RUN.search(self.source(*place)) for place in instruction.places)
        return next((RUNS[each[1]] for each in found if each), None)

    def is_conditional(self, instruction: Instruction, functions: Collection[str] = tuple(LOADS)) -> bool:
        """Whether a call on the way from one of these functions, which a loop of the producer is in, to the instruction
        stands behind an if on the same line: a thing not done in every step."""
        inside = False
        for place in instruction.places:
            function = self.function_at(*place)
            inside = inside or (function is not None and function[1] in functions)
            text = self.source(*place).lstrip()
            if inside and text.startswith("if (") and TURN not in text:
                return True
        return False

    def is_shared(self, instruction: Instruction) -> bool:
        """Whether the CTAs of a cluster may take turns at the instruction."""
        return any(TURN in self.source(*place) for place in instruction.places)
