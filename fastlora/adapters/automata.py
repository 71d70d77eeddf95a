"""Regular expressions matched without going back, so that no expression takes long over a short text.

All the places of an expression that the text read so far may have led to are kept, character by character (Thompson,
"Regular Expression Search Algorithm", 1968). What has no such places (back references, looking ahead) is refused.
"""

import re
from collections.abc import Callable
from typing import NamedTuple, NoReturn

MAX_KEY, MAX_NESTING, MAX_PLACES = 2000, 50, 2000
_CLASSES = {"d": str.isdecimal, "w": lambda c: c.isalnum() or c == "_", "s": str.isspace}
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_GROUP = re.compile(r"\((?:\?:|\?P<\w+>|(?!\?))")

Predicate = Callable[[str], bool]


class _Place(NamedTuple):
    """A character is read where ``reads`` accepts it; else ``then`` follows at once, under ``only`` if that is set."""

    reads: Predicate | None
    then: tuple[int, ...]
    only: str | None = None  # "^" at the beginning of the text, "$" at its end


def _between(low: str, high: str) -> Predicate:
    return lambda c: low <= c <= high


class Automaton:
    """One expression. Its groups, alternatives, character classes and repetitions mean what they mean to ``re``.

    Raises:
        ValueError: the text is no regular expression, is too long or too deeply nested, or has parts that cannot be
            matched without going back.
    """

    def __init__(self, key: str) -> None:
        if len(key) > MAX_KEY:
            raise ValueError(f"pattern key {key[:80]!r}... has {len(key)} characters, {MAX_KEY} are the most")
        self._key, self._at, self._depth = key, 0, 0
        self._places: list[_Place] = [_Place(None, ())]  # place 0: the end
        try:
            re.compile(key)
        except (re.error, OverflowError) as error:
            raise ValueError(f"pattern key {key[:80]!r} is not a regular expression: {error}") from error
        except RecursionError:
            self._refuse("groups nested too deeply")
        self._start = self._emit(self._alternatives(), 0)

    def matches(self, text: str) -> tuple[bool, int]:
        """Whether the expression matches the text's end from its beginning, or from a dot on; and the steps taken."""
        work, current = 0, set()
        for position, character in enumerate((*text, "")):
            if position == 0 or text[position - 1] == ".":
                current.add(self._start)
            reached = self._reached(current, position == 0, not character)
            work += len(reached) + 1
            if not character:
                return 0 in reached, work
            read = [place for n in reached if (place := self._places[n]).reads and place.reads(character)]
            current = {after for place in read for after in place.then}
        raise AssertionError("unreachable")

    def _reached(self, places: set[int], first: bool, last: bool) -> set[int]:
        found, left = set(), list(places)
        while left:
            number = left.pop()
            place = self._places[number]
            if number in found or (place.only == "^" and not first) or (place.only == "$" and not last):
                continue
            found.add(number)
            if place.reads is None:
                left.extend(place.then)
        return found

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"pattern key {self._key[:80]!r} has {what}, which is not supported here")

    # The syntax, read from left to right into a tree.

    def _peek(self) -> str:
        return self._key[self._at : self._at + 1]

    def _take(self) -> str:
        self._at += 1
        return self._key[self._at - 1]

    def _alternatives(self):
        branches = [self._sequence()]
        while self._peek() == "|":
            self._take()
            branches.append(self._sequence())
        return ("one of", branches)

    def _sequence(self):
        parts = []
        while self._peek() and self._peek() not in "|)":
            parts.append(self._repeated(self._atom()))
        return ("all of", parts)

    def _repeated(self, atom):
        low: int = 1
        high: int | None = 1
        count = _COUNT.match(self._key, self._at)
        if self._peek() and self._peek() in "*+?":
            low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[self._take()]
        elif count and (count[1] or count[3]):
            self._at = count.end()
            low = int(count[1] or 0)
            high = low if not count[2] else int(count[3]) if count[3] else None
        else:
            return atom
        if self._peek() == "?":  # as few as possible: the same texts match
            self._take()
        elif self._peek() == "+":
            self._refuse("a possessive repetition")
        return ("repeat", atom, low, high)

    def _atom(self):
        character = self._take()
        if character == "(":
            group = _GROUP.match(self._key, self._at - 1)
            if group is None:
                self._refuse(f"a group {self._key[self._at - 1 : self._at + 3]!r}")
            self._depth += 1
            if self._depth > MAX_NESTING:
                self._refuse(f"groups nested more than {MAX_NESTING} deep")
            self._at = group.end()
            inside = self._alternatives()
            self._take()
            self._depth -= 1
            return inside
        if character in "^$":
            return ("only", character)
        if character == ".":
            return ("read", lambda c: c != "\n")
        if character == "[":
            return ("read", self._character_class())
        if character == "\\":
            return ("read", self._escaped(self._take()))
        return ("read", character.__eq__)

    def _escaped(self, character: str) -> Predicate:
        if character.lower() in _CLASSES:
            known = _CLASSES[character.lower()]
            return known if character.islower() else lambda c: not known(c)
        if character.isalnum():
            self._refuse(f"\\{character}")
        return character.__eq__

    def _character_class(self) -> Predicate:
        negated = self._peek() == "^"
        self._at += negated
        members: list[Predicate] = []
        while not members or self._peek() != "]":
            low = self._take()
            if low == "\\":
                members.append(self._escaped(self._take()))
            elif self._peek() == "-" and self._key[self._at + 1 : self._at + 2] not in ("]", "\\"):
                self._take()
                high = self._take()
                members.append(_between(low, high))
            else:
                members.append(low.__eq__)
        self._take()
        return lambda c: any(member(c) for member in members) != negated

    # The tree as places, from the end backwards: each part is given the place that follows it.

    def _place(self, place: _Place) -> int:
        if len(self._places) >= MAX_PLACES:
            self._refuse("repetitions of too many parts")
        self._places.append(place)
        return len(self._places) - 1

    def _emit(self, node, after: int) -> int:
        kind = node[0]
        if kind == "read":
            return self._place(_Place(node[1], (after,)))
        if kind == "only":
            return self._place(_Place(None, (after,), node[1]))
        if kind == "one of":
            return self._place(_Place(None, tuple(self._emit(branch, after) for branch in node[1])))
        if kind == "all of":
            for part in reversed(node[1]):
                after = self._emit(part, after)
            return after
        _, inside, low, high = node
        if high is None:
            loop = self._place(_Place(None, ()))
            self._places[loop] = _Place(None, (self._emit(inside, loop), after))
            after = loop
        for _ in range(0 if high is None else high - low):
            after = self._place(_Place(None, (self._emit(inside, after), after)))
        for _ in range(low):
            self._place(_Place(None, ()))  # counted, so that an empty part repeated for ever ends, too
            after = self._emit(inside, after)
        return after
