"""Pattern keys: PEFT's own matcher over random keys and paths, and keys that make a matcher run for ever."""

import itertools
import random
import re
import time

import pytest

from fastlora.adapters.automata import Automaton
from fastlora.adapters.patterns import Patterns

PIECES = ["a", "b", ".", r"\.", "[ab]", "[^a]", "[a-c]", r"\d", r"\w", "(a|b)", "(?:a.b|c)", "^", "$", "|", "a*", ".*"]
PIECES += ["(ab)+", "(a*)*", "b{2}", "c{1,2}", "(a|b){2,}", ".+?", "1", "(?P<n>b)?", "c{,1}", r"[\d.]"]
PATHS = ["".join(letters) for n in (1, 3, 5) for letters in itertools.product("ab.1", repeat=n)][::7]
PATHS += ["model.layers.1.q_proj", "model.layers.11.q_proj", "c.b", "a_b.cc", "layers.0", "ab-c"]


def peft_value(pattern, path, default):
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


@pytest.mark.parametrize("seed", range(6))
def test_as_peft_matches_them(seed):
    chance = random.Random(seed)
    hits = 0
    for _ in range(40):
        pattern = {}
        for number in range(3):
            key = "".join(chance.choices(PIECES, k=chance.randint(1, 4)))
            try:
                re.compile(key)
            except re.error:
                continue
            pattern[key] = number
        patterns = Patterns(pattern)
        for path in PATHS:
            expected = peft_value(pattern, path, None)
            assert patterns.value(path, None) == expected, (pattern, path)
            hits += expected is not None
    assert hits > 1000


@pytest.mark.parametrize(
    "key",
    ["^model.layers.1.q_proj", r"^model\.layers\.1\.q_proj", "layers.1.q_proj", r"layers\.1\.q_proj$", "1.q_proj"]
    + [r"layers\.\d+\.q_proj", "(layers.1|layers.2).q_proj", ".*q_proj", "ers.1.q_proj", "q_pro", "layersX1.q_proj"],
)
def test_keys_of_real_files(key):
    for path in PATHS:
        assert Patterns({key: 1}).value(path, 0) == peft_value({key: 1}, path, 0), path


def test_the_first_of_the_keys_counts_whatever_their_kinds():
    for pattern in ({"b": 1, ".*b": 2}, {".*b": 2, "b": 1}, {"x": 3, "^a.b": 1, "b": 4}, {"b": 4, "a.b": 1, "[b]": 5}):
        assert Patterns(pattern).value("a.b", 0) == next(v for k, v in pattern.items() if k != "x")


@pytest.mark.parametrize(
    "key", ["(a+)+b", "(a|a)*b", "(a|aa)+$", "(.*)*c", "((a*)*)*b", "(a*)*" * 300, "(a{0,30}){0,30}b", ".*" * 200 + "c"]
)
def test_no_key_takes_long(key):
    start = time.process_time()
    try:
        for layer in range(4):
            assert Patterns({key: 1}).value(f"layers.{layer}." + "a" * 60 + "!", 0) == 0
    except ValueError as error:
        assert "pattern key" in str(error)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("(" * 3000 + "a" + ")" * 3000, "has 6001 characters, 2000 are the most"),
        ("(" * 400 + "a" + ")" * 400, "nested"),
        ("(?:" * 51 + "a" + ")" * 51, "groups nested more than 50 deep"),
        ("a{1000}{1000}", "not a regular expression: multiple repeat"),
        ("(a{1000}){1000}", "repetitions of too many parts"),
        ("(){99999999}", "repetitions of too many parts"),
        ("a{99999999999999999999}", "not a regular expression"),
        (r"(a)\1", r"has \\1"),
        ("a(?=b)", r"has a group '\(\?=b'"),
        ("(?i)a", r"has a group '\(\?i\)'"),
        (r"\bq", r"has \\b"),
        ("[a", "not a regular expression: unterminated character set"),
    ],
)
def test_keys_that_are_refused(key, message):
    start = time.process_time()
    with pytest.raises(ValueError, match=rf"(?s)pattern key .*{message}"):
        Patterns({key: 1})
    assert time.process_time() - start < 1


def test_many_names_are_looked_up_and_many_expressions_refused_in_time():
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(60) for j in range(100)]
    start = time.process_time()
    patterns = Patterns({name: i for i, name in enumerate(names)} | {f"^{re.escape(n)}x": -1 for n in names})
    assert [patterns.value(name, None) for name in names] == list(range(len(names)))
    patterns = Patterns({f"{name}.*x": 1 for name in names[:500]})
    with pytest.raises(ValueError, match="take too long to match: write out the names"):
        for name in names:
            patterns.value(name, None)
    assert time.process_time() - start < 3


def test_only_the_end_of_a_path_from_a_dot_on_matches():
    assert [Automaton("b+").matches(text)[0] for text in ("b", "a.b", "ab", "b.a", "a.bb")] == [1, 1, 0, 0, 1]


@pytest.mark.parametrize("kind", ["x{}", "x{}.*", "(x{})+", "x{}|y"])
def test_keys_that_are_too_many(kind):
    start = time.process_time()
    with pytest.raises(ValueError, match="keys"):
        Patterns({kind.format(i): 1 for i in range(210_000)})
    assert time.process_time() - start < 1
