"""Runs in a directory that several processes may share: claims that die with their owner, results stored whole."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastlora.errors import CommandError, first_line
from fastlora.outputs import replace_file, reported_write_errors
from fastlora.study.plan import RunSpec, StudySettings

HEADER = "runs.json"
FORMAT = "fastlora-study-runs-1"
RESULT_KEYS = ("label", "targets", "rank", "seed", "parameters", "held_out_loss", "relative_change_of_a", "seconds")


class RunStore:
    """The runs of one study: `runs.json` says what they are, `runs/<key>.json` holds a finished one.

    A claim is an exclusive lock on `runs/<key>.lock`, which the system releases when its process ends, however it ends:
    a lock file that was left behind blocks nobody.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runs = directory / "runs"

    def begin(self, settings: StudySettings, facts: dict) -> None:
        """Makes the directory this study's, or joins the study that is there.

        Args:
            facts: what the runs share besides their settings and decides them, too: the text's hash, parameter counts.

        Raises:
            CommandError: the directory holds runs of other settings, text or model, or cannot be written to.
        """
        with reported_write_errors(self.directory):
            self.runs.mkdir(parents=True, exist_ok=True)
        with self.lock("begin", wait=True):
            if not (self.directory / HEADER).exists():
                header = {"format": FORMAT, "settings": settings.to_dict(), **facts}
                replace_file(self.directory / HEADER, json.dumps(header, indent=1).encode())
                return
            header = self.header()
            different = settings.differences(header["settings"])
            if different:
                given = ", ".join(different)
                raise CommandError(f"{self.directory} holds runs of {given}: repeat these or name another --output")
            changed = [name for name, value in facts.items() if header.get(name) != value]
            if changed:
                given = ", ".join(changed)
                raise CommandError(f"{self.directory} holds runs of another {given}: name another --output")

    def header(self) -> dict:
        """What `begin` wrote.

        Raises:
            CommandError: there is no study here, or its file cannot be read.
        """
        path = self.directory / HEADER
        if not path.exists():
            hint = f"start a study with fastlora study --output {self.directory}"
            raise CommandError(f"no runs in {self.directory}: {hint}")
        header = _read_json(path)
        if header.get("format") != FORMAT:
            raise CommandError(f"{path} is not of the format {FORMAT}")
        return header

    def result(self, spec: RunSpec) -> dict | None:
        """A finished run's result, or None.

        Raises:
            CommandError: the file cannot be read.
        """
        path = self._result_path(spec)
        return _read_json(path, RESULT_KEYS) if path.exists() else None

    def finished(self, specs: list[RunSpec]) -> list[RunSpec]:
        """Those that have a result."""
        return [spec for spec in specs if self._result_path(spec).exists()]

    def all_results(self) -> list[dict]:
        """Every result in the directory, by name."""
        return [_read_json(path, RESULT_KEYS) for path in sorted(self.runs.glob("*.json"))]

    def adapter(self, spec: RunSpec, step: int | None = None) -> Path:
        """Where the adapter of a run is kept; with a step, the one that it had after so many."""
        return self.runs / (spec.key if step is None else f"{spec.key}-step{step}")

    def save(self, spec: RunSpec, result: dict) -> None:
        """Stores a finished run, whole or not at all. Raises CommandError where that fails."""
        replace_file(self._result_path(spec), json.dumps(result, allow_nan=False).encode())

    @contextmanager
    def claim(self, spec: RunSpec) -> Iterator[bool]:
        """Whether this process may train the run within the block: no other is at it, and it has no result yet."""
        with self.lock(spec.key) as mine:
            yield mine and not self._result_path(spec).exists()

    @contextmanager
    def lock(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Holds `runs/<name>.lock` within the block; yields False where another process does, unless told to wait.

        Raises:
            CommandError: the file cannot be made, or its file system has no locks.
        """
        path = self.runs / f"{name}.lock"
        with reported_write_errors(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            yield self._locked(handle, path, wait)
        finally:
            os.close(handle)

    @staticmethod
    def _locked(handle: int, path: Path, wait: bool) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError as error:
            raise CommandError(f"cannot lock {path}: {error.strerror or first_line(error)}") from error
        return True

    def _result_path(self, spec: RunSpec) -> Path:
        return self.runs / f"{spec.key}.json"


def _read_json(path: Path, keys: tuple[str, ...] = ()) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {path}: {first_line(error)}; delete it to have it made again") from error
    if not isinstance(found, dict) or any(key not in found for key in keys):
        raise CommandError(f"cannot read {path}: it holds no run; delete it to have it made again")
    return found
