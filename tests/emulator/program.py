"""Builds the engine's program of one entry: registers, constants, and a flat list of operations."""

import ctypes
import re
import struct
from array import array
from dataclasses import dataclass, field

from .engine_library import library, operations
from .errors import PtxError
from .ptx import SIZES, Site

FILE_32, FILE_64, FILE_PRED = 0, 1, 2
PARAM_WINDOW, LOCAL_WINDOW, SHARED_WINDOW = 1 << 60, 1 << 61, 1 << 62  # as in engine/memory.h

# The order is that of Special in engine/program.h.
_XYZ = tuple("xyz")
_SPECIALS = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in _XYZ] + [
    "%laneid",
    "%warpid",
    "%nwarpid",
]
_SPECIALS += (
    [f"%cluster_ctaid.{axis}" for axis in _XYZ]
    + [f"%cluster_nctaid.{axis}" for axis in _XYZ]
    + ["%cluster_ctarank", "%cluster_nctarank"]
)
_SPECIALS += [f"%clusterid.{axis}" for axis in _XYZ] + [f"%nclusterid.{axis}" for axis in _XYZ]
_SPECIALS += [f"%lanemask_{relation}" for relation in ("eq", "lt", "le", "gt", "ge")] + [
    "%smid",
    "%nsmid",
    "%dynamic_smem_size",
    "%total_smem_size",
]
SPECIALS = {name: kind for kind, name in enumerate(_SPECIALS)}
CLOCKS = ("%clock", "%clock_hi", "%clock64", "%globaltimer", "%globaltimer_lo", "%globaltimer_hi")


def file_of(type_name):
    if type_name == "pred":
        return FILE_PRED
    return FILE_64 if SIZES[type_name] == 8 else FILE_32


class Scope:
    """Registers and labels of a brace-enclosed block."""

    def __init__(self, parent=None):
        self.parent, self.registers, self.labels = parent, {}, {}

    def find(self, table, name):
        scope = self
        while scope:
            if name in getattr(scope, table):
                return getattr(scope, table)[name]
            scope = scope.parent
        return None


@dataclass
class Operation:
    name: str
    destinations: list
    sources: list
    immediates: list
    guard: int = -1
    negated: bool = False


class _ProgramSpec(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_void_p), ("n_instructions", ctypes.c_uint64),
        ("n_32", ctypes.c_uint32), ("n_64", ctypes.c_uint32), ("n_pred", ctypes.c_uint32),
        ("local_bytes", ctypes.c_uint32), ("uses_wgmma", ctypes.c_uint32),
        ("constants", ctypes.c_void_p), ("n_constants", ctypes.c_uint64),
        ("specials", ctypes.c_void_p), ("n_specials", ctypes.c_uint64),
    ]  # fmt: skip


