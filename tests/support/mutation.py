"""A small change to a text, made by rule."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """``new`` in the place of characters ``start`` to ``end`` of a file, which hold ``old``. rule: its name."""

    rule: str
    start: int
    end: int
    old: str
    new: str

    def apply(self, text: str) -> str:
        """
        Raises:
            ValueError: the text is another than the one that the mutation was made for.
        """
        if text[self.start : self.end] != self.old:
            raise ValueError(f"no {self.old!r} at character {self.start}")
        return text[: self.start] + self.new + text[self.end :]

    def line(self, text: str) -> int:
        """From 1."""
        return text.count("\n", 0, self.start) + 1
