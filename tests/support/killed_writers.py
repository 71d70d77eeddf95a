"""Processes that write files together, killed at every step, or many at once. A script: it forks, and a process that
holds torch is slow to fork. Arguments: the check, an empty directory, the file system's abilities, the old files."""

import importlib.util
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

NAMES = ("config.json", "weights.bin", "deep/er/report.md")
PRESENT = {"all": NAMES, "some": NAMES[1:], "none": ()}
STEPS = ("open", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.mkdir")


def contents(version):
    return {name: f"{version} of {name} ".encode() * (version + 1) for name in NAMES}


def found(directory):
    return {name: (directory / name).read_bytes() for name in NAMES if (directory / name).exists()}


def listing(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())


def load_module():
    """fastlora/files.py alone: the package would bring torch."""
    path = Path(__file__).parents[2] / "fastlora" / "files.py"
    spec = importlib.util.spec_from_file_location("files", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def restrict(filesystem):
    """Takes links away. And syncing, which takes most of the time here and matters to a failing machine alone."""

    def refuse(*args, **kwargs):
        raise OSError("not supported")

    os.fsync = lambda descriptor: None

    if filesystem != "links":
        os.link = refuse
    if filesystem == "no links":
        os.symlink = refuse


def run_and_die(work, step):
    """Runs in a child process, killed in front of its step-th file operation; whether it was."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event, arguments):
            nonlocal count
            if event in STEPS:
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kill_at_every_step(files, root, filesystem, present):
    restrict(filesystem)
    old, new = {name: contents(1)[name] for name in PRESENT[present]}, contents(2)
    step, seen, killed = 0, set(), True
    while killed:
        step += 1
        directory = root / str(step)
        directory.mkdir()
        files.write_files(directory, {**old, "theirs": b"a file of others"})
        killed = run_and_die(lambda: files.write_files(directory, new), step)  # noqa: B023
        state = found(directory)
        if filesystem == "no links":  # some may be gone, but the old and the new never lie side by side
            assert state.items() <= old.items() or state.items() <= new.items(), (step, state)
        else:
            assert state in (old, new), (step, state)
        seen.add(state == new)
        files.write_files(directory, {"other": b"", "another": b""})  # the next writer, of other files
        state = found(directory)
        assert state in (old, new), (step, state)
        assert set(listing(directory)) == {*state, "theirs", "other", "another"}, (step, listing(directory))
        assert not any(path.is_symlink() for path in directory.rglob("*")), step
    assert step > 12 and seen == {True, False}


def kill_a_rescue_at_every_step(files, root, filesystem, present):
    """A writer is killed between the first file and the last, and the next one while it settles that."""
    restrict(filesystem)
    old, new = {name: contents(1)[name] for name in PRESENT[present]}, contents(2)
    chance = random.Random(filesystem)
    for attempt in range(80):
        directory = root / str(attempt)
        directory.mkdir()
        files.write_files(directory, {**old, "theirs": b""})
        run_and_die(lambda: files.write_files(directory, new), chance.randrange(8, 45))  # noqa: B023
        work = lambda: files.write_files(directory, {"other": b"", "another": b""})  # noqa: B023, E731
        run_and_die(work, chance.randrange(1, 45))
        work()
        assert found(directory) in (old, new), (attempt, found(directory))


def many_at_once(files, root, filesystem, present):
    restrict(filesystem)
    files.write_files(root, contents(0))
    children = []
    for first in (1, 40):
        child = os.fork()
        if child == 0:
            try:
                for version in range(first, first + 12):
                    files.write_files(root, contents(version))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    threads = [
        threading.Thread(target=lambda n=n: [files.write_files(root, contents(v)) for v in range(n, n + 12)])
        for n in (80, 120)
    ]
    for thread in threads:
        thread.start()

    def read():
        state = {}
        for name in NAMES:
            time.sleep(0.0005)  # about what a writer takes from one file to the next
            state[name] = (root / name).read_bytes()
        return state

    seen = set()
    while any(thread.is_alive() for thread in threads):
        state = files.read_together([root / name for name in NAMES], read, patience=60)
        version = int(state[NAMES[0]].split()[0])
        assert state == contents(version), state
        seen.add(version)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert len(seen) > 1 and listing(root) == sorted(NAMES)


if __name__ == "__main__":
    globals()[sys.argv[1]](load_module(), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
