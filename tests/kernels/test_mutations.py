"""The rules that make mutants: each changes one thing, and what it makes is Python."""

import ast

import pytest

from tests.support import generated, mutants, python_mutations

CASES = {
    "constant": ("x = 4", {"x = 5", "x = 3"}),
    "comparison": ("x = a < 4.5", {"x = a <= 4.5", "x = a >= 4.5"}),
    "connective": ("x = a and b", {"x = a or b"}),
    "dropped condition": ("x = a and b", {"x = (a)", "x = (b)"}),
    "operator": ("x = (a) + (b)", {"x = (a) - (b)"}),
    "dropped term": ("x = a * b", {"x = (a)", "x = (b)"}),
    "swapped operands": ("x = a // b", {"x = ((b) // (a))"}),
    "dropped sign": ("x = -a", {"x = (a)"}),
    "dropped statement": ("x += a", {"pass"}),
    "condition": ("if a:\n        x = b", {"if not (a):\n        x = b"}),
    "extreme": ("x = tl.minimum(a, b)", {"x = tl.maximum(a, b)"}),
    "dropped clamp": ("x = tl.minimum(a, b)", {"x = (a)", "x = (b)"}),
    "dropped choice": ("x = tl.where(c, a, b)", {"x = (a)", "x = (b)"}),
    "rounded down": ("x = tl.cdiv(a, b)", {"x = ((a) // (b))"}),
    "dropped cast": ("x = a.to(tl.int64)", {"x = a"}),
    "narrowed": ("x = a.to(tl.int64)", {"x = a.to(tl.int32)"}),
    "wrong of a pair": ("x = shape.M", {"x = shape.N"}),
    "removed": ("tl.debug_barrier()", {"pass"}),
    "moved": ("publish(a)\n    x = b", {"x = b\n    publish(a)"}),
    "relaxed": ('x = f(sem="acquire")', {'x = f(sem="relaxed")'}),
}
HEAD = '@decorated(1)\ndef function(a: int = 2):\n    """Text 3."""\n    '


def made(body: str, rule: str | None = None) -> list[str]:
    text = f"{HEAD}{body}\n"
    return [m.apply(text)[len(HEAD) : -1] for m in python_mutations.find(text) if rule in (None, m.rule)]


@pytest.mark.parametrize("rule", CASES)
def test_a_rule(rule):
    body, wanted = CASES[rule]
    found = made(body, rule)
    assert set(found) >= wanted and body not in made(body)


def test_only_bodies_are_changed():
    """Neither decorators nor defaults nor docstrings nor what is said where something is refused."""
    assert made("raise ValueError(f'{a + 1} is below 2')") == made("assert a < 3, 'small'") == []


@pytest.mark.parametrize("module", mutants.MODULES)
def test_mutants_of_the_kernels_are_python(module):
    text = mutants.source(module)
    found = python_mutations.find(text)
    assert len(found) == len({m.apply(text) for m in found}), "no two are the same text"
    for mutation in found:
        ast.parse(mutation.apply(text))


def test_the_order_is_the_seeds():
    every = generated.of_triton()
    names = [each.name for each in generated.in_order(1, every)]
    assert names == [each.name for each in generated.in_order(1, every)] and len(set(names)) == len(names)
    assert names != [each.name for each in generated.in_order(2, every)] and sorted(names) == sorted(
        each.name for each in every
    )
