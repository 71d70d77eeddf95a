"""A table of text, once as data, written as Markdown or HTML; and how quantities are written in its cells."""

import html
from dataclasses import dataclass

MIB = 2**20


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


def mib(size: int | None) -> str:
    return "–" if size is None else f"{size / MIB:.2f}"


def time_text(microseconds: float) -> str:
    """Three or four significant digits in µs or ms."""
    return f"{microseconds:.1f} µs" if microseconds < 1000 else f"{microseconds / 1000:.2f} ms"
