"""The layer as a Hugging Face ``kernels`` repository: the same sources, in the layout that ``get_kernel`` loads.

    python -m fastlora.hub_kernel build/hub-kernel

writes a build variant for CUDA and one for CPUs, both in plain Python and Triton. There is no compiled extension in
them: the CUDA kernels say that they are not built, and Triton's serve. Each variant is a package of its own, which
imports torch, Triton, NumPy and the standard library alone, under whatever name it is loaded, beside an installed
fastlora or without one::

    from kernels import get_local_kernel

    kernel = get_local_kernel(Path("build/hub-kernel"))
    y = kernel.lora_linear(x, weight, lora_a, lora_b, scaling)

``layers.LoRALinear`` is the layer for ``kernels.use_kernel_forward_from_hub``: its forward replaces that of a module
with the attributes of ``fastlora.LoRALinear``: weight, bias, lora_A, lora_B, scaling, dropout.

Source:
    "Kernel requirements" in the documentation of Hugging Face's kernels, version 0.17.
"""

import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import fastlora
from fastlora.files import write_files

NAME = "fastlora"
ROOT_MODULE = "ops"  # and all that it imports
EXTENSION = "_C"
BACKENDS = ("cuda", "cpu")  # of the build variants, as `kernels` names them
VERSION = 1  # of the layers' interface
ALLOWED = {*sys.stdlib_module_names, "torch", "triton", "numpy"}
# Imports in a statement, and by name: the extension's.
_IMPORT = re.compile(r"^(\s*)from fastlora(\.[\w.]+)? import (?=\S)", re.MULTILINE)
# How the sources name the operators' library. It has one owner in a process: the kernel's has a name of its own.
_BY_NAME = re.compile(r'import_module\("fastlora\.(\w+)"\)')
_LIBRARY = re.compile(r'(?<=torch\.ops\.)fastlora\b|(?<=["\'])fastlora(?=::)|(?<=Library\(["\'])fastlora(?=["\'])')

_INIT = '''"""LoRA layers in one kernel launch forward and one backward: fastlora {version} as a kernel of the Hub."""

from . import layers
from .counts import dispatch_counts, reset_dispatch_counts
from .selection import available_backends
from .ops import lora_linear

__version__ = "{version}"
__all__ = [
    "available_backends",
    "dispatch_counts",
    "layers",
    "lora_linear",
    "reset_dispatch_counts",
]
'''

_LAYERS = '''"""Layers whose forward replaces that of a module with the same attributes."""

import torch
from torch import Tensor, nn

from .ops import lora_linear


class LoRALinear(nn.Module):
    """y = x·weightᵀ + scaling·(dropout(x)·lora_Aᵀ)·lora_Bᵀ + bias.

    The module that is served has: weight [out_features, in_features], frozen; bias [out_features] or None; lora_A [r,
    in_features]; lora_B [out_features, r]; scaling and dropout, numbers.
    """

    can_torch_compile = True
    has_backward = True
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout: float

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.scaling,
            self.bias,
            dropout_p=self.dropout,
            training=self.training,
        )


__all__ = ["LoRALinear"]
'''


def sources(package: Path, root: str = ROOT_MODULE) -> dict[str, Path]:
    """The modules that a module of the package imports, directly or not, and its file: path under the package -> file.

    Raises:
        ValueError: one of them imports something else than torch, Triton, NumPy and the standard library.
    """
    found: dict[str, Path] = {}
    wanted = [root]
    while wanted:
        name = wanted.pop()
        path = _file_of(package, name)
        relative = path.relative_to(package).as_posix()
        if relative in found:
            continue
        found[relative] = path
        for imported in _imports(path):
            if imported.partition(".")[0] == NAME:
                wanted += _modules(package, imported)
            elif imported.partition(".")[0] not in ALLOWED:
                raise ValueError(f"{relative} imports {imported}, which a kernel of the Hub may not")
    for relative in list(found):  # the packages around them
        for folder in list(Path(relative).parents)[:-1]:
            found.setdefault((folder / "__init__.py").as_posix(), package / folder / "__init__.py")
    return found


def _file_of(package: Path, name: str) -> Path:
    path = package.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imports(path: Path) -> Iterable[str]:
    """What a file imports, anywhere in it, but what it does without: in a ``try`` that catches ImportError. Of ``from a
    import b``, a.b, which may be a module."""
    tree = ast.parse(path.read_text())
    optional = {
        id(node)
        for tried in ast.walk(tree)
        if isinstance(tried, ast.Try) and any(_catches(handler) for handler in tried.handlers)
        for statement in tried.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in optional:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _catches(handler: ast.ExceptHandler) -> bool:
    return isinstance(handler.type, ast.Name) and handler.type.id == "ImportError"


def _modules(package: Path, imported: str) -> list[str]:
    """The module that an import names, which is all of it or all but its last part; not the extension, nor fastlora
    itself, of which a kernel has another."""
    name = imported.removeprefix(f"{NAME}.")
    if name == EXTENSION:
        return []
    found = next((each for each in (name, name.rpartition(".")[0]) if each and _file_of(package, each).exists()), None)
    if found is None:
        raise ValueError(f"a kernel of the Hub has no {imported}")
    return [found]


def relocated(text: str, depth: int, library: str) -> str:
    """A source whose imports of fastlora are relative, and whose operators are another library's.

    Args:
        text: of a module of fastlora, which imports no other way than ``from fastlora... import ...``.
        depth: packages above the module, the kernel's own included.
        library: the name of the operators' library.
    """
    text = _IMPORT.sub(lambda found: f"{found[1]}from {'.' * depth}{(found[2] or '.')[1:]} import ", text)
    text = _BY_NAME.sub(lambda found: f'import_module("{"." * depth}{found[1]}", __package__)', text)
    return _LIBRARY.sub(library, text)


def metadata(backend: str, fingerprint: str) -> dict:
    """What ``kernels`` reads of a build variant."""
    return {
        "id": f"_{NAME}_{backend}_{fingerprint}",
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }


def build(directory: Path) -> list[Path]:
    """Writes the repository into a directory: ``build/torch-cuda``, ``build/torch-cpu``. Returns these two.

    Raises:
        ValueError: a source imports what it may not.
        OSError: something cannot be written.
    """
    package = Path(fastlora.__file__).parent
    texts = {name: path.read_text() for name, path in sorted(sources(package).items())}
    texts |= {"__init__.py": _INIT.format(version=fastlora.__version__), "layers.py": _LAYERS}
    fingerprint = hashlib.sha256(json.dumps(sorted(texts.items())).encode()).hexdigest()[:12]
    variants = []
    for backend in BACKENDS:
        folder, library = directory / "build" / f"torch-{backend}", f"{NAME}_{backend}_{fingerprint}"
        files = {name: relocated(text, len(Path(name).parts), library).encode() for name, text in texts.items()}
        files["metadata.json"] = (json.dumps(metadata(backend, fingerprint), indent=2) + "\n").encode()
        write_files(folder, files)
        variants.append(folder)
    return variants


def main(arguments: list[str]) -> str | None:
    """The command. Returns what it has to say where it was called in another way."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        return "usage: python -m fastlora.hub_kernel DIRECTORY"
    for written in build(Path(arguments[0])):
        print(written)
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
