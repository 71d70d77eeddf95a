"""The host's side of a Triton launch, as far as it can be seen without a device: what is launched, where, and what is
taken for granted of it."""

import itertools
import json
import os
import random
import subprocess
import sys
import weakref
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastlora.backends.configs import TILE_TABLES, TileConfig, gradients_last
from fastlora.backends.target import Target
from fastlora.backends.triton import compiled
from fastlora.backends.triton import launch as triton_lora
from fastlora.operands import backward_key, describe_backward, describe_forward, forward_key
from fastlora.problem import BackwardOperands, ForwardOperands, Needs, Sizes
from tests.support import specialisations


class FakeLauncher:
    """Stands in for Triton's launcher in C: notes what it is called with, and on which device."""

    def __init__(self, current: list):
        self.current, self.calls = current, []

    def __call__(self, *args):
        self.calls.append((self.current[-1], args))


@pytest.fixture
def current(monkeypatch):
    """The stack of current devices."""
    devices = [0]

    @contextmanager
    def device(index):
        devices.append(index)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(compiled, "current_device", lambda: devices[-1])
    return devices


def launch_of(launcher, device: torch.device, made: list, nested: bool) -> compiled.CompiledLaunch:
    """A launch as if it were compiled: of two matrices by tensor map, whose making ``made`` notes, and a pointer."""
    blocks = ([16, 16], [16, 16], None)
    launch = compiled.CompiledLaunch(None, 5, device, blocks, {}, ("constant",), {})

    def make_map(descriptor, number):
        made.append((descriptor.base.data_ptr(), number))
        return [f"map {descriptor.base.data_ptr()}", *descriptor.shape]

    launch._layouts = (next(compiled._numbers), next(compiled._numbers), None)
    launch._index, launch._stream = device.index, lambda index: f"stream of {index}"
    launch._direct = compiled._Direct(launcher, ("head",), nested, make_map)
    return launch


def matrix(value: float = 0.0) -> torch.Tensor:
    return torch.full((16, 32), value, dtype=torch.bfloat16)


@pytest.mark.parametrize("index", (0, 1))
@pytest.mark.parametrize("nested", (False, True))
def test_launches_are_made_on_the_tensors_device(current, index, nested):
    """Triton takes the current device; a second GPU's tensors would meet the first one's stream."""
    launcher = FakeLauncher(current)
    x, weight, down = matrix(), matrix(), matrix()
    launch_of(launcher, torch.device("cuda", index), [], nested)(x, weight, down, 7)
    ((device, args),) = launcher.calls
    given = [f"map {x.data_ptr()}", 16, 32, f"map {weight.data_ptr()}", 16, 32, down, 7, "constant"]
    assert device == index and current == [0]
    assert args == (5, 1, 1, f"stream of {index}", "head", *([given] if nested else given))


def test_tensor_maps_are_made_once_and_keep_no_memory_alive(current, monkeypatch):
    """Whatever lies at an address later has the same map, if it has the same layout; else it has another number."""
    made: list = []
    launcher = FakeLauncher(current)
    launch = launch_of(launcher, torch.device("cuda", 0), made, True)
    x, weight, other = matrix(), matrix(1.0), matrix(2.0)
    for _ in range(3):
        launch(x, weight, None)
    launch(other, weight, None)
    assert made == [(x.data_ptr(), 0), (weight.data_ptr(), 1), (other.data_ptr(), 0)]
    launch(weight, x, None)
    assert len(made) == 5, "the same address in another place is cut into blocks in another way"
    kernel = SimpleNamespace(hash="of a kernel")
    assert len({launch._layout(i, x, [16, 16], kernel) for i in (0, 1, 0, 1)}) == 2
    of_the_weight = weakref.ref(weight)
    launcher.calls.clear()
    del weight
    assert of_the_weight() is None
    monkeypatch.setattr(compiled, "_MOST_ENTRIES", len(compiled._maps))
    launch(matrix(3.0), other, None)
    assert len(compiled._maps) <= 2, "room is made"


