"""The README is short, in order, true: its code runs and prints what it says, its numbers are those of the results."""

import json
import re
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from benchmarks import ROOT, readme_picture
from benchmarks.traffic import projections
from fastlora.backends.configs import MAX_RANK
from fastlora.backends.cuda import extension
from fastlora.bench.verdict import means_over_cases
from fastlora.finetune import summary
from fastlora.finetune.compare import Agreement
from fastlora.finetune.models import ModelSource

try:
    import tomllib
except ImportError:  # Python 3.10
    import pip._vendor.tomli as tomllib

TEXT, MAKEFILE = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
HEADINGS = (
    "Use it if", "Install", "With PEFT and Trainer", "Without PEFT", "Commands", "What it composes with",
    "What it saves", "How it works", "Verified, and not; results", "Work on it",
)  # fmt: skip
PAGES = sorted(
    path
    for pattern in ("*.md", "*/README.md", "*/*/README.md", "*/*/*/README.md")
    for path in ROOT.glob(pattern)
    if not {".venv", "build", "dist"} & set(path.relative_to(ROOT).parts)
)
LINK = re.compile(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)")


def section(name: str) -> str:
    return TEXT.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_it_is_read_in_a_minute():
    assert len(TEXT.splitlines()) <= 150
    assert tuple(re.findall(r"^## (.*)$", TEXT, re.MULTILINE)) == HEADINGS
    assert len(re.findall(r"^!\[", TEXT, re.MULTILINE)) == 1
    numbered = re.findall(r"^(\d+)\. ", section("How it works"), re.MULTILINE)
    assert numbered == [str(i) for i in range(1, 13)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {path}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {path}#{anchor}"


def test_every_folder_of_readers_has_a_page():
    """What the README leaves out stands beside what it describes."""
    linked = {path for path, _ in LINK.findall(TEXT)}
    assert {"csrc/README.md", "fastlora/backends/README.md", "benchmarks/README.md", "tests/README.md"} <= linked


@pytest.mark.parametrize("name", ["With PEFT and Trainer", "Without PEFT"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_its_scripts_are_whole_and_print_what_it_says(name, tmp_path, monkeypatch, capsys):
    if name == "With PEFT and Trainer":
        pytest.importorskip("peft")
        pytest.importorskip("accelerate")
    import fastlora

    (script,), expected = blocks(section(name), "python"), blocks(section(name), "text")
    lines = [line for text in expected for line in text.splitlines()]
    lines += re.findall(r"# prints (.*?)(?:[;:] .*)?$", script, re.MULTILINE)
    assert len(lines) == script.count("print(")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTLORA_BACKEND", raising=False)
    fastlora.reset_dispatch_counts()
    exec(compile(script, name, "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out.splitlines()
    for line in lines:
        if torch.cuda.is_available() and line.startswith("{"):
            continue  # counts of the reference, from a machine without one
        assert line in printed
    counts = fastlora.dispatch_counts()
    assert counts["fallbacks"] == {} and sum(n for key, n in counts.items() if key != "fallbacks") in (4, 112)
    assert (tmp_path / "build").is_dir()


def test_the_versions_that_it_asks_for_are_the_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = project["dependencies"] + [each for extra in ("triton", "peft", "finetune") for each in
                                        project["optional-dependencies"][extra]]  # fmt: skip
    least = {r.name: next(iter(r.specifier)).version for r in map(Requirement, listed) if len(r.specifier) == 1}
    least["python"] = project["requires-python"].removeprefix(">=")
    asked = section("Use it if").replace("\n ", "")
    for name, shown in (
        ("python", "Python"), ("torch", "torch"), ("triton", "Triton"), ("peft", "PEFT"),
        ("transformers", "transformers"),
    ):  # fmt: skip
        assert f"{shown} {least[name]}" in asked, f"{shown} {least[name]}"
    import fastlora

    assert f"version {fastlora.__version__}" in TEXT
    assert f"rank above {MAX_RANK}" in section("What it composes with")


def test_the_versions_that_the_tests_ran_with_are_those_of_the_counts():
    ran = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "bench.json").read_text())["environment"]["versions"]
    said = section("Use it if").replace("\n ", "")
    for name, shown in (("torch", "torch"), ("triton", "Triton"), ("peft", "PEFT"), ("transformers", "transformers")):
        assert f"{shown} {ran[name].partition('+')[0]}" in said


def test_its_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\[(\w+)\]", blocks(section("Install"), "bash")[0])) <= set(extras)


def test_info_prints_what_it_shows():
    from fastlora import available_backends

    if torch.cuda.is_available():
        pytest.skip("it shows a machine without a GPU")
    (shown,) = blocks(section("Install"), "text")
    lines = shown.splitlines()
    from fastlora.cli.info import as_text, collect

    if extension.load()[0] is None:
        lines = [line for line in lines if line.split()[0] != "cuda"]  # it shows one where nvcc is
    printed = as_text(collect()).splitlines()
    assert set(lines) <= set(printed) and set(available_backends()) & {line.split()[0] for line in lines}


def test_the_picture_shows_the_numbers_that_are_there():
    numbers = json.loads(json.dumps(readme_picture.current()))
    assert readme_picture.carried(readme_picture.PICTURE) == numbers
    assert numbers["launches"]["fastlora"] == [1, 1] and len(numbers["saved MiB"]) == 5
    assert readme_picture.PICTURE.stat().st_size < 150_000


def test_the_table_of_layers_that_share_an_input_is_the_counted_one():
    counted = projections.projection_table(json.loads(projections.RESULT.read_text())).rows
    shown = re.findall(r"^\| (q, k, v|gate, up) \| (.*) \|$", section("What it saves"), re.MULTILINE)
    assert [name for name, _ in shown] == list(projections.GROUPS)
    for name, cells in shown:
        of_group = [row for row in counted if row[0] == name]
        wanted = [f"{row[2]} + {row[5]}; {row[3]} + {row[6]}" for row in of_group]
        assert len(wanted) == 4 and cells.split(" | ") == wanted


def test_a_picture_of_other_numbers_is_found(tmp_path):
    path = tmp_path / "picture.png"
    readme_picture.draw(readme_picture.current()).savefig(path)
    assert readme_picture.carried(path) is None


def test_the_result_in_a_line_is_the_results():
    report = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "bench.json").read_text())
    means, cases = means_over_cases(report["layer"])
    assert cases == 5 and "five shapes" in section("Verified, and not; results")
    assert f"takes {means['fastlora']:.2f} times the frozen layer's (PEFT: {means['peft']:.2f})" in section(
        "Verified, and not; results"
    )


def test_the_makefile_uses_the_python_that_it_names():
    (default,) = re.findall(r"^PYTHON \?= (\S+)$", MAKEFILE, re.MULTILINE)
    (folder,) = re.findall(r"^VENV := (\S+)$", MAKEFILE, re.MULTILINE)
    said = section("Work on it")
    assert f"`{default}` unless `make PYTHON=...`" in said and f"`{folder}`" in said
    for target in re.findall(r"`make (\w+)`", said):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


def test_the_demo_said_what_it_shows():
    """Of the run whose report is among the results; its summary is made of the report, and so are the lines."""
    folder = ROOT / "benchmarks" / "results" / "demo"
    report = json.loads((folder / "report.json").read_text())
    agreement, model = Agreement(**report["agreement"]), ModelSource(report["model"])
    said = summary.text(report, agreement, model, Path("build/demo")).splitlines()
    (shown,) = blocks(section("Commands"), "text")
    lines = shown.splitlines()
    assert len(lines) == 6 and [line for line in said if line in lines] == lines
    (command,) = re.findall(r"^\t\$\(RUN\) -m fastlora.cli.main finetune (.*)$", MAKEFILE, re.MULTILINE)
    assert report["settings"]["compare"] == "peft" and "--compare peft" in command
    assert report["settings"]["measure_full"] == ("--measure-full" in command)


def test_ci_runs_the_commands_that_it_names():
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "make test" in script and any(line.startswith("make demo") for line in script)
