"""Every wait, fence and barrier of a kernel, one at a time taken out: from PTX, and from the Triton sources."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.emulator.ptx import Block, Label, parse
from tests.support import mutants
from tests.support.mutants import Mutant

CUDA_SOURCES = Path(__file__).resolve().parents[2] / "csrc"

# Pattern of the instruction, what stands in for it, what is taken out. A wait that is gone finds its condition true; a
# semantics that is gone leaves a relaxed access.
_RULES = tuple(
    (re.compile(pattern), replacement, what)
    for pattern, replacement, what in (
        (r"bar\.sync\b.*", "", "bar.sync"),
        (r"bar\.warp\.sync\b.*", "", "bar.warp.sync"),
        (r"barrier\.cluster\.(arrive|wait)\b.*", "", "barrier.cluster"),
        (r"(fence\.[\w.:]+|membar\.\w+)", "", "{1}"),
        (r"(wgmma\.(?:fence|commit_group)).*", "", "{1}"),
        (r"wgmma\.wait_group\.sync\.aligned (\d+)", "", "wgmma.wait_group {1}"),
        (r"cp\.async\.((?:bulk\.)?commit_group)", "", "cp.async.{1}"),
        (r"cp\.async\.((?:bulk\.)?wait_(?:group|all)\S*.*)", "", "cp.async.{1}"),
        (r"mbarrier\.try_wait\S*\s+([^,]+),.*", r"setp.eq.u32 \1, 0, 0", "wait for an mbarrier"),
        (r"(mbarrier\.arrive)(?!\.expect_tx).*", "", "{1}"),
        (r"(st\.async)\b.*", "", "{1}"),
        (r"(mbarrier\.arrive)\.expect_tx(\S*\s+_,\s*\[[^\]]*\]),.*", r"\1\2", "expect_tx"),
        (r"ld\.\S*acquire\S*\s+(%\w+),.*", r"mov.b32 \1, 0x7fffffff", "wait for a flag"),
        (r"(ld\.\S*)\bacquire\b(.*)", r"\1relaxed\2", "acquire of ld"),
        (r"((?:red|atom|st)\.\S*)\brelease\b(.*)", r"\1relaxed\2", "release of a flag"),
        (r"(atom\.\S*)\bacquire\b(.*)", r"\1relaxed\2", "acquire of atom"),
        (r"(atom\.\S*)\bacq_rel\b(.*)", r"\1release\2", "acquire of atom.acq_rel"),
        (r"(atom\.\S*)\bacq_rel\b(.*)", r"\1acquire\2", "release of atom.acq_rel"),
    )
)
_GUARD = re.compile(r"(@!?[%\w$]+\s+)?(.*)", re.S)
_HELPERS = ("consumer.cuh", "pipeline.cuh", "producer.cuh")
_PRIMITIVES = ("thread.cuh", "mbarrier.cuh", "tma.cuh", "memory.cuh", "wgmma.cuh", "sm_30_intrinsics.hpp")


@dataclass(frozen=True)
class Deletion:
    """One instruction less in a PTX text.

    source: the instruction's "file:line", then its callers', separated by " < ".
    line: of the PTX, from 1.
    """

    what: str
    source: str
    line: int
    instruction: str
    replacement: str

    @property
    def statement(self) -> str:
        """Where the sources ask for it: the innermost frame that is no primitive, and its caller if that is a helper of
        one line or of a few."""
        frames = [frame for frame in self.source.split(" < ") if not frame.startswith(_PRIMITIVES)]
        return " < ".join(frames[: 2 if frames[0].startswith(_HELPERS) else 1])


def find(ptx: str) -> list[Deletion]:
    """Every deletion that a PTX text allows, in its order."""
    found = []
    for entry in parse(ptx).entries.values():
        for statement in _statements(entry.body):
            guard, instruction = _GUARD.fullmatch(statement.text).groups()
            for pattern, replacement, what in _RULES:
                if match := pattern.fullmatch(instruction):
                    left = match.expand(replacement)
                    name = what.replace("{1}", match.group(1) if match.groups() else "")
                    found.append(
                        Deletion(
                            name, statement.source, statement.line, instruction, (guard or "") + left if left else ""
                        )
                    )
    return found


def _statements(block: Block):
    for item in block.items:
        if isinstance(item, Block):
            yield from _statements(item)
        elif not isinstance(item, Label):
            yield item


def without(ptx: str, deletions: Iterable[Deletion]) -> str:
    """The text after these deletions.

    Raises:
        ValueError: a line does not hold the instruction: the deletion was found in another text.
    """
    lines = ptx.split("\n")
    for deletion in deletions:
        old = lines[deletion.line - 1]
        opcode = deletion.instruction.split()[0]
        new = re.sub(rf"(?:@!?[%\w$]+\s+)?{re.escape(opcode)}(?=[\s;])[^;]*;", _ending(deletion.replacement), old)
        if new == old:
            raise ValueError(f"line {deletion.line} of the PTX has no {opcode}: {old!r}")
        lines[deletion.line - 1] = new
    return "\n".join(lines)


def _ending(instruction: str):
    return lambda match: f"{instruction};" if instruction else ""


def source_line(place: str, directory: Path = CUDA_SOURCES) -> str:
    """The text at the first "file:line" of a chain, or nothing where the file is not one of ours.

    Raises:
        FileNotFoundError: the directory of the sources is not there.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"no folder of sources at {directory}")
    name, _, line = place.split(" < ")[0].partition(":")
    path = next(directory.rglob(name), None)
    return path.read_text().splitlines()[int(line) - 1].strip() if path else ""


_TRITON_RULES = (
    (r"^(\s*)tl\.debug_barrier\(\)$", r"\1pass"),
    (r"^(\s*)wait_for\(.*\)$", r"\1pass"),
    (r"^(\s*)publish\(.*\)$", r"\1pass"),
    (r"^(\s*)while\b(.*)$", r"\1if\2"),
    (r"^(.*sem=)\"(?:acquire|release|acq_rel)\"(.*)$", r'\1"relaxed"\2'),
    (r"^(.*sem=)\"acq_rel\"(.*)$", r'\1"acquire"\2'),
    (r"^(.*sem=)\"acq_rel\"(.*)$", r'\1"release"\2'),
)


def in_triton() -> list[Mutant]:
    """Every wait, release, acquire and barrier in the Triton sources, each taken out of its line."""
    found = []
    for module in mutants.MODULES:
        for number, line in enumerate(mutants.source(module).splitlines(), 1):
            for pattern, replacement in _TRITON_RULES:
                new, changed = re.subn(pattern, replacement, line)
                if changed and new != line:
                    name = f"{module}.py:{number}: {line.strip()} -> {new.strip()}"
                    found.append(Mutant(name, module, line, new, line=number))
    return found
