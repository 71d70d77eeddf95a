"""Keys of ``rank_pattern`` and ``alpha_pattern``: regular expressions by PEFT's rule, matched in bounded time.

A file's author writes these keys, and Python's matcher takes exponential time over some (``(a+)+b``). Names, which
nearly all keys are, are looked up; the others are matched without going back.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastlora.adapters.automata import Automaton

_MAX_WORK = 1_000_000
_MAX_NAMES, _MAX_OTHERS = 200_000, 1000
_NAME = re.compile(r"(\^?)((?:[\w./-]|\\[./-])*)\$?", re.ASCII)
_Names = dict[int, dict[tuple[int, ...], dict[str, int]]]  # by length, by where the dots are, by the rest: key's number


class Patterns:
    """The value that a mapping from PEFT's pattern keys gives to a module path.

    PEFT's rule: the first key that, as a regular expression, matches the end of the path from a dot on.

    Raises:
        ValueError: as ``Automaton``; there are too many keys; from a look-up, all keys together take too long. The
            message names the key.
    """

    def __init__(self, pattern: Mapping[str, Any]) -> None:
        self._values = list(pattern.values())
        self._ends: _Names = {}
        self._paths: _Names = {}  # keys that begin with ^
        self._others: list[tuple[int, str, Automaton]] = []
        self._work = 0
        if len(pattern) > _MAX_NAMES:
            raise ValueError(f"it has {len(pattern):,} pattern keys, {_MAX_NAMES:,} are the most")
        for number, key in enumerate(pattern):
            name = _NAME.fullmatch(key)
            if name is None:
                if len(self._others) == _MAX_OTHERS:
                    raise ValueError(
                        f"it has more than {_MAX_OTHERS} pattern keys that are no names; write out the names"
                    )
                self._others.append((number, key, Automaton(key)))
                continue
            text, dots = _name_and_dots(name[2])
            groups = (self._paths if name[1] else self._ends).setdefault(len(text), {})
            groups.setdefault(dots, {}).setdefault(text, number)

    def value(self, path: str, default: Any) -> Any:
        """The value of the first key that matches the path, else the default."""
        first = min(self._named(path), default=len(self._values))
        for number, key, automaton in self._others:
            if number > first:
                break
            matched, work = automaton.matches(path)
            self._work += work
            if self._work > _MAX_WORK:
                raise ValueError(f"pattern key {key[:80]!r} and others take too long to match: write out the names")
            if matched:
                first = number
                break
        return self._values[first] if first < len(self._values) else default

    def _named(self, path: str) -> Iterator[int]:
        """Numbers of the keys that are names and match."""
        yield from _look_up(self._paths, path)
        if self._ends:
            for start in (0, *(dot.end() for dot in re.finditer(r"\.", path))):
                yield from _look_up(self._ends, path[start:])


def _look_up(names: _Names, text: str) -> Iterator[int]:
    for dots, group in names.get(len(text), {}).items():
        number = group.get(_masked(text, dots))
        if number is not None:
            yield number


def _name_and_dots(key: str) -> tuple[str, tuple[int, ...]]:
    """The name that a key spells, and where it has a dot that stands for any character."""
    parts = re.findall(r"\\?.", key)
    dots = tuple(place for place, part in enumerate(parts) if part == ".")
    return "".join(part[-1] for part in parts), dots


def _masked(text: str, dots: tuple[int, ...]) -> str:
    if all(text[place] == "." for place in dots):  # nearly always
        return text
    characters = list(text)
    for place in dots:
        characters[place] = "."
    return "".join(characters)