class Builder:
    """Collects operations. `symbols` maps variables of the module and parameters of the entry to addresses, `functions`
    names to the functions that may be called."""

    def __init__(self, symbols, functions):
        self.symbols, self.functions = dict(symbols), functions
        self.calls = []  # names of the functions that the statement at hand is inside of
        self.scope = Scope()
        self.operations, self.sites = [], []
        self.counts = [0, 0, 0]
        self.constants, self.specials = {}, {}
        self.wgmma_registers = set()
        self.local_bytes = 0
        self.site = None
        self.guard = (-1, False)
        self.branches = []  # operations whose target label is not known yet
        self._carry = None

    # Registers.

    def new_register(self, file):
        self.counts[file] += 1
        return (self.counts[file] - 1) << 2 | file

    def declare(self, name, type_name):
        self.scope.registers[name] = self.new_register(file_of(type_name))

    def constant(self, value, file):
        key = (file, value & (0xFFFFFFFFFFFFFFFF if file == FILE_64 else 0xFFFFFFFF if file == FILE_32 else 1))
        if key not in self.constants:
            self.constants[key] = self.new_register(file)
        return self.constants[key]

    def carry(self):
        """The predicate that carry chains hand on, CC.CF."""
        if self._carry is None:
            self._carry = self.new_register(FILE_PRED)
        return self._carry

    def source(self, text, type_name):
        """A register, constant, special register or symbol, as an operand of this type."""
        file = file_of(type_name)
        register = self.scope.find("registers", text)
        if register is not None:
            if register & 3 != file:
                raise PtxError(f"register {text} is not of the size of .{type_name}")
            return register
        if file == FILE_PRED and text.startswith("!"):
            inverted = self.new_register(FILE_PRED)
            self.emit("not.pred", [inverted], [self.source(text[1:], "pred")])
            return inverted
        if text in SPECIALS:
            return self.special(text, file)
        return self.constant(self.number(text, type_name), file)

    def special(self, name, file):
        if (name, file) not in self.specials:
            self.specials[name, file] = self.new_register(file)
        return self.specials[name, file]

    def number(self, text, type_name="b64"):
        """The value of an integer, a floating-point constant or the address of a symbol."""
        if text in self.symbols:
            return self.symbols[text]
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            bits = int(match.group(1), 16)
            return (
                bits
                if type_name != "f64"
                else struct.unpack("<Q", struct.pack("<d", struct.unpack("<f", struct.pack("<I", bits))[0]))[0]
            )
        if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
            return int(match.group(1), 16)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            digits = text.rstrip("U")
            return int(digits, 8 if re.fullmatch(r"-?0\d+", digits) else 0)
        if text == "WARP_SZ":
            return 32
        if type_name in ("f32", "f64") and re.fullmatch(r"-?\d*\.\d*", text):
            return struct.unpack(
                "<I" if type_name == "f32" else "<Q", struct.pack("<f" if type_name == "f32" else "<d", float(text))
            )[0]
        raise PtxError(f"unknown operand {text!r}")

    def destination(self, text, type_name):
        if text == "_":
            return self.new_register(file_of(type_name))
        register = self.scope.find("registers", text)
        if register is None:
            raise PtxError(f"unknown register {text!r}")
        if register & 3 != file_of(type_name):
            raise PtxError(f"register {text} is not of the size of .{type_name}")
        return register

    def any_register(self, text, type_name):
        """A register of any size (loads, stores and conversions allow wider ones), or else a source of this type."""
        register = self.scope.find("registers", text)
        return self.source(text, type_name) if register is None else register

    def any_destination(self, text, type_name):
        register = self.scope.find("registers", text)
        return self.destination(text, type_name) if register is None else register

    def address(self, text):
        """[base + offset] -> (register, offset)."""
        match = re.fullmatch(r"\[\s*([^+\s]+?)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not match:
            raise PtxError(f"cannot read the address {text!r}")
        offset = int(match.group(2), 0) if match.group(2) else 0
        register = self.scope.find("registers", match.group(1))
        if register is None:
            register = self.constant(self.number(match.group(1)), FILE_64)
        return register, offset

    def address_register(self, text):
        """[base + offset] -> a register that holds the sum."""
        register, offset = self.address(text)
        if not offset:
            return register
        total = self.new_register(register & 3)
        self.emit(
            "add.u64" if register & 3 == FILE_64 else "add.u32",
            [total],
            [register, self.constant(offset, register & 3)],
        )
        return total

    # Operations.

    def emit(self, name, destinations=(), sources=(), immediates=()):
        if name not in operations():
            raise PtxError(f"{name} is not modelled")
        operation = Operation(
            name, list(destinations), list(sources), [int(value) for value in immediates], *self.guard
        )
        self.operations.append(operation)
        self.sites.append(self.site)
        return operation

    def emit_branch(self, label):
        self.branches.append((self.emit("bra", immediates=[0]), self.scope, label, self.site))

    def place_label(self, name):
        self.scope.labels[name][0] = len(self.operations)

    def finish(self):
        self.guard, self.site = (-1, False), self.site or Site("", 0, "end of the entry")
        self.emit("exit")
        for operation, scope, label, site in self.branches:
            target = scope.find("labels", label)
            if target is None or target[0] is None:
                raise PtxError(f"unknown label {label} at {site}", [site])
            operation.immediates[0] = target[0]
        return Program(self)


@dataclass
class Program:
    """A translated entry, held by the engine."""

    builder: Builder = field(repr=False)

    def __post_init__(self):
        builder, numbers = self.builder, operations()
        self.sites = builder.sites
        code = array("q")
        held = builder.wgmma_registers
        for operation in builder.operations:
            registers = operation.destinations + operation.sources
            checked = operation.name != "wgmma" and not held.isdisjoint(registers)
            code.extend(
                (
                    numbers[operation.name],
                    operation.guard,
                    operation.negated,
                    len(operation.destinations),
                    len(registers),
                    len(operation.immediates),
                    checked,
                )
            )
            code.extend(registers)
            code.extend(operation.immediates)
        constants = array(
            "Q", [word for (_, value), register in builder.constants.items() for word in (register, value)]
        )
        specials = array(
            "I", [word for (name, _), register in builder.specials.items() for word in (SPECIALS[name], register)]
        )
        spec = _ProgramSpec(
            code.buffer_info()[0], len(builder.operations), *builder.counts, builder.local_bytes, bool(held),
            constants.buffer_info()[0], len(builder.constants), specials.buffer_info()[0], len(builder.specials),
        )  # fmt: skip
        self.handle = ctypes.c_void_p(library().emu_program(ctypes.byref(spec)))

    def __del__(self):
        if getattr(self, "handle", None):
            library().emu_free(self.handle)
