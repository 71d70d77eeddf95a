"""Which instructions the cases cover, told apart as the translator does."""

import functools
import re

from ..ptx import parse, split_operands
from ..translate.registry import vector

_STATEMENT = re.compile(r"(?:@!?[%\w$]+\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_HINTS = ("L1::", "L2::")


@functools.lru_cache(maxsize=1024)
def check(ptx: str) -> None:
    """
    Raises:
        LookupError: a module uses an instruction for which there is no case.
    """
    if missing := _all_signatures(ptx) - covered():
        raise LookupError(f"no conformance case covers {sorted(missing)}")


@functools.cache
def covered() -> frozenset[str]:
    """The signatures of all cases."""
    from . import all_cases

    return frozenset().union(*(_all_signatures(case.ptx) for case in all_cases()))


def _all_signatures(ptx: str) -> frozenset[str]:
    # Registers go by one name: thousands of instructions become hundreds.
    root = parse(re.sub(r"(%[a-z]+)\d+", r"\1", ptx))
    functions = (*root.entries.values(), *root.functions.values())
    texts = {statement.text for function in functions for statement in function.body.statements()}
    return frozenset().union(*map(signatures, texts))


@functools.lru_cache(maxsize=1 << 16)
def signatures(text: str) -> frozenset[str]:
    """An instruction's opcode, its modifiers in any order and without hints, and the kinds of its operands. A wgmma
    has two signatures: its shape and types, and where its operands lie."""
    match = _STATEMENT.fullmatch(text)
    if not match:
        return frozenset()
    root, *modifiers = match.group(1).split(".")
    operands = split_operands(match.group(2))
    if root == "wgmma" and "mma_async" in modifiers:
        source = "registers" if operands[1].startswith("{") else "shared memory"
        majors = ", ".join(operands[6:] if "tf32" not in modifiers else ())
        return frozenset({match.group(1), f"wgmma of {modifiers[-1]}, A in {source}, transposed {majors}"})
    modifiers = ["shared::cta" if name == "shared" else name for name in modifiers if not name.startswith(_HINTS)]
    if root in ("bra", "mov", "setp", "selp"):  # labels, special registers and predicates are no kinds of operands
        operands = [each for each in operands if each.startswith("{")]
    return frozenset({" ".join([".".join([root, *sorted(modifiers)]), *map(_kind, operands)])})


def _kind(operand: str) -> str:
    if operand.startswith("{"):
        return f"{{{len(vector(operand))}}}" if "," in operand else "x"
    if operand.startswith("["):
        coordinates = operand.partition("{")[2].count(",")
        return f"[{coordinates + 1}]" if "{" in operand else "[]"
    return "x"
