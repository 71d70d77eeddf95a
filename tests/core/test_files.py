"""Files replaced as one: killed and failing at every single step, many writers and readers at once."""

import os
import subprocess
import sys

import pytest

import fastlora.files
from fastlora.files import read_together, replaced_together, write_file, write_files
from tests.support import killed_writers
from tests.support.killed_writers import NAMES, contents, found, listing


def check(name, directory, filesystem="links", present="all"):
    run = subprocess.run(
        [sys.executable, killed_writers.__file__, name, str(directory), filesystem, present],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("filesystem", ["links", "no hard links", "no links"])
@pytest.mark.parametrize("present", ["all", "some", "none"])
def test_killed_at_any_step_it_leaves_the_old_files_or_the_new(tmp_path, filesystem, present):
    check("kill_at_every_step", tmp_path, filesystem, present)


@pytest.mark.parametrize("filesystem", ["links", "no links"])
def test_the_next_writer_may_be_killed_too(tmp_path, filesystem):
    check("kill_a_rescue_at_every_step", tmp_path, filesystem, "some")


def test_writers_and_readers_at_once_never_see_a_mixture(tmp_path):
    check("many_at_once", tmp_path)


@pytest.fixture(params=["links", "no hard links", "no links"])
def filesystem(request, monkeypatch):
    monkeypatch.setattr(os, "link", os.link)  # so that they come back
    monkeypatch.setattr(os, "symlink", os.symlink)
    monkeypatch.setattr(os, "fsync", os.fsync)
    killed_writers.restrict(request.param)
    return request.param


@pytest.mark.parametrize("operation", ["fsync", "replace", "symlink", "link", "mkdir"])
def test_a_step_that_fails_leaves_everything_as_it_was(tmp_path, filesystem, monkeypatch, operation):
    real, nth, reached = getattr(os, operation), 0, True
    while reached:
        nth += 1
        calls = 0

        def fail_once(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == nth:  # noqa: B023
                raise OSError(28, "no space left on device")
            return real(*args, **kwargs)

        write_files(tmp_path, contents(1))
        assert listing(tmp_path) == sorted(NAMES)
        with monkeypatch.context() as patch:
            patch.setattr(os, operation, fail_once)
            try:
                write_files(tmp_path, contents(2))
                expected = contents(2)
            except OSError:
                expected = contents(1)
        assert found(tmp_path) == expected
        reached = calls >= nth
    assert nth > 1 or filesystem != "links"


def test_a_name_that_is_taken_by_a_directory(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_text("old")
    for data in ({"a": b"1", "b": b"2"}, {"b": b"2"}):
        with pytest.raises(IsADirectoryError, match="b is a directory"):
            write_files(tmp_path, data)
    assert (tmp_path / "a").read_text() == "old" and listing(tmp_path) == ["a"]


def test_a_block_that_fails_removes_what_it_made(tmp_path):
    with pytest.raises(KeyError), replaced_together(tmp_path / "a" / "b") as stage:
        (stage / "x").write_text("x")
        raise KeyError
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        write_file(tmp_path / "file" / "x", b"")
    write_file(tmp_path / "c" / "d" / "x", b"1")
    assert (tmp_path / "c" / "d" / "x").read_bytes() == b"1"


def test_a_link_in_a_file_s_place_is_replaced_and_its_file_left(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_text("shared")
    for name in ("a", "b"):
        (tmp_path / name).symlink_to("blobs/1")
    write_files(tmp_path, {"a": b"1", "b": b"2"})
    assert not (tmp_path / "a").is_symlink() and (tmp_path / "a").read_bytes() == b"1"
    assert (tmp_path / "blobs" / "1").read_text() == "shared"


def test_what_is_replaced_all_the_time_is_an_error_and_other_errors_come_through(tmp_path):
    write_file(tmp_path / "a", b"")
    with pytest.raises(OSError, match="a: replaced again and again"):
        read_together([tmp_path / "a"], lambda: write_file(tmp_path / "a", b""), patience=0.05)
    with pytest.raises(KeyError):
        read_together([tmp_path / "a"], {}.popitem)


def test_files_have_the_mode_that_a_plain_write_gives(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_files(tmp_path, {"a": b"", "b": b""})
    assert {(tmp_path / name).stat().st_mode for name in ("plain", "a", "b")} == {(tmp_path / "plain").stat().st_mode}


def test_the_stage_of_a_living_writer_is_left_alone(tmp_path):
    with replaced_together(tmp_path) as stage:
        (stage / "a").write_text("a")
        write_files(tmp_path, {"b": b"", "c": b""})
        assert (stage / "a").exists()
    assert listing(tmp_path) == ["a", "b", "c"]
    assert fastlora.files.STAGE_PREFIX not in "".join(os.listdir(tmp_path))
