"""Files that are replaced whole, and several files that are replaced as one.

A reader finds the old content or the new, whatever is killed when. The ground floor: standard library alone.

A few files of a directory are exchanged like this. All is written to a stage, a hidden directory beside them: ``new/``,
``old/`` (hard links to what is there now) and ``now``, a symbolic link to ``old``. Each file is replaced by a symbolic
link that leads through ``now``: still the old content. Then ``now`` is replaced by a link to ``new``, by one rename:
every file changes at that instant. At the end the links are replaced by the files that they lead to. A process that is
killed leaves links which lead to the old files, all of them, or to the new; the next writer puts the files in their
place. Where the file system has no links, the old files leave before the first new one comes: an old one and a new one
never lie side by side, but a kill in between leaves them in ``old/`` until the next writer puts them back.
"""

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

try:
    import fcntl
except ImportError:  # not a POSIX system: two writers at once are not kept apart there
    fcntl = None  # type: ignore[assignment]

STAGE_PREFIX = ".fastlora-"
_OLD, _NEW, _NOW, _GONE = "old", "new", "now", "gone"
_PATIENCE, _PAUSE = 5.0, 0.001  # seconds
Result = TypeVar("Result")


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Replaces a file: it has the old content or the new. Directories above it are made.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    path = Path(path)
    write_files(path.parent, {path.name: data})


def write_files(directory: str | os.PathLike, contents: Mapping[str, bytes]) -> None:
    """Replaces several files of a directory as one: all have the old content, or all the new.

    Args:
        directory: made where it is missing.
        contents: what each file holds, by its path within the directory. Others are left as they are.

    Raises:
        OSError: one of them cannot be written; all are as they were.
    """
    with replaced_together(directory) as stage:
        for name, data in contents.items():
            path = stage / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def read_together(paths: Iterable[Path], read: Callable[[], Result], patience: float = _PATIENCE) -> Result:
    """Calls ``read``, which opens these files, until none of them was replaced meanwhile.

    Args:
        patience: seconds after which one more replacement is an error.

    Raises:
        OSError: the files are replaced all the time.
        Whatever ``read`` raises over files that nobody replaced.
    """
    paths, deadline = list(paths), time.monotonic() + patience
    while True:
        before = [_identity(path) for path in paths]
        failure = None
        try:
            result = read()
        except Exception as error:
            failure = error
        if [_identity(path) for path in paths] == before:
            if failure is not None:
                raise failure
            return result
        if time.monotonic() > deadline:
            raise OSError(f"{', '.join(map(str, paths))}: replaced again and again while being read")
        time.sleep(_PAUSE)


@contextmanager
def replaced_together(directory: str | os.PathLike) -> Iterator[Path]:
    """A directory to write into. When the block succeeds, its files replace those of the same paths as one.

    Args:
        directory: made where it is missing, and removed again where the block fails and nothing else came into it.

    Raises:
        OSError: something cannot be written; every file is as it was.
    """
    directory = Path(directory)
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        stage, claim = _make_stage(directory)
        try:
            yield stage / _NEW
            names = sorted(str(path.relative_to(stage / _NEW)) for path in (stage / _NEW).rglob("*") if path.is_file())
            for name in names:
                _sync(stage / _NEW / name)
            with _locked(directory):
                _settle_abandoned(directory)
                _exchange(directory, stage, names)
        finally:
            # Where this fails, the links stay, which lead to the files of one side; the next writer settles them.
            with suppress(OSError), _locked(directory):
                _settle(directory, stage)
            _release(claim)
    except BaseException:
        with suppress(OSError):  # one that holds something
            for path in made:
                path.rmdir()
        raise


def _make_stage(directory: Path) -> tuple[Path, int | None]:
    """A new stage, and the lock on it which tells other writers that its process lives."""
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), _locked(directory):  # another writer, which failed, removed the directory
            stage = directory / f"{STAGE_PREFIX}{os.getpid()}-{secrets.token_hex(6)}"
            stage.mkdir()
            (stage / _NEW).mkdir()
            return stage, _claim(stage, wait=False)


