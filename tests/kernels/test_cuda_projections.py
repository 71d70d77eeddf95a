"""Projections that share an input by the compiled CUDA kernels, in the emulator: values, masks, races, missing waits,
accesses out of bounds, deadlocks; and which calls they refuse."""

import functools

import pytest
import torch

import fastlora
from benchmarks.host_calls import count_calls
from fastlora import one_launch, routes, selection
from fastlora.backends.cuda import extension, projection_launch
from fastlora.backends.cuda import launch as single
from fastlora.backends.cuda.tiles import choose_tile
from fastlora.operands import describe_backward, describe_forward
from fastlora.problem import BackwardOperands, ForwardOperands, Needs
from fastlora.projections import SharedBackward, SharedForward, describe_shared_backward, describe_shared_forward
from tests.emulator import EmulatorError
from tests.support import cuda_runtime
from tests.support.cuda_checks import ENDS, needs_kernels
from tests.support.cuda_emulation import SCHEDULES, emulated
from tests.support.cuda_projection_bugs import COMPILED, PLANTED, Planted, check_changed, check_compiled
from tests.support.cuda_projection_checks import (
    BITS,
    GATE_UP,
    GROUPED,
    GROUPS,
    MASKED,
    MIXED,
    NEEDS,
    QKV,
    SUBSETS,
    WIDE,
    Group,
    assert_exact,
    check_group,
    check_integers,
    check_masks,
    check_needs,
    check_neighbours,
    check_schedules,
    draw,
    expected,
    projections_of,
    run,
)

pytestmark = [needs_kernels, pytest.mark.usefixtures("own_workspace", "poisoned")]


def schedule(*what) -> object:
    """One or another for each."""
    return SCHEDULES[sum(map(ord, str(what))) % len(SCHEDULES)]


@pytest.mark.parametrize("name", GROUPS)
def test_integers_are_exact(name):
    check_integers(name, schedule(name))


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[pytest.mark.sweep] if each == "groups of sixteen" else []) for each in GROUPED]
)
def test_groups_of_row_blocks_as_long_as_shipped(name):
    check_group(name, schedule(name))


@pytest.mark.parametrize("name", BITS)
def test_every_schedule_gives_the_same_bits(name):
    check_schedules(name)


@pytest.mark.parametrize("name", SUBSETS)
def test_gradients_that_are_asked_for(name):
    check_needs(name, schedule(name), fused=name != "all")


@pytest.mark.parametrize(
    "end", (None, *(pytest.param(end, marks=[pytest.mark.sweep] if end != "65535" else []) for end in ENDS))
)
@pytest.mark.parametrize("name", MASKED)
def test_each_bit_of_each_mask(name, end):
    check_masks(name, end)


def test_a_neighbours_nan_stays_there():
    check_neighbours(SCHEDULES[1])


@pytest.mark.parametrize("name", COMPILED)
def test_bugs_in_the_ptx_are_found(name):
    with pytest.raises((EmulatorError, AssertionError)):
        check_compiled(name)


@pytest.mark.sweep
@pytest.mark.parametrize("group", sorted({planted.group for planted in PLANTED.values()}))
def test_the_sources_as_they_are_pass(group):
    check_changed(Planted("csrc/schedule.h", "// The queue of tiles", "// The queue", group))


@pytest.mark.sweep
@pytest.mark.parametrize("name", PLANTED)
def test_bugs_in_the_sources_are_found(name):
    """Each compiles two kernels."""
    with pytest.raises((EmulatorError, AssertionError)):
        check_changed(PLANTED[name])


def test_what_is_read_and_written():
    """X once for each column of all Y; dY twice and X once for each column of dX and of the gradients; one dX."""
    group = Group(((512, 16), (256, 16)), biases=(False, False))
    m, k = 256, 256
    cases = draw(group, m, k=k)
    _, (forward, backward) = run(group, cases, WIDE)
    x, dx = m * k * 2, m * k * 2

    def counted(stats, counter: str, names) -> dict[str, int]:
        return {name: getattr(stats.buffers[name], counter) for name in names}

    columns = 2 + 1  # of Y
    assert forward.buffers["act"].bytes_read == (columns + len(cases)) * x, "X once for each column, and for each S"
    for i, (n, r) in enumerate(group.sizes):
        own = f"projections[{i}]."
        of_y, s = {f"{own}out": m * n * 2}, m * r * 2
        assert counted(forward, "bytes_written", (f"{own}out", f"{own}s")) == {**of_y, f"{own}s": s}
        # A cluster's two CTAs, which are all row blocks, read it together.
        assert counted(forward, "bytes_read", (f"{own}weight",)) == {f"{own}weight": n * k * 2}
        assert backward.buffers[f"{own}act"].bytes_read == 3 * m * n * 2, "a column of dX, of dS and of dB"
        assert backward.buffers[f"{own}weight"].bytes_read == n * k * 2
        assert backward.buffers[f"{own}grad_b"].bytes_written == n * r * 2
    assert backward.buffers["out"].bytes_written == dx
    assert backward.buffers["layer_input"].bytes_read == len(cases) * x


