"""The table of translators, and what they are given."""

from dataclasses import dataclass

from ..errors import PtxError
from ..program import Builder

TRANSLATORS = {}


def translates(*roots):
    """Registers a function(instruction, builder) for the opcodes that start with one of these roots."""

    def register(function):
        for root in roots:
            TRANSLATORS[root] = function
        return function

    return register


@dataclass
class Instruction:
    opcode: str
    modifiers: list  # the opcode split at its dots
    operands: list

    def has(self, *names):
        return any(name in self.modifiers for name in names)

    @property
    def type(self):
        return self.modifiers[-1]

    def takes(self, n):
        """Refuses another number of operands."""
        if len(self.operands) != n:
            raise PtxError(f"{self.opcode} with {len(self.operands)} operands is not modelled")

    def only(self, *allowed):
        """Refuses modifiers that the translator does not know: none may be ignored by accident."""
        for modifier in self.modifiers[1:]:
            if modifier not in allowed:
                raise PtxError(f"modifier .{modifier} of {self.opcode} is not modelled")


def vector(text):
    """The elements of {a, b}, or the one operand."""
    text = text.strip()
    return [part.strip() for part in text[1:-1].split(",")] if text.startswith("{") else [text]


def translate(instruction: Instruction, builder: Builder):
    parts = instruction.modifiers
    for length in (4, 3, 2, 1):
        function = TRANSLATORS.get(".".join(parts[:length]))
        if function:
            return function(instruction, builder)
    raise PtxError(f"instruction {instruction.opcode} is not modelled")
