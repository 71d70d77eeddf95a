"""Small changes to C++, made by rule: what the mutation score of the CUDA kernels counts.

By regular expressions, over a text whose comments, strings and directives are blank: what they make need not compile.
"""

import re
from collections.abc import Callable, Iterator

from tests.support.mutation import Mutation

_BLANK = re.compile(r'//[^\n]*|"(?:\\.|[^"\\])*"|^[ \t]*#[^\n]*(?:\\\n[^\n]*)*', re.M)
_DECLARES = re.compile(r"\s*(template|struct|class|using|namespace|static_assert|enum)\b")
_PAIRS = (
    ("rows", "columns"), ("row", "column"), ("first_row", "first_column"), ("block_m", "block_n"),
    ("kBlockM", "kBlockN"), ("warpgroup_row", "warpgroup_column"), ("lora_a", "lora_b"), ("grad_a", "grad_b"),
    ("left", "right"), ("m", "n"), ("n", "k"), ("x", "y"), ("w", "z"), ("act", "weight"), ("full", "empty"),
    ("in_features", "out_features"),
)  # fmt: skip
_OTHER = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
_COMPARED = {"<": ("<=", ">="), "<=": ("<", ">"), ">": (">=", "<="), ">=": (">", "<"), "==": ("!=",), "!=": ("==",)}
_CALCULATED = {"+": "-", "-": "+", "*": "+", "/": "*", "%": "/", "&": "|", "|": "&", "<<": ">>", ">>": "<<"}
_SYNCHRONISES = r"\w*(?:sync|wait|fence|arrive|release|commit|expect|signal)\w*"
_STATEMENT = r"[\w.:]+(?:<[^;<>]*>)?\([^;{}]*\);"


def _swap(table: dict[str, str]) -> Callable[[re.Match], tuple[str, ...]]:
    return lambda found: (table[found[1]],)


# rule: (pattern whose first group is replaced, from its match to what takes the group's place)
_RULES: tuple[tuple[str, str, Callable[[re.Match], tuple[str, ...]]], ...] = (
    ("constant", r"(?<![\w.])(\d+)(?![\w.])", lambda found: (str(int(found[1]) + 1), str(int(found[1]) - 1))),
    ("constant", r"\b(true|false)\b", _swap({"true": "false", "false": "true"})),
    ("comparison", r" (<=|>=|==|!=|<|>) ", lambda found: _COMPARED[found[1]]),
    ("operator", r" (<<|>>|[-+*/%&|]) ", lambda found: (_CALCULATED[found[1]],)),
    ("operator", r" (\+)= ", lambda found: ("-", "")),
    ("connective", r" (&&|\|\|) ", _swap({"&&": "||", "||": "&&"})),
    ("extreme", r"\b(min|max)\(", _swap({"min": "max", "max": "min"})),
    ("rounded down", r"\bceil_div\(([^(),]+), [^(),]+\)", lambda found: ()),
    ("narrowed", r"\b(u?int64_t)\(", _swap({"int64_t": "int", "uint64_t": "uint32_t"})),
    ("wrong of a pair", r"(?<!\w)(\w+)(?!\w|\()", lambda found: (_OTHER[found[1]],) if found[1] in _OTHER else ()),
    ("removed", rf"^[ \t]*((?:\w+\.)?{_SYNCHRONISES}(?:<[^;<>]*>)?\([^;{{}}]*\);)", lambda found: (";",)),
    ("dropped call", rf"^[ \t]*({_STATEMENT})$", lambda found: (";",)),
    ("dropped statement", r"^[ \t]*([\w.\[\]>-]+ [-+*|&]?= [^;{}]*;)$", lambda found: (";",)),
)


def find(text: str) -> list[Mutation]:
    """Every mutation of a text, in its order."""
    blank = _BLANK.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    found: dict[tuple[int, int, str], Mutation] = {}  # what several rules make is one
    for each in (*_by_rules(text, blank), *_conditions(text, blank), *_moved(text, blank)):
        found.setdefault((each.start, each.end, each.new), each)
    return [found[place] for place in sorted(found)]


def _by_rules(text: str, blank: str) -> Iterator[Mutation]:
    for rule, pattern, others in _RULES:
        for found in re.finditer(pattern, blank, re.M):
            start, end = found.span(1)
            line = blank[blank.rfind("\n", 0, start) + 1 : start]
            if _DECLARES.match(line + "x") and rule != "comparison":
                continue
            for new in others(found):
                yield Mutation(rule, start, end, text[start:end], new)


def _conditions(text: str, blank: str) -> Iterator[Mutation]:
    """Of ``if`` and ``while``, negated."""
    for found in re.finditer(r"\b(?:if|while)(?: constexpr)? \(", blank):
        depth, end = 1, found.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(blank[end], 0)
            end += 1
        condition = text[found.end() : end - 1]
        yield Mutation("condition", found.end(), end - 1, condition, f"!({condition})")


def _moved(text: str, blank: str) -> Iterator[Mutation]:
    """A statement that synchronises trades places with its neighbour on the next line."""
    line = r"^[ \t]*([^\s;{}][^;{}\n]*;)\n[ \t]*([^\s;{}][^;{}\n]*;)$"
    for found in re.finditer(rf"(?=({line}))", blank, re.M):
        (start, middle), (second, end) = found.span(2), found.span(3)
        first_text, second_text = text[start:middle], text[second:end]
        called = re.compile(rf"(?:\w+\.)?{_SYNCHRONISES}(?:<[^;<>]*>)?\(")
        if called.match(first_text) or called.match(second_text):
            new = second_text + text[middle:second] + first_text
            yield Mutation("moved", start, end, text[start:end], new)
