"""Imports flow downwards: the layers are data here, and the sources are parsed, so that imports in functions count."""

import ast
import re
from pathlib import Path

import pytest

import fastlora

PACKAGE = Path(fastlora.__file__).parent

# From the ground floor up. A name is a module or a package under fastlora/, "__init__" fastlora itself. A
# module imports from its own layer and from lower ones; nowhere is there a circle.
LAYERS = (
    ("_C", "problem", "philox", "files", "errors", "tables", "environment", "counts"),
    (
        "checks",
        "own_forward",
        "layer_checks",
        "rows",
        "saved_tensors",
        "save_pretrained",
        "heads",
        "outputs",
        "operands",
        "projections",
        "segments",
        "quantised_weight",
        "quantised_operands",
        "scaled_operands",
        "column_scale",
    ),  # fmt: skip
    ("backends",),
    ("selection",),
    ("routes",),
    ("one_launch",),
    ("dispatch",),
    ("differentiable",),
    ("op_tools", "quantised_layer"),
    ("ops",),
    ("scaled_layer",),
    ("dora",),
    ("sharding",),
    ("grouped", "shared_input"),
    ("experts",),
    ("placement",),
    ("merging",),
    ("branch",),
    ("module",),
    ("conv1d", "quantised_module", "experts_module"),
    ("targets", "refusals"),
    ("model",),
    ("adapters",),
    ("integrations", "analysis", "warming"),
    ("__init__",),
    ("finetune", "hub_kernel"),
    ("bench",),
    ("study",),
    ("cli",),
)
_TEST_IMPORT = re.compile(r"\s*(from|import) tests\.\w+(\.| import (.*\W)?)test_")
_PATH_EDIT = re.compile(r"\bsys\.path\.(insert|append|extend)\(|\bsys\.path *[+]?= ")
# Backends know nothing of each other: selection chooses.
APART = ("backends.cuda", "backends.triton", "backends.reference")
ON_TOP = "backends.composed"  # of the others: torch's products, Triton's mask
# (importer, imported): imports in functions that may make a circle. Each needs a reason.
ALLOWED: dict[tuple[str, str], str] = {}


def modules(package: Path) -> dict[str, Path]:
    """Name under the package -> file; a package's name stands for its __init__.py."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: set[str], package: str = "fastlora") -> set[str]:
    """Which of the known modules a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports are not used here"
            # `from fastlora import philox` is that module alone; `from fastlora import __version__` the package.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [each if _under(each, package) in known else node.module for each in names]
        else:
            continue
        found |= {_under(each, package) for each in names}
    return (found & known) - {name}


def _under(name: str, package: str) -> str:
    """The name under the package, "__init__" for the package itself, nothing for what is elsewhere."""
    if name == package:
        return "__init__"
    return name.removeprefix(f"{package}.") if name.startswith(f"{package}.") else ""


def graph(package: Path) -> dict[str, set[str]]:
    found = modules(package)
    return {name: imports(name, path, {*found, "_C"}) for name, path in found.items()}  # _C is compiled


def layer_of(name: str) -> int:
    (level,) = (i for i, names in enumerate(LAYERS) if name.split(".")[0] in names)
    return level


def upward(edges: dict[str, set[str]]) -> list[str]:
    return [
        f"{importer} imports {imported}"
        for importer, found in edges.items()
        for imported in sorted(found)
        if layer_of(imported) > layer_of(importer) and (importer, imported) not in ALLOWED
    ]


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """A circle of imports, if there is one: those are taken away that import nothing that is left."""
    left = {name: {each for each in found if (name, each) not in ALLOWED} for name, found in edges.items()}
    while leaves := [name for name, found in left.items() if not found & left.keys()]:
        for name in leaves:
            del left[name]
    if not left:
        return None
    path = [min(left)]
    while path.count(path[-1]) == 1:
        path.append(min(left[path[-1]] & left.keys()))
    return path[path.index(path[-1]) :]


def test_every_module_has_a_layer():
    known = {name for names in LAYERS for name in names}
    unknown = {name.split(".")[0] for name in modules(PACKAGE)} - known
    assert not unknown, f"say in LAYERS which layer they are in: {sorted(unknown)}"


def test_imports_go_downwards_only():
    assert upward(graph(PACKAGE)) == []


def test_there_is_no_circle_of_imports():
    assert circle(graph(PACKAGE)) is None


def test_backends_do_not_import_each_other():
    def side(name: str) -> str | None:
        return next((each for each in APART if name == each or name.startswith(f"{each}.")), None)

    mixed = [
        f"{importer} imports {imported}"
        for importer, found in graph(PACKAGE).items()
        for imported in found
        if side(importer) and side(imported) and side(importer) != side(imported)
    ]
    assert mixed == []
    edges = graph(PACKAGE)
    assert ON_TOP in edges and not [name for name in edges if side(name) and ON_TOP in edges[name]]


def test_quantising_libraries_are_imported_where_their_tensors_are_alone():
    """Never by importing a module of fastlora: both are optional, and take seconds."""
    optional = {"bitsandbytes", "torchao"}
    for name, path in modules(PACKAGE).items():
        text = path.read_text()
        nodes = list(ast.parse(text).body) if any(library in text for library in optional) else []
        for node in nodes:  # and, as it grows, all that is not in a function
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
                assert not optional & {each.partition(".")[0] for each in names}, name
            elif not isinstance(node, ast.FunctionDef):
                nodes += ast.iter_child_nodes(node)


def test_what_is_allowed_is_there():
    edges = graph(PACKAGE)
    assert all(imported in edges.get(importer, ()) for importer, imported in ALLOWED)


@pytest.mark.parametrize(
    "text, found",
    [
        ("import fastlora.model", {"model"}),
        ("from fastlora.model import inject", {"model"}),
        ("from fastlora import model", {"model"}),
        ("from fastlora import __version__, model", {"model", "__init__"}),
        ("from fastlora import _C", {"_C"}),
        ("def late():\n    from fastlora.cli import main", {"cli.main"}),
        ("import torch\nfrom fastloratory import model", set()),
    ],
)
def test_imports_are_read_from_the_source(tmp_path, text, found):
    path = tmp_path / "ops.py"
    path.write_text(text)
    assert imports("ops", path, {"__init__", "_C", "ops", "model", "cli", "cli.main"}) == found


def test_a_planted_import_is_found():
    edges = {"problem": set(), "ops": {"problem"}, "module": {"ops"}}
    assert upward(edges) == [] and circle(edges) is None
    edges["problem"] = {"module"}
    assert upward(edges) == ["problem imports module"]
    assert circle(edges) == ["module", "ops", "problem", "module"]


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_what_tests_share_is_in_support(folder):
    """No test module is imported, not by a script in a string either, and nothing edits the search path."""
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}: {line.strip()}"
        for path in sorted((PACKAGE.parent / folder).rglob("*.py"))
        for line in path.read_text().splitlines()
        if _TEST_IMPORT.match(line) or _PATH_EDIT.search(line)
    ]
    assert wrong == []