def test_a_profilers_hooks_are_called(current, monkeypatch):
    """They see launches by Triton's own means alone."""
    launcher, run = FakeLauncher(current), []
    launch = launch_of(launcher, torch.device("cuda", 0), [], True)
    monkeypatch.setattr(launch, "_run", run.append)
    runtime = compiled.triton.knobs.runtime
    launch(matrix(), matrix(), None)
    for hooks in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        hooks.add(print)
        launch(matrix(), matrix(), None)
        hooks.remove(print)
    monkeypatch.setattr(runtime, "launch_enter_hook", print)
    launch(matrix(), matrix(), None)
    assert len(launcher.calls) == 1 and len(run) == 3


def _in_rows_of(columns: int):
    return lambda t: torch.nn.functional.pad(t, (0, columns))[:, : t.shape[1]]


LAYOUTS = (torch.clone, specialisations.off_by_one, _in_rows_of(8), _in_rows_of(16), _in_rows_of(1))
NUMBERS = {
    "scaling": (0.5, 1.0, 1.5, 2.0, 64.0),
    "dropout_p": (0.1, 0.25, 0.5),
    "seed": (torch.tensor(5), torch.tensor(2**40), torch.empty((), dtype=torch.int64, device="meta")),
}
KEYS = {ForwardOperands: (forward_key, describe_forward), BackwardOperands: (backward_key, describe_backward)}


def drawn_call(draw: random.Random) -> tuple:
    """Operands of a small call, and the needs of a backward."""
    dtype = draw.choice((torch.float16, torch.bfloat16, torch.float32))
    m, n, k, r = draw.choice((1, 40)), draw.choice((16, 40)), draw.choice((1, 32, 40)), draw.choice((1, 8))
    x, weight, dy, s = (torch.zeros(*shape, dtype=dtype) for shape in ((m, k), (n, k), (m, n), (m, r)))
    lora_a, lora_b = (torch.zeros(*shape, dtype=draw.choice((dtype, torch.float32))) for shape in ((r, k), (n, r)))
    numbers = (2.0, 0.1, torch.tensor(2**40)) if draw.random() < 0.7 else (2.0, 0.0, None)
    if draw.random() < 0.5:
        bias = draw.choice((None, torch.zeros(n, dtype=dtype)))
        return (ForwardOperands(x, weight, lora_a, lora_b, bias, *numbers),)
    needs = draw.choice(
        (Needs(True, True, True, True), Needs(True, True, True, False), Needs(False, True, True, False))
    )
    return BackwardOperands(dy, x, weight, lora_a, lora_b, s, *numbers), needs


def altered(operands):
    """The same call with one thing changed, one after the other: how an operand lies in memory, or a number."""
    yield operands
    for name, value in operands._asdict().items():
        if name in NUMBERS and (name == "scaling" or operands.seed is not None):
            yield from (operands._replace(**{name: other}) for other in NUMBERS[name])
        elif isinstance(value, torch.Tensor) and value.dim() == 2:
            yield from (operands._replace(**{name: lie(value)}) for lie in LAYOUTS)
        elif isinstance(value, torch.Tensor) and value.dim() == 1:
            yield operands._replace(**{name: torch.zeros(len(value) + 1, dtype=value.dtype)[1:]})


def test_calls_of_one_description_have_one_kernel():
    """By Triton's own keys: what a launch takes for granted must be in its description, and that in the call's key."""
    if triton_lora.triton.knobs.runtime.interpret:
        pytest.skip("the interpreter compiles nothing")
    draw = random.Random(0)
    kernels, specs, calls = defaultdict(set), defaultdict(set), 0
    for call in (drawn_call(draw) for _ in range(30)):
        key_of, describe = KEYS[type(call[0])]
        for operands in altered(call[0]):
            taken, spec = describe(operands, *call[1:])
            if all(one is other for one, other in zip(operands, taken, strict=True)):
                specs[key_of(operands, *call[1:])].add(spec)
            with specialisations.asked_for(90) as found:
                triton_lora.prepare(spec).compile(taken)
            kernels[spec] |= found
            assert spec.row_strides[:4] == tuple(
                t.stride(0) for t in (taken[0], taken.weight, taken.lora_a, taken.lora_b)
            )
            calls += 1
    assert calls > 1.5 * len(kernels) and calls > 1.5 * len(specs), "too few calls have anything in common"
    assert max(map(len, specs.values())) == 1 and max(map(len, kernels.values())) == 1


