"""Writing results so that a failure leaves nothing half-written, and shows as one line."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastlora.errors import CommandError, first_line


def check_writable(directory: Path) -> None:
    """Makes the directory and writes a byte there: work should not start towards a place that cannot take its results.

    Raises:
        CommandError: the directory cannot be made or written to.
    """
    with reported_write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"\0")


@contextmanager
def directory_for_results(directory: Path) -> Iterator[None]:
    """As `check_writable`; directories made for it that are still empty at the end of the block are removed again.

    Raises:
        CommandError: the directory cannot be made or written to.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        check_writable(directory)
        yield
    finally:
        with suppress(OSError):  # one that holds something
            for path in made:
                path.rmdir()


@contextmanager
def reported_write_errors(target: Path) -> Iterator[None]:
    """Turns a write error within the block into a CommandError that names the target and the reason."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise CommandError(f"cannot write {target}: {error.strerror or first_line(error)}") from error
    except SafetensorError as error:
        raise CommandError(f"cannot write {target}: {first_line(error)}") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Writes and syncs, so that a full disk is noticed here and not after the file was moved into place."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file beside its place, then renames it: readers find the old content or the new, never a part.

    Raises:
        CommandError: the data cannot be written; the old file is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with reported_write_errors(path):
            write_bytes(partial, data)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A temporary directory whose entries replace those of the same name in `directory` when the block succeeds.

    Raises:
        CommandError: something cannot be written; `directory` keeps what it had.
    """
    with reported_write_errors(directory):
        stage = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory))
        try:
            yield stage
            for entry in sorted(stage.iterdir()):
                _move_into(entry, directory / entry.name)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _move_into(source: Path, target: Path) -> None:
    """Renames over the target. A directory cannot be renamed over one with files, so the old one steps aside first."""
    if not source.is_dir() or not target.exists():
        os.replace(source, target)
        return
    old = source.with_name(f"{source.name}.old")
    os.replace(target, old)
    try:
        os.replace(source, target)
    except OSError:
        os.replace(old, target)
        raise
