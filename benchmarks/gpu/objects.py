"""The kernels' objects, compiled on a machine without a GPU and linked on one with it.

    python -m benchmarks.gpu.objects            # before the visit: compiles them into build/gpu-objects
    python -m benchmarks.gpu.objects --link     # on the visit: compiles the host code, links, imports the result

Compiling the kernels is most of a build; their objects know nothing of Python. Objects of other sources, options or
another release of CUDA are not linked: all is compiled then, and the log says why. Before the visit the commit is noted
as well, for a copy of the checkout that has no history.
"""

import hashlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click

from benchmarks import ROOT
from benchmarks.cuda_resources import toolkit
from fastlora.environment import note_commit

FOLDER = ROOT / "build" / "gpu-objects"
_DIGEST = "digest"


def digest(setup: ModuleType) -> str:
    """Changes with what the objects are compiled from, how, and the release of the compiler."""
    release = ".".join((toolkit.nvcc_version() or "none").split(".")[:2])
    given = (toolkit.source_digest(), setup.FLAGS, setup.debug_flags(), release)
    return hashlib.sha256(repr(given).encode()).hexdigest()[:16]


def prepare(folder: Path = FOLDER) -> None:
    """Compiles the kernels' objects into ``folder``."""
    setup = toolkit.load_setup()
    if setup.NVCC is None:
        raise click.ClickException("nvcc is neither on PATH nor in /usr/local/cuda/bin")
    (folder / _DIGEST).unlink(missing_ok=True)
    setup.compile_kernels(folder)
    (folder / _DIGEST).write_text(digest(setup) + "\n")


def why_unusable(folder: Path, setup: ModuleType) -> str | None:
    """Why the objects in ``folder`` are not to be linked here, or None."""
    try:
        found = (folder / _DIGEST).read_text().strip()
    except FileNotFoundError:
        return f"there are none in {folder}"
    if found != digest(setup):
        return "they are of other sources, options or another release of CUDA"
    missing = [name for name in setup.kernel_objects() if not (folder / name).exists()]
    return f"{', '.join(missing)} missing" if missing else None


def link(out: Path, temp: Path, folder: Path = FOLDER) -> None:
    """Builds the extension ``out``, with the objects in ``folder`` where they serve.

    Raises:
        subprocess.CalledProcessError: it does not build, not even from the sources alone.
    """
    setup = toolkit.load_setup()
    if setup.NVCC is None:
        raise click.ClickException("nvcc is neither on PATH nor in /usr/local/cuda/bin")
    reason = why_unusable(folder, setup)
    if reason is None:
        try:
            setup.build_library(out, temp / "linked", folder)
            return
        except subprocess.CalledProcessError:
            reason = "linking them failed, as above"
    print(f"compiling every kernel: of objects made beforehand, {reason}", flush=True)
    setup.build_library(out, temp / "compiled")


def check(library: Path) -> None:
    """Imports a built extension in a process of its own, and prints how many kernels it has.

    Raises:
        subprocess.CalledProcessError: it cannot be imported.
    """
    code = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('fastlora._C', sys.argv[1]);"
        " module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module);"
        " print(len(module.variants()), 'kernels in', sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(library)], check=True)


@click.command()
@click.option("--link", "links", is_flag=True, help="Link here what was compiled before.")
@click.option("--folder", default=FOLDER, type=click.Path(file_okay=False, path_type=Path), help="Of the objects.")
@click.option("--out", default=None, type=click.Path(dir_okay=False, path_type=Path), help="Another extension.")
def main(links: bool, folder: Path, out: Path | None) -> None:
    """Compile the kernels' objects, or link them."""
    try:
        if not links:
            prepare(folder)
            note_commit(ROOT)
            click.echo(f"{len(toolkit.load_setup().kernel_objects())} objects in {folder}")
            return
        library = out or toolkit.load_setup().in_place()
        link(library, ROOT / "build" / "gpu-link" if out is None else out.parent / "gpu-link", folder)
        check(library)
    except (subprocess.CalledProcessError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