def described(direction: str = "forward", needs=None, sizes=(512, 256, 128, 16), **changes):
    """The description of an aligned bfloat16 layer, with some changes."""
    m, n, k, r = sizes
    shapes = {"x": (m, k), "weight": (n, k), "lora_a": (r, k), "lora_b": (n, r), "dy": (m, n), "s": (m, r)}
    t = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    factors, numbers = (t["lora_a"], t["lora_b"]), (2.0, 0.0, None)
    if direction == "forward":
        _, spec = describe_forward(ForwardOperands(t["x"], t["weight"], *factors, None, *numbers))
    else:
        given = BackwardOperands(t["dy"], t["x"], t["weight"], *factors, t["s"], *numbers)
        _, spec = describe_backward(given, needs or Needs(True, True, True, False))
    return spec._replace(**changes)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(triton_lora, "target_of", lambda device: Target(90, n_sms=132))


CONFIG = TileConfig(64, 32, 64, 2, 4, 3)


@pytest.mark.parametrize(
    "changes, config, fields",
    (
        ({}, {}, dict(fused=True, even_k=True, tma=True, tma_down=True, dropout=False, wgmma=True, block_r=16)),
        ({}, {"fused": False}, dict(fused=False, block_r=16)),
        ({"sizes": (512, 256, 128, 64)}, {}, dict(fused=True, block_r=64)),
        ({"sizes": (512, 256, 128, 72)}, {}, dict(fused=False, block_r=128)),
        ({"sizes": (512, 256, 96, 16)}, {}, dict(even_k=False)),  # a multiple of block_n, not of block_k
        ({"dropout": True}, {}, dict(dropout=True, block_r=64)),
        ({"dropout": True}, {"block_m": 32}, dict(dropout=True, block_r=16)),
        ({"direction": "backward"}, {}, dict(fused=True, even_k=True, forward=False, block_r=16)),
        ({"direction": "backward"}, {"fused": False}, dict(fused=False)),
        ({"direction": "backward", "sizes": (512, 96, 128, 16)}, {}, dict(even_k=False)),
        ({"direction": "backward", "sizes": (512, 256, 128, 72)}, {}, dict(fused=False, block_r=128)),
        ({"direction": "backward", "needs": Needs(False, True, True, False)}, {}, dict(fused=False)),
    ),
    ids=str,
)
def test_what_a_launch_is_compiled_for(hopper, changes, config, fields):
    variant = triton_lora.prepare(described(**changes), replace(CONFIG, **config)).variant
    assert {name: getattr(variant, name) for name in fields} == fields


TILE = TileConfig(32, 64, 16, 2, 4, 3, gradient_m=64, gradient_n=32)  # of numbers that are all unlike
SUBSETS = [Needs(*wanted) for wanted in itertools.product((False, True), repeat=4)][1:]


@pytest.mark.parametrize("fused, columns", ((True, 2), (False, 3)))
def test_a_forward_has_a_program_for_every_tile(hopper, fused, columns):
    """100 rows are 4 blocks, 96 columns 2 of theirs; with the separate shrink one column more."""
    launch = triton_lora.prepare(described(sizes=Sizes(100, 96, 160, 16)), replace(TILE, fused=fused))
    assert launch.launch.grid == 4 * columns and launch.n_words == 2 + 4
    assert launch.y_shape == (100, 96) and launch.s_shape == (100, 16)


