"""Operands of 2^31 elements and more: every offset takes 64 bits.

The memory is reserved and not touched but for a few rows. Inputs are matrices whose rows lie far apart. Outputs lie
close, so of those that are as large only the last tiles are made: their tickets are the next in the workspace.
"""

import dataclasses

import pytest
import torch

from fastlora import quantised_operands
from fastlora.backends.cuda import launch as cuda
from fastlora.backends.cuda import quantised_launch as cuda_quantised_launch
from fastlora.backends.target import Target
from fastlora.backends.triton import launch as triton_lora
from fastlora.backends.triton import quantised_launch
from fastlora.operands import describe_backward, describe_forward
from fastlora.problem import BackwardOperands, ForwardOperands, Needs
from tests.emulator import LaunchOptions
from tests.support import cuda_checks, cuda_emulation, cuda_quantised_checks, launches, numerics, quantised_checks
from tests.support.triton_checks import ARCHITECTURES, SMALL, needs_compiler, run
from tests.support.triton_emulation import emulated

FAR = 1 << 31  # elements
OPTIONS = LaunchOptions(race=False)  # whose records of every byte would not fit
INPUTS = ("x", "weight", "lora_a", "lora_b", "dy")
pytestmark = pytest.mark.usefixtures("own_workspace")


def apart(matrix: torch.Tensor) -> torch.Tensor:
    """The same rows, the last of them FAR from the first."""
    stride = (FAR // (matrix.shape[0] - 1) // 16 + 1) * 16
    wide = torch.empty_strided(matrix.shape, (stride, 1), dtype=matrix.dtype)
    return wide.copy_(matrix)


def with_rows_apart(case: numerics.Case) -> numerics.Case:
    return dataclasses.replace(case, **{name: apart(getattr(case, name)) for name in INPUTS})


@needs_compiler
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_inputs_of_triton(poisoned, arch):
    case = numerics.draw_integer_case(40, 48, 64, 8, torch.bfloat16)
    results, _ = run(with_rows_apart(case), SMALL[arch], arch, OPTIONS)
    numerics.assert_exact(results, case)


@cuda_checks.needs_kernels
def test_inputs_of_cuda(poisoned):
    case = numerics.draw_integer_case(72, 136, 200, 8, torch.bfloat16)
    with cuda_emulation.emulated(OPTIONS):
        results, _ = cuda_emulation.run_layer(with_rows_apart(case), cuda_checks.SMALL, ctas=4)
    numerics.assert_exact(results, case)


def reserved(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def with_last_rows(rows: torch.Tensor, m: int) -> torch.Tensor:
    """[m, ·], whose last rows are these."""
    wide = reserved(m, rows.shape[1])
    wide[-rows.shape[0] :] = rows
    return wide


def small_tiles(arch: int):
    """A group is one row block: its columns follow its column 0 where the wave is no tile long."""
    return dataclasses.replace(SMALL[arch], group_m=1)


def launch_last(prepared, arguments, arch: int, first_ticket: int, programs: int, flags=()) -> None:
    """Some tiles from a ticket on, as if the ones before had been claimed. flags: what these have left, by word."""
    workspace = torch.zeros(prepared.n_words, dtype=torch.int32)
    workspace[0] = first_ticket
    for word, value in dict(flags).items():
        workspace[word] = value
    prepared.launch.grid, prepared.wave = programs, 0
    with emulated(arch, OPTIONS):
        prepared.launch(*arguments(workspace))
    assert not workspace.any()


@needs_compiler
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("backward", (False, True))
def test_outputs_of_triton(poisoned, monkeypatch, arch, backward):
    """Y and S, dX and dS: the two tiles of the last row block."""
    monkeypatch.setattr(triton_lora, "target_of", lambda device: Target(arch, n_sms=3))
    config = small_tiles(arch)
    columns, contracted, rank, rows = 2 * config.block_n, 16, 64, config.block_m
    n, k = (contracted, columns) if backward else (columns, contracted)
    case = numerics.draw_integer_case(rows, n, k, rank, torch.bfloat16)
    m = FAR // min(columns, rank) + rows
    c, big = case, with_last_rows(case.dy if backward else case.x, m)
    shared = (c.scaling, 0.0, None)
    if backward:
        given = BackwardOperands(big, None, c.weight, c.lora_a, c.lora_b, None, *shared)
        operands, spec = describe_backward(given, Needs(True, False, False, False))
    else:
        operands, spec = describe_forward(ForwardOperands(big, c.weight, c.lora_a, c.lora_b, None, *shared))
    prepared = triton_lora.prepare(spec, config)
    out, s = reserved(m, columns), reserved(m, rank)

    def arguments(workspace):
        if backward:
            return prepared.arguments(operands, [out, s, *[None] * 6], workspace)
        return prepared.arguments(operands, out, s, workspace)

    launch_last(prepared, arguments, arch, 2 * (prepared.n_rows - 1), 2)
    numerics.assert_exact({("dx" if backward else "y"): out[-rows:]}, dataclasses.replace(c, bias=None))
    down = (c.dy, c.lora_b) if backward else (c.x, c.lora_a.t())
    assert torch.equal(s[-rows:].double(), c.scaling * down[0].double() @ down[1].double())


@cuda_checks.needs_kernels
@pytest.mark.parametrize("backward", (False, True))
def test_outputs_of_cuda(monkeypatch, backward):
    """Y and S, dX and dS: the last row block, of as many columns as one tile has. (To poison the outputs would touch
    them all; the emulator knows what was not written.)"""
    tile = dataclasses.replace(cuda_checks.SMALL, group_m=1, splits=1, fused=True)
    columns, contracted, rank, rows = tile.block_n, 64, 64, tile.block_m
    n, k = (contracted, columns) if backward else (columns, contracted)
    case = numerics.draw_integer_case(rows, n, k, rank, torch.bfloat16)
    m = FAR // min(columns, rank) + rows
    c, big = case, with_last_rows(case.dy if backward else case.x, m)
    shared = {"tile": tile, "ctas": 1}
    workspaces = []

    def borrow(n_words, device):
        workspaces.append(torch.zeros(n_words, dtype=torch.int32))
        workspaces[-1][0] = m // rows - 1  # the tiles before have been claimed
        return workspaces[-1]

    monkeypatch.setattr(cuda, "borrow_workspace", borrow)
    with cuda_emulation.emulated(OPTIONS) as launch:
        if backward:
            args = (
                big,
                None,
                c.weight,
                c.lora_a,
                c.lora_b,
                None,
                c.scaling,
                0.0,
                None,
                Needs(True, False, False, False),
            )
            out = launches.backward(cuda, *args, **shared).dx
        else:
            out, _ = launches.forward(cuda, big, c.weight, c.lora_a, c.lora_b, None, c.scaling, 0.0, None, **shared)
    assert not workspaces[0].any()
    down = (c.dy, c.lora_b) if backward else (c.x, c.lora_a.t())
    assert torch.equal(launch.operands["s"][-rows:].double(), c.scaling * down[0].double() @ down[1].double())
    numerics.assert_exact({("dx" if backward else "y"): out[-rows:]}, dataclasses.replace(c, bias=None))


@needs_compiler
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("chunk", (None, 0, 1))
def test_a_gradient_of_triton(poisoned, monkeypatch, arch, chunk):
    """The last tile of dB: of one row chunk, or of the first or the second of two, with the partial sum between. dA of
    as many elements is refused."""
    monkeypatch.setattr(triton_lora, "target_of", lambda device: Target(arch, n_sms=3))
    config, rank, k = small_tiles(arch), 64, 16
    rows = config.block_m  # of a chunk
    m = rows if chunk is None else rows + 16
    columns = config.gradient_n
    case = numerics.draw_integer_case(m, columns, k, rank, torch.bfloat16)
    n = FAR // rank + columns
    dy = reserved(m, n)
    dy[:, -columns:] = case.dy
    s = (case.scaling * case.x.double() @ case.lora_a.double().t()).bfloat16()
    given = BackwardOperands(dy, None, reserved(n, k), case.lora_a, reserved(n, rank), s, case.scaling, 0.0, None)
    operands, spec = describe_backward(given, Needs(False, False, True, False))
    prepared = triton_lora.prepare(spec, config)
    db, partial = reserved(n, rank), None if chunk is None else reserved(n, rank, dtype=torch.float32)
    outputs = [None, None, None, db, None, None, partial, None]
    tiles, of_chunk = -(-n // config.gradient_n), chunk or 0
    first = case.dy[:rows].double().t() @ s[:rows].double()
    if chunk == 1:
        partial[-columns:] = first
    flags = {prepared.n_words - 1: of_chunk}  # the last tile's count of chunks
    ticket = (of_chunk + 1) * tiles - 1
    launch_last(prepared, lambda w: prepared.arguments(operands, outputs, w), arch, ticket, 1, flags)
    if chunk == 0:
        assert torch.equal(partial[-columns:].double(), first)
    else:
        numerics.assert_exact({"db": db[-columns:]}, case)


@needs_compiler
def test_triton_refuses_a_gradient_of_a_beyond_its_offsets():
    k, rank = FAR // 64, 64
    given = ForwardOperands(reserved(8, k), reserved(8, k), reserved(rank, k), reserved(8, rank), None, 1.0, 0.0, None)
    _, spec = describe_forward(given)
    assert "A's gradient has 64 x 33554432 elements" in triton_lora.why_unsupported(spec)


@cuda_checks.needs_kernels
@pytest.mark.parametrize("name", ("da", "db"))
def test_a_gradient_of_cuda(poisoned, monkeypatch, name):
    """The last tile, of the second of two groups: dS and the first group's partial sum are given, with their flags."""
    tile = dataclasses.replace(cuda_checks.SMALL, group_m=1, splits=1)
    rows, rank, columns, other = tile.block_m, 64, 128, 64
    m, many = 2 * rows, FAR // rank + columns
    n, k = (other, columns) if name == "da" else (columns, other)
    case = numerics.draw_integer_case(m, n, k, rank, torch.bfloat16)
    left = reserved(m, many)
    left[:, -columns:] = case.x if name == "da" else case.dy
    ds, s = (
        (case.scaling * act.double() @ down.double()).bfloat16()
        for act, down in ((case.dy, case.lora_b), (case.x, case.lora_a.t()))
    )
    tiles, makes_ds = -(-many // columns), int(name == "da")

    def borrow(n_words, device):
        workspace = torch.zeros(n_words, dtype=torch.int32)
        workspace[0] = 2 * (tiles + makes_ds) - 1
        workspace[-2:] = 1  # groups in the last tile's sum, of both warpgroups
        workspace[3] = makes_ds  # the second row block of dS
        return workspace

    def launch_with_sums(prepared, tensors, numbers):
        named = dict(zip(prepared.tensors, tensors, strict=True))
        named["gradient_partials"][-2 * 128 * rank :] = 1.0
        if makes_ds:
            named["s"].copy_(ds)
        real(prepared, tensors, numbers)

    real = cuda.launch_bound
    monkeypatch.setattr(cuda, "launch_bound", launch_with_sums)
    monkeypatch.setattr(cuda, "borrow_workspace", borrow)
    monkeypatch.setattr(cuda_emulation, "_WRITTEN", ("grad_a", "grad_b"))
    c = case
    if name == "da":
        given = c.dy, left, reserved(n, many), reserved(rank, many), c.lora_b, None
        last = case.x[rows:].double().t() @ ds[rows:].double()
    else:
        given = left, None, reserved(many, k), c.lora_a, reserved(many, rank), s
        last = case.dy[rows:].double().t() @ s[rows:].double()
    needs = Needs(False, name == "da", name == "db", False)
    with cuda_emulation.emulated(OPTIONS):
        gradients = launches.backward(cuda, *given, c.scaling, 0.0, None, needs, tile=tile, ctas=1)
    made = gradients.da[:, -columns:].t() if name == "da" else gradients.db[-columns:]
    assert torch.equal(made.double(), last + 1.0)


@needs_compiler
def test_a_packed_weight_of_triton(monkeypatch):
    """The last part of it, into the last rows of scratch."""
    monkeypatch.setattr(quantised_launch, "target_of", lambda device: Target(80, n_sms=3))
    k, rows = 1024, SMALL[80].block_n
    last = quantised_checks.draw_packed("nf4", torch.randn(rows, k, dtype=torch.bfloat16))
    n = FAR // k + rows
    codes, scales = torch.empty(n * k // 2, 1, dtype=torch.uint8), torch.empty(n * k // 64)
    codes[-rows * k // 2 :], scales[-rows * k // 64 :] = last.tensors
    packed = last._replace(tensors=(codes, scales), shape=(n, k))
    x, lora_a, lora_b = (reserved(*shape) for shape in ((1, k), (8, k), (n, 8)))
    operands, spec = quantised_operands.describe_forward((x, packed, lora_a, lora_b, None, 1.0, 0.0, None))
    prepared = quantised_launch.prepare(spec, SMALL[80], in_loop=False)
    assert prepared.parts == 1
    with quantised_checks.allocated(packed.shape, torch.bfloat16) as scratch:
        y, s = reserved(1, n), reserved(1, 8)
        ticket = prepared.n_panels * prepared.parts - 1
        launch_last(prepared, lambda workspace: prepared.arguments(operands, y, s, workspace), 80, ticket, 1)
    assert quantised_checks.same_bits(scratch[0][-rows:], last.dequantize())


@cuda_checks.needs_kernels
def test_a_packed_weight_in_the_loop_of_cuda(monkeypatch):
    """The last column of tiles: its codes and scales. S, which the tile reads, is there already: zeros."""
    tile = dataclasses.replace(cuda_quantised_checks.IN_LOOP, splits=1)
    k, rows = 1024, tile.block_n
    last = quantised_checks.draw_packed("nf4", torch.randn(rows, k, dtype=torch.bfloat16))
    n = FAR // k + rows
    codes, scales = torch.empty(n * k // 2, 1, dtype=torch.uint8), torch.empty(n * k // 64)
    codes[-rows * k // 2 :], scales[-rows * k // 64 :] = last.tensors
    packed = last._replace(tensors=(codes, scales), shape=(n, k))
    x, lora_a, lora_b = torch.eye(64, k, dtype=torch.bfloat16), reserved(8, k), torch.zeros(n, 8, dtype=torch.bfloat16)
    operands, spec = quantised_operands.describe_forward((x, packed, lora_a, lora_b, None, 1.0, 0.0, None))
    workspaces = []

    def borrow(n_words, device):
        workspaces.append(torch.zeros(n_words, dtype=torch.int32))
        workspaces[-1][0] = n // rows  # the tiles before, one of S among them, have been claimed,
        workspaces[-1][2] = 1  # and the row block's flag of S is up
        return workspaces[-1]

    monkeypatch.setattr(cuda, "borrow_workspace", borrow)
    monkeypatch.setattr(cuda_emulation, "_WRITTEN", tuple(name for name in cuda_emulation._WRITTEN if name != "s"))
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    with cuda_emulation.emulated(OPTIONS):
        y, _ = cuda_quantised_launch.prepare(spec, tile, 1, True)(operands)
    assert not workspaces[0].any()
    assert quantised_checks.same_bits(y[:, -rows:].t().contiguous(), last.dequantize()[:, :64].contiguous())
