"""A library's machine code as instructions: opcode, control bits, and where in the sources each comes from.

The disassembler leaves the control bits undecoded. From Volta on an instruction is 128 bits, of which 105 to 125 are
the scheduler's (Jia et al., Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking, 2018, section 2.1):

    105-108  stall: cycles until the warp may issue its next instruction
    109      clear where the warp should yield to others
    110-112  number of the scoreboard that the result sets, 7 for none
    113-115  number of the scoreboard that reading the operands sets, 7 for none
    116-121  mask of the scoreboards that are waited for
    122-125  operand registers kept for the next instruction
"""

import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_CODE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;\s+/\* 0x([0-9a-f]{16}) \*/")
_UPPER = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"(\.L_x_\d+):")
_KERNEL = re.compile(r"\.text\.(\w+):")
_PLACE = re.compile(r'//## File "([^"]+)", line (\d+)')
_TARGET = re.compile(r"\((\.L_x_\d+)\)")
_CUDA_MACHINE = 190  # EM_CUDA in an ELF header


@dataclass(frozen=True)
class Control:
    """The scheduler's bits of an instruction; a scoreboard is None where there is none."""

    stall: int
    yields: bool
    sets_when_written: int | None
    sets_when_read: int | None
    waits_for: tuple[int, ...]
    reuse: int

    def __str__(self) -> str:
        waits = "".join(str(i) if i in self.waits_for else "-" for i in range(6))
        read = "--" if self.sets_when_read is None else f"R{self.sets_when_read}"
        written = "--" if self.sets_when_written is None else f"W{self.sets_when_written}"
        return f"{waits}:{read}:{written}:{'Y' if self.yields else '-'}:{self.stall:02d}"


@dataclass(frozen=True)
class Instruction:
    """One instruction. ``places``: (file, line) in the sources, from the outermost call to the innermost."""

    address: int
    predicate: str | None
    opcode: str
    operands: str
    control: Control
    target: int | None = None
    places: tuple[tuple[str, int], ...] = ()

    @property
    def stall(self) -> int:
        return self.control.stall

    def is_a(self, *names: str) -> bool:
        """Whether the opcode is one of these, whatever further modifiers it has."""
        return _matches(self.opcode, names)


@cache  # a kernel has thousands of instructions, and few opcodes
def _matches(opcode: str, names: tuple[str, ...]) -> bool:
    return any(f"{opcode}.".startswith(f"{name}.") for name in names)


def decode_control(encoding: int) -> Control:
    """The control bits of an instruction's 128 bits."""

    def field(first: int, width: int) -> int:
        return encoding >> first & (1 << width) - 1

    written, read, waits = field(110, 3), field(113, 3), field(116, 6)
    return Control(
        stall=field(105, 4),
        yields=not field(109, 1),
        sets_when_written=None if written == 7 else written,
        sets_when_read=None if read == 7 else read,
        waits_for=tuple(i for i in range(6) if waits >> i & 1),
        reuse=field(122, 4),
    )


def parse(listing: str) -> dict[str, list[Instruction]]:
    """The kernels of ``nvdisasm -c -gi -hex``, by name.

    Raises:
        ValueError: an instruction's encoding is cut off, or a jump's label is missing.
    """
    kernels: dict[str, list[Instruction]] = {}
    raw: list[tuple] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []  # labels in front of the next instruction
    places: list[tuple[str, int]] = []
    places_end = True
    lines = iter(listing.splitlines())
    for line in lines:
        if place := _PLACE.search(line):
            if places_end:
                places, places_end = [], False
            places.append((place[1].rsplit("/", 1)[-1], int(place[2])))
        elif code := _CODE.match(line):
            upper = _UPPER.match(next(lines, ""))
            if upper is None:
                raise ValueError(f"no second half of the encoding behind: {line.strip()}")
            address, predicate, opcode, operands, lower = code.groups()
            control = decode_control(int(upper[1], 16) << 64 | int(lower, 16))
            raw.append((int(address, 16), predicate, opcode, operands, control, tuple(reversed(places))))
            labels.update(dict.fromkeys(waiting, int(address, 16)))
            waiting, places_end = [], True
        elif label := _LABEL.match(line):
            waiting.append(label[1])
        elif kernel := _KERNEL.match(line):
            raw = kernels[kernel[1]] = []
            places, places_end, waiting = [], True, []
    return {name: [_resolve(each, labels) for each in found] for name, found in kernels.items()}


def _resolve(raw: tuple, labels: dict[str, int]) -> Instruction:
    address, predicate, opcode, operands, control, places = raw
    target = None
    if opcode.split(".")[0] == "BRA" and (label := _TARGET.search(operands)):
        if label[1] not in labels:
            raise ValueError(f"a jump to {label[1]}, which is nowhere")
        target = labels[label[1]]
    return Instruction(address, predicate, opcode, operands, control, target, places)


def cubins(library: bytes) -> list[bytes]:
    """The machine code images in a library; cuobjdump gives all of one source file the same name.

    Raises:
        ValueError: there are none, or none that is not compressed.
    """
    found = []
    for start in (match.start() for match in re.finditer(b"\x7fELF\x02\x01", library)):
        (machine,) = struct.unpack_from("<H", library, start + 18)
        if machine != _CUDA_MACHINE:
            continue
        tables = struct.unpack_from("<QQ", library, start + 32)  # of program and section headers, which end the file
        counts = struct.unpack_from("<HHHH", library, start + 54)
        size = max(tables[0] + counts[0] * counts[1], tables[1] + counts[2] * counts[3])
        found.append(library[start : start + size])
    if not found:
        raise ValueError("the library holds no machine code, or only compressed")
    return found


def disassemble(nvdisasm: str, cubin: bytes) -> dict[str, list[Instruction]]:
    """A machine code image's kernels."""
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "image.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([nvdisasm, "-c", "-gi", "-hex", str(path)], capture_output=True, text=True, check=True)
    return parse(done.stdout)
