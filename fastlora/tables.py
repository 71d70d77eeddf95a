"""A table of text, once as data, written as Markdown or HTML; and how quantities are written in its cells."""

import html
import textwrap
from dataclasses import dataclass

MIB = 2**20
WIDTH = 80  # of what commands print


@dataclass(frozen=True)
class Table:
    """A title, a note under it, column names and rows of text."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]

    def to_markdown(self) -> str:
        lines = [f"## {self.title}", "", self.note, "", _line(self.columns), "|" + "---|" * len(self.columns)]
        return "\n".join([*lines, *map(_line, self.rows)]) + "\n"

    def to_text(self) -> str:
        """Aligned columns for a terminal: the first to the left, the others to the right."""
        cells = [self.columns, *self.rows]
        widths = [max(len(row[index]) for row in cells) for index in range(len(self.columns))]
        lines = [
            "  ".join(cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(pairs))
            for pairs in (list(zip(row, widths, strict=True)) for row in cells)
        ]
        return "\n".join([wrapped(self.title), *(line.rstrip() for line in lines), wrapped(self.note)])

    def to_html(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in self.rows
        )
        return (
            f"<h2>{html.escape(self.title)}</h2>\n<p>{html.escape(self.note)}</p>\n"
            f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>\n"
        )


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def wrapped(text: str, indent: str = "", hanging: str = "  ", break_words: bool = False) -> str:
    """A paragraph in lines of at most WIDTH columns, the first after ``indent`` and the others ``hanging`` further in.
    A word that is longer, as a path may be, has a line to itself, unless words may be broken."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + hanging,
        break_long_words=break_words,
        break_on_hyphens=False,
    )


def mib(size: int | None) -> str:
    return "–" if size is None else f"{size / MIB:.2f}"


def time_text(microseconds: float) -> str:
    """Three or four significant digits in µs or ms."""
    return f"{microseconds:.1f} µs" if microseconds < 1000 else f"{microseconds / 1000:.2f} ms"