@pytest.mark.parametrize("needs", SUBSETS, ids=str)
def test_a_backward_has_tiles_of_what_is_wanted(hopper, needs):
    """3 columns of dX, or one of dS alone; 5 of dA, 3 of dB with dbias in each of two groups of row blocks; a flag for
    each row block and a counter for each gradient tile."""
    launch = triton_lora.prepare(described("backward", needs, Sizes(100, 96, 160, 16)), TILE)
    columns, gradients = 3 if needs.dx else int(needs.da), 5 * needs.da + 3 * (needs.db or needs.dbias)
    assert launch.launch.grid == 4 * columns + 2 * gradients and launch.n_words == 2 + 4 + gradients
    assert launch.numbers[:2] == (columns, needs.dx), "the gradients last, where that is short"
    dx, ds, da, db, dbias, *_ = launch.outputs
    assert dx == (((100, 160), torch.bfloat16) if needs.dx else None)
    assert ds == (((100, 16), torch.bfloat16) if needs.dx or needs.da else None)
    assert da == (((16, 160), torch.bfloat16) if needs.da else None)
    assert db == (((96, 16), torch.bfloat16) if needs.db else None)
    assert dbias == (((96,), torch.bfloat16) if needs.dbias else None)


@pytest.mark.parametrize(
    "registers, shared, warps, programs",
    (
        (32, 1024, 4, 16),  # 2048 threads
        (128, 1024, 8, 2),  # 65536 registers
        (32, 100_000, 4, 2),  # 228 KiB
    ),
)
def test_a_wave_is_what_runs_at_once(hopper, registers, shared, warps, programs):
    """A multiprocessor's programs by what the kernel takes of it, times 132."""
    prepared = triton_lora.prepare(described(), CONFIG)
    metadata = SimpleNamespace(shared=shared, num_warps=warps)
    prepared.launch = SimpleNamespace(compiled=SimpleNamespace(n_regs=registers, metadata=metadata))
    assert prepared.wave == 132
    prepared.learn()
    assert prepared.wave == 132 * programs


