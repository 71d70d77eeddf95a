"""What a conformance case is: PTX, inputs and what a plain model says must come out, on any machine that runs PTX."""

from dataclasses import dataclass, field, replace

import torch

from ..tensor_map import TensorMap

_REGISTERS = """
    .reg .pred %p<32>;
    .reg .b16 %h<64>;
    .reg .b32 %r<256>;
    .reg .f32 %f<256>;
    .reg .b64 %rd<64>;
    .reg .f64 %fd<32>;"""


@dataclass
class Case:
    """A kernel and its expected effect.

    Attributes:
        args: kernel arguments by name: tensors, TensorMaps, ints, or bytes of a structure.
        expected: by name of an argument tensor, its contents afterwards.
        tolerance: largest relative error, for instructions that PTX defines only approximately; 0: bit for bit.
    """

    name: str
    ptx: str
    args: dict
    expected: dict
    grid: tuple = (1, 1, 1)
    block: int = 32
    shared_bytes: int = 0
    cluster: tuple = (1, 1, 1)
    arch: str = "sm_80"
    tolerance: float = 0.0
    entry: str = field(default="snippet")

    def tensors(self):
        """Every tensor among the arguments, those under a TensorMap included."""
        return {
            name: value.tensor if isinstance(value, TensorMap) else value
            for name, value in self.args.items()
            if not isinstance(value, (int, bytes))
        }

    def edited(self, old, new):
        """This case with ``old``, which its PTX must have, replaced by ``new``."""
        assert old in self.ptx, f"{self.name} has no {old!r}"
        return replace(self, ptx=self.ptx.replace(old, new))

    def mismatch(self, results):
        """The first difference between the results and the model as text, or None."""
        for name, want in self.expected.items():
            got = results[name]
            if self.tolerance:
                scale = want.double().abs().clamp(min=1e-30)
                wrong = ~(
                    ((got.double() - want.double()).abs() <= self.tolerance * scale)
                    | (got == want)
                    | (got.isnan() & want.isnan())
                )
            else:
                wrong = bits(got) != bits(want)
            if wrong.any():
                at = tuple(wrong.nonzero()[0].tolist())
                values = f"{name}{list(at)} is {got[at].item()!r}, the model says {want[at].item()!r}"
                return f"{self.name}: {values} ({int(wrong.sum())} differ)"
        return None


def bits(tensor):
    """The same bytes as integers, so that NaNs and signed zeros compare."""
    return tensor.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )


def module(body, params, shared="", arch="sm_80", entry="snippet", directives=""):
    """A PTX module with one entry.

    Args:
        body: may use registers %p, %h (16 bits), %r (32), %rd (64), %f and %fd.
        params: name -> type, or (bytes, alignment) of a structure by value.
        shared: declarations of the module's variables.
        directives: of the entry, such as .maxntid.
    """

    def declare(name, kind):
        return f".param .{kind} {name}" if isinstance(kind, str) else f".param .align {kind[1]} .b8 {name}[{kind[0]}]"

    declared = ",\n    ".join(declare(name, kind) for name, kind in params.items())
    return (
        f".version 8.6\n.target {arch}\n.address_size 64\n{shared}\n.visible .entry {entry}(\n"
        f"    {declared}\n)\n{directives}\n{{{_REGISTERS}\n{body}\n    ret;\n}}\n"
    )


_NAMES = {
    torch.int16: ("b16", "%h"),
    torch.bfloat16: ("b16", "%h"),
    torch.float16: ("b16", "%h"),
    torch.int32: ("b32", "%r"),
    torch.float32: ("f32", "%f"),
}
_NAMES |= {torch.int64: ("b64", "%rd"), torch.float64: ("f64", "%fd")}


def elementwise(name, instruction, inputs, outputs, arch="sm_80", tolerance=0.0):
    """A case in which thread i computes outputs[:, i] from inputs[:, i].

    Args:
        instruction: PTX with {a}, {b}, ... for the inputs and {d}, {e}, ... for the outputs; may use %p0 to %p9.
        inputs, outputs: 1-D tensors of one length; the outputs are what the model says.
    """
    n = len(inputs[0])
    body, where = [], {}
    body.append("    mov.u32 %r0, %tid.x;\n    mov.u32 %r1, %ctaid.x;\n    mad.lo.s32 %r0, %r1, 128, %r0;")
    tensors = {}
    for i, tensor in enumerate([*inputs, *outputs]):
        is_output = i >= len(inputs)
        letter = "defg"[i - len(inputs)] if is_output else "abc"[i] if i < 3 else "xyz"[i - 3]
        kind, family = _NAMES[tensor.dtype]
        where[letter] = f"{family}{20 + i}"
        body.append(
            f"    ld.param.u64 %rd{i}, [p{i}];\n"
            f"    mul.wide.u32 %rd{10 + i}, %r0, {tensor.element_size()};\n"
            f"    add.s64 %rd{i}, %rd{i}, %rd{10 + i};"
        )
        if not is_output:
            body.append(f"    ld.global.{kind} {where[letter]}, [%rd{i}];")
        tensors[f"p{i}"] = torch.full_like(tensor, -1) if is_output else tensor
    body.append(f"    {instruction.format(**where)}")
    expected = {}
    for i, tensor in enumerate(outputs, len(inputs)):
        body.append(f"    st.global.{_NAMES[tensor.dtype][0]} [%rd{i}], {where['defg'[i - len(inputs)]]};")
        expected[f"p{i}"] = tensor
    blocks = n // 128
    if n % 128:
        raise ValueError(f"{name}: {n} elements are not a multiple of 128")
    return Case(
        name,
        module("\n".join(body), dict.fromkeys(tensors, "u64"), arch=arch),
        tensors,
        expected,
        grid=(blocks, 1, 1),
        block=128,
        arch=arch,
        tolerance=tolerance,
    )


def pointers(*names):
    """PTX that loads pointer parameters into %rd0, %rd1, ..."""
    return "\n".join(f"    ld.param.u64 %rd{i}, [{name}];" for i, name in enumerate(names))
