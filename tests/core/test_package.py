"""What is released: the source distribution has every source; a wheel is made of it, of pure Python without nvcc.

setuptools' backend is called as a front end would call it, on a copy of the files that git knows."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastlora
from benchmarks import ROOT

pytest.importorskip("setuptools", minversion="77")

# Builds with the hook that is named, on a machine that has no nvcc.
BUILD = """
import shutil, sys
found = shutil.which
shutil.which = lambda name, *args, **options: None if name == "nvcc" else found(name, *args, **options)
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"not a checkout: {done.stderr.strip()}")
    return done.stdout.splitlines()


def build(hook: str, source: Path, target: Path) -> Path:
    target.mkdir()
    command = [sys.executable, "-c", BUILD, hook, str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sources() -> set[str]:
    """Every file that git knows, or would add."""
    return set(git("ls-files", "--cached", "--others", "--exclude-standard"))


@pytest.fixture(scope="module")
def built(sources, tmp_path_factory) -> dict:
    """The source distribution, its files' names, and the wheel that is made of it alone."""
    directory = tmp_path_factory.mktemp("package")
    copy = directory / "checkout"
    for name in sources:
        if (ROOT / name).is_file() and name.split("/")[0] in ("fastlora", "csrc") or "/" not in name:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    archive = build("build_sdist", copy, directory / "sdist")
    with tarfile.open(archive) as tar:
        names = {member.name.partition("/")[2] for member in tar if member.isfile()}
        tar.extractall(directory / "unpacked", filter="data")
    (unpacked,) = (directory / "unpacked").iterdir()
    wheel = build("build_wheel", unpacked, directory / "wheel")
    return {"sdist": archive, "names": names, "wheel": wheel}


def test_the_source_distribution_has_every_source(built, sources):
    wanted = {name for name in sources if name.startswith(("fastlora/", "csrc/")) and (ROOT / name).is_file()}
    wanted = {name for name in wanted if name.startswith("csrc/") or name.endswith((".py", "py.typed"))}
    assert len(wanted) > 100 and wanted <= built["names"], sorted(wanted - built["names"])
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "PKG-INFO"} <= built["names"]
    assert built["sdist"].name == f"fastlora-{fastlora.__version__}.tar.gz"
    assert not [name for name in built["names"] if name.endswith((".so", ".pyc"))]


def test_without_nvcc_the_wheel_is_pure_and_whole(built, sources):
    assert built["wheel"].name == f"fastlora-{fastlora.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(built["wheel"]) as archive:
        names = set(archive.namelist())
        described = f"fastlora-{fastlora.__version__}.dist-info"
        scripts = archive.read(f"{described}/entry_points.txt").decode()
        metadata = archive.read(f"{described}/METADATA").decode()
    modules = {name for name in sources if name.startswith("fastlora/") and name.endswith(".py")}
    modules = {name for name in modules if (ROOT / name).is_file()}
    assert modules | {"fastlora/py.typed"} <= names
    assert {name.partition("/")[0] for name in names} == {"fastlora", described}
    assert not [name for name in names if name.endswith(".so")]
    assert "fastlora = fastlora.cli.main:main" in scripts
    assert f"\nVersion: {fastlora.__version__}\n" in metadata and "\nRequires-Python: >=3.10\n" in metadata


def test_the_wheel_runs_where_it_is_unpacked(built, tmp_path):
    with zipfile.ZipFile(built["wheel"]) as archive:
        archive.extractall(tmp_path)
    script = (
        "import sys, fastlora; from fastlora.cli.main import main\n"
        "assert fastlora.__file__.startswith(sys.argv[1]), fastlora.__file__\n"
        "print(fastlora.available_backends()['cuda'])\n"
        "sys.argv = ['fastlora', '--version']; main()"
    )
    command, alone = [sys.executable, "-c", script, str(tmp_path)], {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=alone)
    assert fastlora.__version__ in done.stdout, done.stderr
    assert "fastlora._C is not built" in done.stdout or "no CUDA device" in done.stdout


class TestVersions:
    """A release is a tag v1.2.3 on a commit whose version is 1.2.3, and a section of the changelog."""

    SECTION = re.compile(r"^## (\d+\.\d+\.\d+) \((unreleased|\d{4}-\d\d-\d\d)\)$", re.MULTILINE)

    def sections(self) -> list[tuple[str, str]]:
        text = (ROOT / "CHANGELOG.md").read_text()
        found = self.SECTION.findall(text)
        assert len(found) == len(re.findall(r"^## ", text, re.MULTILINE)), "a section is not '## X.Y.Z (date)'"
        return found

    def test_the_changelog_goes_from_the_version_of_today_downwards(self):
        versions = [tuple(map(int, version.split("."))) for version, _ in self.sections()]
        assert versions == sorted(versions, reverse=True) and len(set(versions)) == len(versions)
        assert self.sections()[0][0] == fastlora.__version__
        assert all(date != "unreleased" for _, date in self.sections()[1:])

    def test_every_tag_has_a_section_with_its_date(self):
        tags = [tag for tag in git("tag", "--list", "v*")]
        released = {f"v{version}" for version, date in self.sections() if date != "unreleased"}
        assert set(tags) <= released, f"tags without a dated section: {sorted(set(tags) - released)}"

    def test_a_tagged_commit_has_the_version_of_its_tag(self):
        here = [tag for tag in git("tag", "--points-at", "HEAD") if tag.startswith("v")]
        assert here in ([], [f"v{fastlora.__version__}"])
