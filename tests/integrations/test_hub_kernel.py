"""The kernel repository for Hugging Face's `kernels`: built by its command, loaded from a local path."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import ROOT
from fastlora import hub_kernel

# Loads a build variant as `kernels` does, where nothing can be imported but the standard library, torch, Triton, NumPy
# and the kernel itself; imports every module of it; then one layer by Triton's kernels, interpreted.
ALONE = """
import importlib.abc, importlib.util, json, sys
from pathlib import Path
import numpy, torch, triton, triton.language, triton.tools.tensor_descriptor, triton.runtime.interpreter

variant, repairs = Path(sys.argv[1]), sys.argv[2]
name = json.loads((variant / "metadata.json").read_text())["id"]
allowed = {*sys.stdlib_module_names, "numpy", "torch", "triton", "repairs", name}

class Nothing(importlib.abc.MetaPathFinder):
    def find_spec(self, module, path, target=None):
        if module.partition(".")[0] not in allowed:
            raise ImportError(f"{module} is not there")

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

nothing = Nothing()
sys.meta_path.insert(0, nothing)
load("repairs", repairs).install()
kernel = load(name, variant / "__init__.py")
modules = [".".join(path.relative_to(variant).with_suffix("").parts) for path in variant.rglob("*.py")]
for module in modules:
    importlib.import_module(f"{name}.{module}".removesuffix(".__init__"))
assert not [module for module in sys.modules if module.partition(".")[0] == "fastlora"]

