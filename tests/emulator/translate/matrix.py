"""Tensor-core instructions and the loads and stores of their fragments."""

import re

from ..errors import PtxError
from .registry import translates, vector

_TYPES = {"bf16": 0, "f16": 1, "tf32": 2}  # MmaType of engine/half.h
_MATRICES = {"x1": 1, "x2": 2, "x4": 4}


@translates("ldmatrix", "stmatrix")
def _matrix_move(instruction, builder):
    instruction.only("sync", "aligned", "m8n8", *_MATRICES, "trans", "shared", "shared::cta", "b16")
    n = next(count for name, count in _MATRICES.items() if instruction.has(name))
    loads = instruction.modifiers[0] == "ldmatrix"
    address_text, fragment_text = instruction.operands[:: -1 if loads else 1]
    address, offset = builder.address(address_text)
    if address & 3:
        address = _narrow(builder, address)
    fragments = [builder.destination(name, "b32") for name in vector(fragment_text)]
    if len(fragments) != n:
        raise PtxError(f"{instruction.opcode} with {len(fragments)} registers")
    builder.emit(
        instruction.modifiers[0],
        fragments if loads else [],
        [address] if loads else [address, *fragments],
        [n, instruction.has("trans"), offset],
    )


def _narrow(builder, register):
    narrowed = builder.new_register(0)
    builder.emit("cvt.u32.u64", [narrowed], [register])
    return narrowed


@translates("mma.sync")
def _mma(instruction, builder):
    match = re.fullmatch(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(\w+)\.(\w+)\.f32", instruction.opcode)
    k = int(match.group(1)) if match else 0
    if (
        not match
        or match.group(2) != match.group(3)
        or k not in {"bf16": (8, 16), "f16": (8, 16), "tf32": (4, 8)}.get(match.group(2), ())
    ):
        raise PtxError(f"{instruction.opcode} is not modelled")
    d, a, b, c = ([builder.source(name, "b32") for name in vector(text)] for text in instruction.operands)
    n_b = k // (4 if match.group(2) == "tf32" else 8)
    if (len(d), len(a), len(b), len(c)) != (4, 2 * n_b, n_b, 4):
        raise PtxError("wrong number of fragment registers")
    builder.emit("mma", d, a + b + c, [k, _TYPES[match.group(2)]])


@translates("wgmma.mma_async")
def _wgmma(instruction, builder):
    match = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(\w+)\.(\w+)", instruction.opcode)
    n, k = (int(match.group(1)), int(match.group(2))) if match else (0, 0)
    if (
        not match
        or match.group(3) != match.group(4)
        or k != {"bf16": 16, "f16": 16, "tf32": 8}.get(match.group(3))
        or n % 8
        or not 8 <= n <= 256
    ):
        raise PtxError(f"{instruction.opcode} is not modelled")
    d_text, a_text, b_text, scale_d, *rest = instruction.operands
    in_registers = a_text.startswith("{")
    destinations = [builder.destination(name, "b32") for name in vector(d_text)]
    a = [builder.source(name, "b32") for name in vector(a_text)] if in_registers else [builder.source(a_text, "b64")]
    signs = [builder.number(text) == -1 for text in rest[:2]]
    transposes = [builder.number(text) for text in rest[2:]] or [0] * (1 if in_registers else 2)
    if in_registers:
        transposes.insert(0, 0)
    if len(destinations) != n // 2 or (in_registers and len(a) != 4) or len(transposes) != 2:
        raise PtxError("wrong number of wgmma operands")
    builder.wgmma_registers.update(destinations)
    if in_registers:
        builder.wgmma_registers.update(a)
    sources = [*a, builder.source(b_text, "b64"), builder.source(scale_d, "pred")]
    builder.emit("wgmma", destinations, sources, [n, k, _TYPES[match.group(3)], in_registers, *transposes, *signs])


@translates("wgmma.fence", "wgmma.commit_group")
def _wgmma_order(instruction, builder):
    instruction.only("fence", "commit_group", "sync", "aligned")
    builder.emit(".".join(instruction.modifiers[:2]))


@translates("wgmma.wait_group")
def _wgmma_wait(instruction, builder):
    builder.emit("wgmma.wait_group", immediates=[builder.number(instruction.operands[0])])
