"""Writing results so that a failure leaves nothing half-written, and shows as one line."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastlora.errors import CommandError, first_line
from fastlora.files import replaced_together, write_file


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


def replace_file(path: Path, data: bytes) -> None:
    """Replaces a file: readers find the old content or the new, never a part.

    Raises:
        CommandError: the data cannot be written; the old file is as it was.
    """
    with reported_write_errors(path):
        write_file(path, data)


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A directory to write into, whose files replace those of the same paths in `directory`, as one, when the block
    succeeds.

    Raises:
        CommandError: something cannot be written; `directory` keeps what it had.
    """
    with reported_write_errors(directory), replaced_together(directory) as stage:
        yield stage