torch.manual_seed(0)
x, weight, a, b = torch.randn(5, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
found = []
for backend in ("triton", "reference"):
    leaves = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
    y = kernel.lora_linear(leaves[0], weight, *leaves[1:], 2.0, backend=backend)
    y.square().sum().backward()
    found.append([y.detach(), *(leaf.grad for leaf in leaves)])
sys.meta_path.remove(nothing)  # torch's comparison imports more
torch.testing.assert_close(*found)
torch.testing.assert_close(found[0][0], x @ weight.T + 2.0 * (x @ a.T) @ b.T)
print(json.dumps({"modules": len(modules), "counts": kernel.dispatch_counts()}))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hub")
    command = [sys.executable, "-m", "fastlora.hub_kernel", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(directory / "build" / f"torch-{name}") for name in ("cuda", "cpu")]
    return directory


def variants(repository: Path) -> list[Path]:
    return sorted((repository / "build").iterdir())


def test_the_layout_is_what_the_hub_asks_for(repository):
    seen = []
    for folder in variants(repository):
        described = json.loads((folder / "metadata.json").read_text())
        assert set(described) == {"id", "name", "version", "license", "python-depends", "backend"}
        assert folder.name == f"torch-{described['backend']['type']}" and described["id"].isidentifier()
        assert (folder / "__init__.py").is_file() and (folder / "layers.py").is_file()
        assert not list(folder.rglob("*.so")) and not list(folder.rglob("__pycache__"))
        seen.append(described["id"])
    assert len(set(seen)) == len(seen) == 2
    assert sum(path.stat().st_size for path in repository.rglob("*.py")) < 2**20


def test_nothing_in_it_is_of_an_installed_fastlora(repository):
    """Neither imported, nor an operator of the same name, of which a process may have one."""
    for path in repository.rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.strip().startswith(("from fastlora", "import fastlora")), f"{path}: {line}"
            assert "ops.fastlora." not in line and "fastlora::" not in line and '"fastlora._' not in line, line


def test_the_variants_differ_in_names_alone(repository):
    texts = []
    for folder in variants(repository):
        name = json.loads((folder / "metadata.json").read_text())["id"].removeprefix("_")
        files = sorted(folder.rglob("*.py"))
        texts.append({path.relative_to(folder): path.read_text().replace(name, "NAME") for path in files})
    assert texts[0] == texts[1]


def test_it_needs_torch_triton_and_numpy_alone(repository, tmp_path):
    pytest.importorskip("triton")
    variant = repository / "build" / "torch-cuda"
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "FASTLORA_BACKEND")}
    environment |= {"TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    repairs = ROOT / "tests" / "support" / "interpreter.py"
    command = [sys.executable, str(script), str(variant), str(repairs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["modules"] > 30 and told["counts"]["triton"] == told["counts"]["reference"] == 2


class Module(nn.Module):
    """What a user of the Hub's layer has: the attributes that it reads."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8), requires_grad=False)
        self.bias = None
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(6, 2))
        self.scaling, self.dropout = 2.0, 0.0

    def forward(self, x):
        return F.linear(x, self.weight) + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)


def test_kernels_loads_it_beside_fastlora_and_replaces_a_forward(repository):
    kernels = pytest.importorskip("kernels", reason="needs Hugging Face's kernels: pip install 'fastlora[hub]'")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernel = kernels.get_local_kernel(repository)
    assert kernel.__version__ == __import__("fastlora").__version__
    module = Module().to(device)
    x = torch.randn(5, 8, device=device)
    expected = module(x)
    model = nn.Sequential(kernels.use_kernel_forward_from_hub("LoRALinear")(Module)()).to(device)
    model[0].load_state_dict(module.state_dict())
    layer = kernels.LocalLayerRepository(repo_path=repository, layer_name="LoRALinear")
    kernel.reset_dispatch_counts()
    with kernels.use_kernel_mapping({"LoRALinear": {device: layer}}, inherit_mapping=False):
        model = kernels.kernelize(model, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, device=device)
    y = model(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    counts = kernel.dispatch_counts()
    assert sum(n for name, n in counts.items() if name != "fallbacks") == 2 and model[0].lora_A.grad is not None
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


class TestSources:
    def package(self, tmp_path, **files):
        for name, text in files.items():
            path = tmp_path.joinpath(*name.split("__")).with_suffix(".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return tmp_path

    def test_what_is_imported_anywhere_is_taken_along(self, tmp_path):
        package = self.package(
            tmp_path, ops="from fastlora import one\n", one="def late():\n    from fastlora.two.deep import x\n",
            two____init__="", two__deep="import math, torch\nfrom fastlora import _C\n", other="import click\n",
        )  # fmt: skip
        (tmp_path / "two" / "__init__.py").touch()
        assert set(hub_kernel.sources(package)) == {"ops.py", "one.py", "two/deep.py", "two/__init__.py"}

    @pytest.mark.parametrize(
        "text, named",
        [
            ("import safetensors", "safetensors"),
            ("def late():\n    from packaging.version import Version", "packaging.version.Version"),
            ("try:\n    import click\nexcept ValueError:\n    pass", "click"),
        ],
    )
    def test_what_else_is_imported_is_refused(self, tmp_path, text, named):
        with pytest.raises(ValueError, match=rf"ops\.py imports {named}, which"):
            hub_kernel.sources(self.package(tmp_path, ops=text))

    def test_what_a_module_does_without_may_be_missing(self, tmp_path):
        text = "try:\n    import platformdirs\nexcept ImportError:\n    platformdirs = None\n"
        assert set(hub_kernel.sources(self.package(tmp_path, ops=text))) == {"ops.py"}

    def test_a_module_that_is_not_there_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match=r"no fastlora\.gone\.x"):
            hub_kernel.sources(self.package(tmp_path, ops="from fastlora.gone import x"))

    @pytest.mark.parametrize(
        "text, depth, expected",
        [
            ("from fastlora import dispatch", 1, "from . import dispatch"),
            ("from fastlora.problem import (\n    Needs,\n)", 1, "from .problem import (\n    Needs,\n)"),
            (
                "    from fastlora.backends.cuda import launch as cuda",
                1,
                "    from .backends.cuda import launch as cuda",
            ),
            ("from fastlora.backends import x", 2, "from ..backends import x"),
            ("from fastlora.problem import x", 3, "from ...problem import x"),
            ('import_module("fastlora._C")', 3, 'import_module("..._C", __package__)'),
            ("torch.ops.fastlora.lora_forward", 1, "torch.ops.other.lora_forward"),
            ('f"fastlora::{name}"', 1, 'f"other::{name}"'),
            ('Library("fastlora", "DEF")', 1, 'Library("other", "DEF")'),
            ('"pip install fastlora"', 1, '"pip install fastlora"'),
            ("from fastloratory import x", 1, "from fastloratory import x"),
        ],
    )
    def test_imports_become_relative_and_operators_their_own(self, text, depth, expected):
        assert hub_kernel.relocated(text, depth, "other") == expected


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--help"]])
def test_the_command_says_how_it_is_called(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_kernel.main(arguments) == "usage: python -m fastlora.hub_kernel DIRECTORY"
    assert not list(tmp_path.iterdir())