def test_factors_of_another_dtype_have_gradients_of_it():
    cases = draw(QKV, 72, adapter_dtype=torch.float32)
    results, _ = run(QKV, cases, WIDE)
    assert all(each.dtype == torch.float32 for name in ("da", "db") for each in results[name])
    wanted = expected(QKV, cases)
    for name in ("da", "db"):
        for result, value in zip(results[name], wanted[name], strict=True):
            assert torch.equal(result.double(), value), name


def described(group: Group = QKV, needs: Needs | None = None, m: int = 64, dtype=torch.bfloat16):
    """The description of a call on a GPU that need not be there; ``needs``: of each in a backward."""
    cases = draw(group, m, dtype, integers=False)
    projections = projections_of(group, cases)
    if needs is None:
        return describe_shared_forward(SharedForward(cases[0].x, projections))[1]
    ss = tuple(None if p.lora_a is None else cases[0].x.new_zeros(m, len(p.lora_a)) for p in projections)
    dys, of_each = tuple(c.dy for c in cases), (needs,) * len(cases)
    return describe_shared_backward(SharedBackward(dys, cases[0].x, projections, ss, of_each))[1]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("group", (QKV, GATE_UP, MIXED), ids=("q, k, v", "gate, up", "four"))
def test_what_is_compiled_is_served(group, dtype):
    assert projection_launch.why_not_compiled(described(group, dtype=dtype)) is None
    assert projection_launch.why_not_compiled(described(group, Needs(True, True, True, False), dtype=dtype)) is None
    assert selection.serving_module("cuda", described(group)) is projection_launch
    assert "cuda" in one_launch.TOGETHER


@pytest.mark.parametrize(
    "group, needs, reason",
    (
        (Group(((8, 8),) * 5, (1.0,) * 5, (0.0,) * 5, (False,) * 5), None, "5 projections are more than the 4"),
        (Group(((8, 0), (16, 0))), None, "no projection has an adapter"),
        (Group(((8, 8), (8, 8)), dropouts=(0.1, 0.0)), None, "some of the projections drop elements"),
        (Group(((8, 8), (16, 72))), None, "projection 1: rank 72 of several projections is above 64"),
        (Group(((8, 8), (12, 8))), None, "projection 1: out_features 12"),
        (Group(((8, 8), (16, 0))), Needs(True, True, True, True), "projection 1: no kernel makes the bias's gradient"),
    ),
    ids=str,
)
def test_what_is_not_compiled_is_refused_with_its_reason(group, needs, reason):
    assert reason in projection_launch.why_not_compiled(described(group, needs))


def test_other_dtypes_and_layouts_are_refused_with_their_reason():
    assert "dtype torch.float32 is not" in projection_launch.why_not_compiled(described(dtype=torch.float32))
    spec = described()
    transposed = spec._replace(members=(spec.members[0], spec.members[1]._replace(base_format="transposed")))
    reason = "projection 1: no kernel for a transposed base weight with a shared_input branch"
    assert projection_launch.why_not_compiled(transposed) == reason
    assert projection_launch.why_unsupported(spec) == "the tensors are on cpu"


def test_a_group_of_which_one_drops_and_one_lacks_an_adapter_is_served():
    assert projection_launch.why_not_compiled(described(Group(((8, 8), (16, 0)), dropouts=(0.1, 0.1)))) is None


def test_maps_are_made_once():
    """Those of what stays where it is are found again in later launches."""
    group = Group(((72, 16), (8, 8)))
    cases, runtime = draw(group, 64, k=72), cuda_runtime.runtime()
    run(group, cases, WIDE)
    assert any(call.startswith("encode") for call in runtime.calls())
    run(group, cases, WIDE)
    made = {int(call.split()[1], 16) for call in runtime.calls() if call.startswith("encode")}
    kept = {t.data_ptr() for c in cases for t in (c.weight, c.lora_a, c.lora_b, c.x, c.dy)}
    assert not made & kept


