"""The rules that make mutants: each changes one thing, and what it makes is Python."""

import ast
import json
import shutil
import subprocess

import pytest
from click.testing import CliRunner

from benchmarks.mutation import __main__ as search
from tests.support import (
    cpp_mutations,
    cuda_checks,
    cuda_runtime,
    equivalents,
    generated,
    generated_cuda,
    generated_triton,
    mutants,
    python_mutations,
)
from tests.support.generated import Generated
from tests.support.mutation import Mutation

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
    every = generated_triton.mutations()
    names = [each.name for each in generated.in_order(1, every)]
    assert names == [each.name for each in generated.in_order(1, every)] and len(set(names)) == len(names)
    assert names != [each.name for each in generated.in_order(2, every)] and sorted(names) == sorted(
        each.name for each in every
    )


CPP_CASES = {
    "constant": ("x = 4;", {"x = 5;", "x = 3;"}),
    "comparison": ("x = a < b;", {"x = a <= b;", "x = a >= b;"}),
    "operator": ("x = a + b;", {"x = a - b;"}),
    "connective": ("x = a && b;", {"x = a || b;"}),
    "condition": ("if (f(a)) x = b;", {"if (!(f(a))) x = b;"}),
    "extreme": ("x = min(a, b);", {"x = max(a, b);"}),
    "narrowed": ("x = int64_t(a) * b;", {"x = int(a) * b;"}),
    "wrong of a pair": ("x = tile.row;", {"x = tile.column;"}),
    "removed": ("c.sync_warpgroup();", {";"}),
    "dropped call": ("c.advance_stage();", {";"}),
    "dropped statement": ("p.count = a;", {";"}),
    "moved": ("fence_async_shared();\n  x = b;", {"x = b;\n  fence_async_shared();"}),
}


@pytest.mark.parametrize("rule", CPP_CASES)
def test_a_rule_for_cpp(rule):
    body, wanted = CPP_CASES[rule]
    text = f"// 7 + 8\nvoid f() {{  // a < b\n  {body}\n}}\n"
    found = {m.apply(text) for m in cpp_mutations.find(text) if m.rule == rule}
    assert found >= {text.replace(body, each) for each in wanted}
    assert all(m.apply(text).startswith("// 7 + 8") for m in cpp_mutations.find(text)), "comments are left alone"


def test_mutants_of_csrc():
    found = generated_cuda.mutations()
    assert {each.path for each in found} >= {"csrc/schedule.h", "csrc/sm90/producer.cuh", "csrc/host/plan.cpp"}
    assert not any("wgmma.cuh" in each.path or "spin" in each.path for each in found)
    assert len({each.name for each in found}) == len(found)
    changes = {(each.path, each.mutation.start, each.mutation.end, each.mutation.new) for each in found}
    assert len(changes) == len(found), "no two are the same text"


@cuda_checks.needs_kernels
def test_what_the_host_knows_of_mutated_kernels_is_theirs():
    """Of sources that say the same, what the extension says; of others, what they come to."""
    path, old = "csrc/sm90/kernel.cuh", "v.shared_bytes = Traits::kSharedBytes;"
    start = (generated.ROOT / path).read_text().index(old)
    name = "lora_sm90_forward_bf16_64x128_r16"
    found = {}
    for new in (old.replace(" = ", "  = "), ";"):
        compiled = generated_cuda.Compiled(Generated(path, Mutation("", start, start + len(old), old, new)))
        assert ".entry" in compiled.ptx(name)
        found[new] = dict(zip(cuda_runtime.NUMBERS, compiled.numbers[name], strict=True))
    same, other = found.values()
    (variant,) = (each for each in cuda_checks.variants() if each["name"] == name)
    assert same == {number: variant.get(number, 0) for number in same}
    assert other == same | {"shared_bytes": 0}


def test_what_is_called_the_same_is_a_mutant():
    """Of the sources as they are; else a change has left a reason behind."""
    lines = {
        (each.path.rpartition("/")[2], each.mutated_lines)
        for each in (*generated_triton.mutations(), *generated_cuda.mutations())
    }
    assert not equivalents.REASONS.keys() - lines


def test_rows_of_other_sources_are_not_resumed(tmp_path):
    old = json.dumps({"seed": 1, "commit": "abc", "sources": "others", "rows": []})
    (tmp_path / "mutation.json").write_text(old)
    result = CliRunner().invoke(search.main, ["--resume", "--output", str(tmp_path)])
    assert result.exit_code == 2 and "of other sources (commit abc)" in result.output
    assert (tmp_path / "mutation.json").read_text() == old and len([*tmp_path.iterdir()]) == 1


def test_sources_that_change_during_the_search_end_it(tmp_path, monkeypatch):
    states = iter(["before", "before", "after"])
    monkeypatch.setattr(search, "mutated_sources", lambda: next(states))
    monkeypatch.setattr(search, "run", lambda *arguments: arguments[-1]([]) or [])
    result = CliRunner().invoke(search.main, ["--output", str(tmp_path)])
    assert result.exit_code == 1 and "changed during the search" in result.output
    assert json.loads((tmp_path / "mutation.json").read_text())["sources"] == "before"


@pytest.mark.skipif(not shutil.which("git"), reason="a copy has what git knows of")
def test_a_test_that_fails_without_the_mutation_says_nothing(tmp_path, monkeypatch):
    (tmp_path / "fastlora").mkdir()
    (tmp_path / "fastlora" / "value.py").write_text("VALUE = 1\n")
    (tmp_path / "test_it.py").write_text(
        "import os\nfrom fastlora.value import VALUE\n\ndef test_value():\n"
        "    assert VALUE == 1 and 'BROKEN' not in os.environ, 'it is - not'\n"
    )
    subprocess.run("git init -q . && git add .", shell=True, cwd=tmp_path, check=True)
    monkeypatch.setattr(generated, "ROOT", tmp_path)
    mutant = Generated("fastlora/value.py", Mutation("constant", 8, 9, "1", "2"))
    same = Generated("fastlora/value.py", Mutation("constant", 8, 9, "1", "1"))
    generated.run_tests(same, ((), ("test_it.py",)))
    with pytest.raises(AssertionError, match="FAILED test_it.py::test_value"):
        generated.run_tests(mutant, ((), ("test_it.py",)))
    checks = [("tests", lambda: generated.run_tests(mutant, (("BROKEN=1",), ("test_it.py",))))]
    with pytest.raises(generated.FaultySearch, match="FAILED test_it.py::test_value"):
        generated.findings(checks, 1, must_compile=True)