def test_the_compiler_is_told_the_tiles_warps_and_stages(hopper):
    launch = triton_lora.prepare(described(), CONFIG).launch
    assert launch.options == {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


@pytest.mark.parametrize("direction", ("forward", "backward"))
def test_blocks_are_cut_from_matrices_as_they_lie(hopper, direction):
    """Of act, the weight, which each direction contracts over other columns, and the factor that makes S or dS."""

    def blocks(base_format):
        return triton_lora.prepare(described(direction, base_format=base_format), CONFIG).launch.blocks

    as_stored, turned, down = ([32, 64], [64, 32], [16, 64])
    if direction == "backward":
        as_stored, turned, down = turned, as_stored, down[::-1]
    assert blocks("dense") == ([64, 64], as_stored, down) and blocks("transposed") == ([64, 64], turned, down)


def test_what_is_not_served_says_why():
    spec = described()
    assert triton_lora.why_unsupported(spec) is None
    for changes, reason in (
        ({"base_format": "nf4"}, "no kernel for a nf4 base weight with a single branch"),
        ({"branch": "segments"}, "no kernel for a dense base weight with a segments branch"),
        ({"dtype": torch.float64}, "float64"),
        ({"sizes": spec.sizes._replace(r=257)}, "rank 257 is above 256"),
        ({"sizes": spec.sizes._replace(r=256, k=1 << 23)}, "256 x 8388608 elements"),
    ):
        assert reason in triton_lora.why_unsupported(spec._replace(**changes))


@pytest.mark.parametrize("unaligned", ("act", "weight", "lora_a"))
def test_what_lies_unaligned_goes_by_pointer(hopper, unaligned):
    spec = described()
    spec = spec._replace(aligned=spec.aligned._replace(**{unaligned: False}))
    variant = triton_lora.prepare(spec, CONFIG).variant
    assert (variant.tma, variant.tma_down) == ((True, False) if unaligned == "lora_a" else (False, True))


@pytest.mark.parametrize("unaligned", ("act", "weight", None))
def test_the_tables_of_unaligned_rows_serve_each_operand_that_is(hopper, unaligned):
    spec = described()
    if unaligned:
        spec = spec._replace(aligned=spec.aligned._replace(**{unaligned: False}))
    tiles = {(c.block_m, c.block_n, c.block_k) for c in TILE_TABLES["unaligned" if unaligned else "hopper"]}
    config = triton_lora.prepare(spec).config
    assert (config.block_m, config.block_n, config.block_k) in tiles


@pytest.mark.parametrize(
    "narrow", ({"n": 264}, {"k": 136}, {"act": 136}, {"weight": 136}, {"saved_x": 264}), ids=lambda narrow: [*narrow][0]
)
def test_loads_are_wide_where_triton_knows_it(hopper, narrow):
    """Of sizes and strides that are multiples of 16, not of 8."""
    spec = described("backward")
    assert triton_lora.has_wide_loads(spec)
    sizes = spec.sizes._replace(**{name: value for name, value in narrow.items() if name in ("n", "k")})
    strides = {name: value for name, value in narrow.items() if name not in ("n", "k")}
    spec = spec._replace(sizes=sizes, strides=spec.row_strides._replace(**strides))
    assert not triton_lora.has_wide_loads(spec)
    config = triton_lora.prepare(spec).config
    assert any(config.block_m == c.block_m and config.block_n == c.block_n for c in TILE_TABLES["unaligned"])


@pytest.mark.parametrize("needs", (Needs(True, True, True, True), Needs(False, False, True, False)), ids=str)
@pytest.mark.parametrize("m", (128, 129))
def test_sums_between_row_chunks_are_kept_where_there_are_several(hopper, m, needs):
    """One group of two row blocks, or two groups; each sum where its gradient is wanted."""
    *_, of_a, of_b, of_bias = triton_lora.prepare(described("backward", needs, (m, 256, 128, 16)), CONFIG).outputs
    several = m > 128
    assert of_a == (((128, 16), torch.float32) if several and needs.da else None)
    assert of_b == (((256, 16), torch.float32) if several and needs.db else None)
    assert of_bias == (((256,), torch.float32) if several and needs.dbias else None)


@pytest.mark.parametrize("m, n, k", ((8192, 256, 4096), (256, 4096, 256), (512, 16384, 128)))
def test_gradient_tiles_are_queued_where_the_rule_says(hopper, m, n, k):
    prepared = triton_lora.prepare(described("backward", None, (m, n, k, 16)), CONFIG)
    assert prepared.numbers[1] == gradients_last(m, k, n, CONFIG.block_m, CONFIG.block_n)


def test_no_value_of_a_seed_is_compiled_for():
    for kernel in (triton_lora.lora_forward_kernel, triton_lora.lora_backward_kernel):
        if not hasattr(kernel, "params"):
            pytest.skip("Triton interprets in this process")
        by_name = {param.name: param for param in kernel.params}
        assert all(
            by_name[name].do_not_specialize for name in ("M", "seed", "seed_ptr", "threshold", "n_words", "wave")
        )
    by_name = {param.name: param for param in triton_lora.lora_backward_kernel.params}
    assert by_name["gradients_last"].do_not_specialize and by_name["n_columns"].do_not_specialize


INTERPRETED = """
import json, torch, fastlora
results = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    torch.manual_seed(0)
    x, weight, a, b = (torch.randn(*shape).to(dtype) for shape in ((40, 24), (16, 24), (3, 24), (16, 3)))
    try:
        y = fastlora.lora_linear(x, weight, a, b, 0.5, backend="triton")
        exact = fastlora.lora_linear(*(t.double() for t in (x, weight, a, b)), 0.5)
        results[str(dtype)] = (y.double() - exact).abs().max().item()
    except ValueError as error:
        results[str(dtype)] = str(error)
print(json.dumps(results))
"""


@pytest.mark.parametrize("mended", (False, True), ids=("as it is", "loops mended"))
def test_the_interpreter_gives_right_values_or_a_reason(mended):
    """As a user meets it, without the tests' repairs; and with the one that lets Triton 3.6 run under any NumPy."""
    repair = "from tests.support import interpreter; interpreter.mend_range()\n" if mended else ""
    done = subprocess.run(
        [sys.executable, "-c", repair + INTERPRETED],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    found = json.loads(done.stdout)
    if isinstance(found["torch.float32"], str):
        assert not mended and all("install numpy<2.4" in reason for reason in found.values())
        return
    assert found["torch.float32"] < 1e-4
    for dtype in ("torch.float16", "torch.bfloat16"):
        assert f"serves float32 alone, not {dtype}" in found[dtype] and "unset TRITON_INTERPRET" in found[dtype]