def _exchange(directory: Path, stage: Path, names: list[str]) -> None:
    targets = {name: directory / name for name in names}
    for path in targets.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a directory, not a file to replace")
    if len(names) == 1:  # one rename is enough
        os.replace(stage / _NEW / names[0], targets[names[0]])
        return
    for name in names:
        (stage / _OLD / name).parent.mkdir(parents=True, exist_ok=True)
    try:
        os.symlink(_NEW, stage / f"{_NOW}.{_NEW}")
        os.symlink(_OLD, stage / _NOW)
    except (OSError, NotImplementedError):  # a file system, or a Windows account, that has none
        _exchange_without_links(stage, targets)
        return
    for name, path in targets.items():
        if path.exists():
            _keep(path, stage / _OLD / name)
    for name, path in targets.items():
        link = stage / "link"
        os.symlink(_link(directory, stage, name), link)
        os.replace(link, path)
    os.replace(stage / f"{_NOW}.{_NEW}", stage / _NOW)


def _exchange_without_links(stage: Path, targets: dict[str, Path]) -> None:
    for name, path in targets.items():
        if path.exists():
            os.replace(path, stage / _OLD / name)
    (stage / _GONE).touch()  # from here on an abandoned exchange is finished; before, it is taken back
    placed = []
    try:
        for name, path in targets.items():
            os.replace(stage / _NEW / name, path)
            placed.append(name)
    except BaseException:
        for name in placed:
            os.replace(targets[name], stage / _NEW / name)
        (stage / _GONE).unlink()
        raise


def _keep(path: Path, copy: Path) -> None:
    real = os.path.realpath(path)
    try:
        os.link(real, copy)
    except OSError:  # no hard links here, or another device behind a symbolic link
        shutil.copy2(real, copy)


def _link(directory: Path, stage: Path, name: str) -> str:
    """What the symbolic link in a file's place says: the way from there through ``now``."""
    return os.path.join(os.path.relpath(directory, (directory / name).parent), stage.name, _NOW, name)


def _settle(directory: Path, stage: Path) -> None:
    """Puts the files of the exchange's side into their places, the new ones after its instant and the old ones before,
    and removes the stage."""
    now = stage / _NOW
    side = stage / (os.readlink(now) if now.is_symlink() else _NEW if (stage / _GONE).exists() else _OLD)
    for name in {str(p.relative_to(stage / part)) for part in (_OLD, _NEW) for p in (stage / part).rglob("*")}:
        path, source = directory / name, side / name
        ours = path.is_symlink() and os.readlink(path) == _link(directory, stage, name)
        if source.is_file() and (ours or not os.path.lexists(path)):
            os.replace(source, path)
        elif ours:
            path.unlink()  # there was none before
    shutil.rmtree(stage, ignore_errors=True)


def _settle_abandoned(directory: Path) -> None:
    """Finishes or takes back what killed processes left."""
    for stage in directory.glob(f"{STAGE_PREFIX}*"):
        claim = _claim(stage, wait=False) if stage.is_dir() else None
        if claim is not None:
            _settle(directory, stage)
            _release(claim)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One writer at a time, of any thread or process; the lock goes with a process that is killed."""
    claim = _claim(directory, wait=True)
    try:
        if claim is not None and not _is_at(claim, directory):
            raise FileNotFoundError(f"{directory} was replaced while this process waited for it")
        yield
    finally:
        _release(claim)


def _claim(directory: Path, wait: bool) -> int | None:
    """Locks a directory. None where another holds the lock or the file system has none."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _release(claim: int | None) -> None:
    if claim is not None:
        fcntl.flock(claim, fcntl.LOCK_UN)  # by name: a child process that was forked meanwhile has the descriptor too
        os.close(claim)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _sync(path: Path) -> None:
    """A full disk shows here, and not after the file was moved into its place."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def _identity(path: Path) -> tuple[int, ...] | None:
    """What changes whenever a file is replaced or written to; a symbolic link is followed."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