@pytest.mark.parametrize("drops", (False, True))
def test_a_launch_of_several_takes_fewer_calls_of_the_host_than_theirs(monkeypatch, drops):
    """Calls of Python and C functions: prepared launches of three projections, and of each alone."""
    group = Group(((72, 16), (8, 8), (8, 16)), dropouts=(0.1 * drops,) * 3)
    cases, runtime = draw(group, 64, integers=False, k=72), cuda_runtime.runtime()
    runtime.on_launch(None)
    monkeypatch.setattr(extension, "load", lambda: (runtime.module, None))
    monkeypatch.setattr(single, "raw_stream", lambda device: 0)
    projections, needs = projections_of(group, cases), Needs(True, True, True, False)
    forward = describe_shared_forward(SharedForward(cases[0].x, projections))
    ss = tuple(projection_launch.prepare(forward[1], ctas=4)(forward[0])[1])
    dys, of_each = tuple(c.dy for c in cases), (needs,) * len(cases)
    backward = describe_shared_backward(SharedBackward(dys, cases[0].x, projections, ss, of_each))
    alone: list[list] = [[], []]
    for c, s, (weight, lora_a, lora_b, bias, *numbers) in zip(cases, ss, projections, strict=True):
        given = describe_forward(ForwardOperands(c.x, weight, lora_a, lora_b, bias, *numbers))
        alone[0].append((single.prepare(given[1], ctas=4), given[0]))
        given = describe_backward(BackwardOperands(c.dy, c.x, weight, lora_a, lora_b, s, *numbers), needs)
        alone[1].append((single.prepare(given[1], ctas=4), given[0]))
    for (operands, spec), launches in zip((forward, backward), alone, strict=True):
        calls = [(projection_launch.prepare(spec, ctas=4), operands)], launches

        def call_each(calls):
            for launch, each in calls:
                launch(each)

        for _ in range(2):
            counted = [count_calls(functools.partial(call_each, each)) for each in calls]
        assert counted[0] < counted[1], counted


def test_lora_linears_trains_by_one_launch_each_way(monkeypatch):
    """From the public function to the kernels: the second output is not used, the last one has no adapter."""
    monkeypatch.setattr(projection_launch, "why_unsupported", projection_launch.why_not_compiled)
    monkeypatch.setattr(single, "multiprocessors", lambda device: 4)
    group = Group(((72, 16), (8, 8), (16, 0)), biases=(False, False, False))
    cases = draw(group, 72, k=72)
    x, given = cases[0].x.clone().requires_grad_(), []
    for c, (_, r) in zip(cases, group.sizes, strict=True):
        factors = [t.clone().requires_grad_() if r else None for t in (c.lora_a, c.lora_b)]
        given.append((c.weight, *factors, c.scaling))
    routes.forget_routes()
    fastlora.reset_dispatch_counts()
    try:
        with emulated() as launched:
            ys = fastlora.lora_linears(x, *zip(*given, strict=True), backend="cuda")
            torch.autograd.backward([ys[0], ys[2]], [cases[0].dy, cases[2].dy])
    finally:
        routes.forget_routes()
    counts = fastlora.dispatch_counts()
    assert len(launched.stats) == counts["cuda"] == 2 and not counts["fallbacks"], counts
    needs = (NEEDS, None, NEEDS)
    grads = [(None, None) if a is None else (a.grad, b.grad) for _, a, b, _ in given]
    results = {"y": ys, "dx": [x.grad], "da": [a for a, _ in grads], "db": [b for _, b in grads]}
    wanted = expected(group, cases, needs)
    assert_exact(results, {name: wanted[name] for name in results})


def test_the_tile_suits_the_columns_of_all():
    """Llama-8B's q, k and v: of few rows the small tiles make more."""
    chosen = [choose_tile(m, 4096 + 2 * 1024, 4096, 16, 132, projections=3) for m in (256, 8192)]
    assert [(tile.block_m, tile.block_n, tile.splits) for tile in chosen] == [(128, 128, 1), (128, 256, 1)]
    with pytest.raises(ValueError, match="no CUDA kernel is compiled for rank 72"):
        choose_tile(8192, 6144, 4096, 72, 132, projections=3)
