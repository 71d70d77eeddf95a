"""Arguments, buffers, counters and refusals of load_ptx and Module.launch."""

import ctypes

import numpy as np
import pytest
import torch

from tests.emulator import (
    BoundsError,
    LaunchError,
    LaunchOptions,
    PtxError,
    Struct,
    TensorMap,
    TrapError,
    UninitialisedError,
    load_ptx,
)
from tests.emulator.conformance.case import module, pointers
from tests.emulator.engine_library import library, operations

_COPY = pointers("x", "y") + (
    "\n    mov.u32 %r0, %tid.x;\n    mul.wide.u32 %rd4, %r0, 4;\n    add.s64 %rd0, %rd0, %rd4;\n"
    "    add.s64 %rd1, %rd1, %rd4;\n    ld.global.b32 %r1, [%rd0];\n"
    "    st.global.b32 [%rd1], %r1;"
)
COPY = module(_COPY, {"x": "u64", "y": "u64"})


def ints(n):
    return torch.arange(n, dtype=torch.int32)


def test_arguments_by_position_and_by_name():
    y = torch.zeros(32, dtype=torch.int32)
    stats = load_ptx(COPY).launch("snippet", 1, 32, [ints(32), y])
    assert torch.equal(y, ints(32))
    assert set(stats.buffers) == {"arg0", "arg1"}
    stats = load_ptx(COPY).launch(None, (1, 1, 1), (32, 1, 1), {"x": ints(32), "out": y})
    assert set(stats.buffers) == {"x", "out"}


def test_counters_of_a_copy():
    y = torch.zeros(64, dtype=torch.int32)
    stats = load_ptx(COPY).launch(None, 1, 64, {"x": ints(64), "y": y})
    x_traffic, y_traffic = stats.buffers["x"], stats.buffers["y"]
    assert (x_traffic.bytes_read, x_traffic.first_touch_read, x_traffic.bytes_written) == (256, 256, 0)
    assert (y_traffic.bytes_written, y_traffic.first_touch_written, y_traffic.bytes_read) == (256, 256, 0)
    assert (stats.threads, stats.mma, stats.barriers) == (64, 0, 0)
    assert stats.seconds > 0


def test_first_touch_counts_bytes_once_and_broadcasts_count_once():
    body = pointers("x") + (
        "\n    ld.global.b32 %r1, [%rd0];\n    ld.global.b32 %r2, [%rd0];\n    mov.u32 %r0, %tid.x;\n"
        "    mul.wide.u32 %rd4, %r0, 2;\n    add.s64 %rd0, %rd0, %rd4;\n"
        "    ld.global.b16 %h1, [%rd0];"
    )
    stats = load_ptx(module(body, {"x": "u64"})).launch(None, 1, 64, {"x": ints(64)})
    # Two warps read one word twice, then 64 threads two bytes each.
    assert stats.buffers["x"].bytes_read == 2 * 2 * 4 + 128
    assert stats.buffers["x"].first_touch_read == 128


def test_tensor_core_counters():
    from tests.emulator.conformance import all_cases

    case = next(case for case in all_cases() if case.name == "wgmma n64")
    args = {name: tensor.clone() for name, tensor in case.args.items()}
    stats = load_ptx(case.ptx).launch(None, 1, 128, args, shared_bytes=case.shared_bytes)
    assert (stats.wgmma, stats.macs, stats.barriers) == (1, 64 * 64 * 16, 1)


@pytest.mark.parametrize("value", [-7, ctypes.c_int32(-7), np.int32(-7), np.int64(-7), True])
def test_scalars_are_sized_by_the_declaration(value):
    body = (
        "    ld.param.u64 %rd0, [y];\n    ld.param.s32 %r1, [n];\n    ld.param.s64 %rd1, [wide];\n"
        "    cvt.u32.u64 %r2, %rd1;\n    add.s32 %r1, %r1, %r2;\n    st.global.b32 [%rd0], %r1;"
    )
    y = torch.zeros(1, dtype=torch.int32)
    load_ptx(module(body, {"y": "u64", "n": "u32", "wide": "s64"})).launch(
        None, 1, 1, {"y": y, "n": value, "wide": value}
    )
    expected = getattr(value, "value", value)
    assert y[0] == 2 * int(expected)


def test_floats():
    body = (
        "    ld.param.u64 %rd0, [y];\n    ld.param.f32 %f1, [a];\n    ld.param.b32 %r1, [b];\n"
        "    mov.b32 %f2, %r1;\n    add.f32 %f1, %f1, %f2;\n    st.global.f32 [%rd0], %f1;"
    )
    y = torch.zeros(1)
    load_ptx(module(body, {"y": "u64", "a": "f32", "b": "b32"})).launch(None, 1, 1, {"y": y, "a": 1.5, "b": 0.25})
    assert y[0] == 1.75


def test_initial_values_of_variables():
    """As nvcc writes them: floats by their bits, arrays by their bytes, trailing zeros left out."""
    variables = (
        ".global .align 4 .f32 single = 0f40500000;\n.const .align 8 .f64 double = 0dC004000000000000;\n"
        ".global .align 4 .b8 bytes[8] = {0, 0, 128, 63};\n.global .align 8 .u64 wide = 12;"
    )
    body = pointers("y") + (
        "\n    ld.global.f32 %f1, [single];\n    ld.const.f64 %fd1, [double];\n"
        "    ld.global.v2.f32 {%f2, %f3}, [bytes];\n"
        "    ld.global.u64 %rd1, [wide];\n    cvt.rn.f32.f64 %f4, %fd1;\n    cvt.rn.f32.u64 %f5, %rd1;\n"
        "    st.global.v4.f32 [%rd0], {%f1, %f2, %f3, %f4};\n    st.global.f32 [%rd0+16], %f5;"
    )
    y = torch.full((5,), -1.0)
    load_ptx(module(body, {"y": "u64"}, variables)).launch(None, 1, 1, {"y": y})
    assert y.tolist() == [3.25, 1.0, 0.0, -2.5, 12.0]


def test_structures_by_value():
    y = torch.zeros(2, dtype=torch.int32)
    body = (
        "    ld.param.u64 %rd0, [p+8];\n    ld.param.b32 %r1, [p];\n    ld.param.b32 %r2, [p+16];\n"
        "    ld.param.b64 %rd1, [p+24];\n    cvt.u32.u64 %r3, %rd1;\n    add.s32 %r2, %r2, %r3;\n"
        "    st.global.v2.b32 [%rd0], {%r1, %r2};"
    )
    fields = Struct([5, y, 7, ctypes.c_int64(100)])
    stats = load_ptx(module(body, {"p": (32, 8)})).launch(None, 1, 1, {"p": fields})
    assert y.tolist() == [5, 107]
    assert set(stats.buffers) == {"p.1"}


def test_a_tensor_map_by_pointer():
    from tests.emulator.conformance.asynchronous import _ADDRESSES, _INIT, _SHARED, wait

    x = torch.arange(32.0)
    body = "    ld.param.u64 %rd0, [map];\n    ld.param.u64 %rd1, [y];\n" + _ADDRESSES + _INIT
    body += (
        "    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 128;\n"
        "    @%p0 cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%r4], [%rd0, {0}], [%r5];\n"
    )
    body += wait("%r5", 0, "full") + (
        "    mad.lo.s32 %r1, %r0, 4, %r4;\n    ld.shared.b32 %r2, [%r1];\n"
        "    mul.wide.u32 %rd4, %r0, 4;\n    add.s64 %rd1, %rd1, %rd4;\n"
        "    st.global.b32 [%rd1], %r2;"
    )
    y = torch.zeros(32)
    load_ptx(module(body, {"map": "u64", "y": "u64"}, _SHARED, arch="sm_90")).launch(
        None, 1, 32, {"map": TensorMap(x, (32,)), "y": y}, shared_bytes=20480
    )
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("tensor", "box", "swizzle", "problem"),
    [
        (torch.zeros(8, 12, dtype=torch.bfloat16), (8, 8), 0, "strides"),
        (torch.zeros(8, 64, dtype=torch.bfloat16), (8, 4), 0, "not a multiple of 16"),
        (torch.zeros(8, 128, dtype=torch.bfloat16), (8, 128), 128, "exceeds the 128-byte swizzle"),
        (torch.zeros(512, 64, dtype=torch.bfloat16), (512, 64), 128, "outside 1..256"),
        (torch.zeros(8, 64, dtype=torch.bfloat16), (8,), 0, "for 2 dimensions"),
        (torch.zeros(64, 8, dtype=torch.bfloat16).T, (8, 64), 0, "inner stride"),
        (torch.zeros(8 * 64 + 1, dtype=torch.bfloat16)[1:].view(8, 64), (8, 64), 0, "not aligned"),
    ],
)
def test_tensor_maps_that_cannot_be_encoded(tensor, box, swizzle, problem):
    with pytest.raises(LaunchError, match=problem):
        load_ptx(module("", {"map": (128, 64)})).launch(None, 1, 32, {"map": TensorMap(tensor, box, swizzle)})


def test_strided_rows_have_bounds_of_their_own():
    storage = torch.arange(64, dtype=torch.int32).view(4, 16)
    body = pointers("x", "y") + "\n    ld.global.b32 %r1, [%rd0+{offset}];\n    st.global.b32 [%rd1], %r1;"

    def read(offset):
        y = torch.zeros(1, dtype=torch.int32)
        load_ptx(module(body.format(offset=offset), {"x": "u64", "y": "u64"})).launch(
            None, 1, 1, {"x": storage[:, :10], "y": y}
        )
        return y[0]

    assert read(36) == 9
    assert read(64) == 16
    for offset in (40, 60, 4 * (48 + 10)):
        with pytest.raises(BoundsError):
            read(offset)


def test_elements_with_gaps_have_bounds_of_their_own():
    """A vector that is a column of a matrix, and every other arrangement at equal distances."""
    storage = torch.arange(64, dtype=torch.int32).view(4, 16)
    body = pointers("x", "y") + "\n    ld.global.b32 %r1, [%rd0+{offset}];\n    st.global.b32 [%rd1], %r1;"

    def read(x, offset):
        y = torch.zeros(1, dtype=torch.int32)
        load_ptx(module(body.format(offset=offset), {"x": "u64", "y": "u64"})).launch(None, 1, 1, {"x": x, "y": y})
        return y[0]

    assert read(storage[:, 3], 64) == 16 + 3 and read(storage[0, ::4], 16) == 4 and read(storage[:, ::4], 80) == 20
    blocks = storage.view(4, 4, 4)[:, :, :2]  # two dimensions at one distance
    assert read(blocks, 4) == 1 and read(blocks, 64) == 16
    for x, offset in ((storage[:, 3], 4), (storage[0, ::4], 8), (storage[:, ::4], 12), (blocks, 8), (blocks, 76)):
        with pytest.raises(BoundsError):
            read(x, offset)
    four = body.replace("ld.global.b32 %r1", "ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}").format(offset=0)
    args = {"x": storage[0], "y": torch.zeros(1, dtype=torch.int32)}
    load_ptx(module(four, dict.fromkeys(args, "u64"))).launch(None, 1, 1, args)
    with pytest.raises(BoundsError, match="runs past the end of a row of 4 bytes"):
        load_ptx(module(four, dict.fromkeys(args, "u64"))).launch(None, 1, 1, args | {"x": storage[0, ::2]})
    with pytest.raises(LaunchError, match="gaps of two sizes"):
        read(storage[:, :12:4], 0)


def test_neighbouring_tensors_do_not_hide_an_overrun():
    storage = torch.zeros(64, dtype=torch.int32)
    body = pointers("x", "y") + "\n    ld.global.b32 %r1, [%rd0+128];\n    st.global.b32 [%rd1], %r1;"
    with pytest.raises(BoundsError, match="at x"):
        load_ptx(module(body, {"x": "u64", "y": "u64"})).launch(None, 1, 1, {"x": storage[:32], "y": storage[32:]})


def test_views_of_one_tensor_are_one_buffer():
    storage = ints(64)
    stats = load_ptx(COPY).launch(None, 1, 32, {"x": storage, "y": storage[32:]})
    assert torch.equal(storage, ints(32).repeat(2))
    assert set(stats.buffers) == {"x"}
    with pytest.raises(LaunchError, match="overlaps x in part"):
        load_ptx(COPY).launch(None, 1, 32, {"x": storage[:40], "y": storage[32:]})
    with pytest.raises(LaunchError, match="y lies in x"):
        load_ptx(COPY).launch(None, 1, 32, {"x": storage, "y": storage[32:]}, read_only=("y",))
    columns = torch.zeros(32, 2, dtype=torch.int32)
    interleaved = COPY.replace("mul.wide.u32 %rd4, %r0, 4;", "mul.wide.u32 %rd4, %r0, 8;")
    stats = load_ptx(interleaved).launch(None, 1, 32, {"x": columns[:, :1], "y": columns[:, 1:]})
    assert set(stats.buffers) == {"x", "y"}


def test_read_only_and_uninitialised_buffers():
    args = {"x": ints(32), "y": torch.zeros(32, dtype=torch.int32)}
    with pytest.raises(BoundsError, match=r"write to read-only y\[0\]"):
        load_ptx(COPY).launch(None, 1, 32, args, read_only=("y",))
    with pytest.raises(UninitialisedError, match=r"read of uninitialised x\[0\]"):
        load_ptx(COPY).launch(None, 1, 32, args, uninitialised=("x",))
    load_ptx(COPY).launch(None, 1, 32, args, uninitialised=("y",), read_only=("x",))
    with pytest.raises(LaunchError, match="the buffers are"):
        load_ptx(COPY).launch(None, 1, 32, args, read_only=("z",))


def test_elements_are_named_by_their_indices():
    body = pointers("x") + "\n    ld.global.b32 %r1, [%rd0+28];"
    with pytest.raises(UninitialisedError, match=r"x\[1, 3\]"):
        load_ptx(module(body, {"x": "u64"})).launch(None, 1, 1, {"x": torch.zeros(3, 4)}, uninitialised=("x",))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"entry": "other"}, "no entry 'other'"),
        ({"grid": 0}, "grid"),
        ({"block": 2048}, "more threads than 1024"),
        ({"cluster": (2, 1, 1)}, "not a multiple of clusters"),
        ({"shared_bytes": 300000}, "exceed the 232448 of shared memory"),
        ({"args": [ints(4)]}, "takes 2 parameters"),
        ({"args": [ints(4), "text"]}, "cannot pass str"),
        ({"args": [ints(4), 1 << 70]}, "does not fit"),
        ({"options": LaunchOptions(async_policy="never")}, "unknown async_policy"),
    ],
)
def test_impossible_launches(change, problem):
    arguments = {"entry": "snippet", "grid": 1, "block": 32, "args": [ints(32), ints(32)]} | change
    with pytest.raises(LaunchError, match=problem):
        load_ptx(COPY).launch(**arguments)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("frobnicate.b32 %r1, %r2;", "instruction frobnicate.b32 is not modelled at PTX line 16: frobnicate"),
        ("add.sat.u32 %r1, %r2, %r3;", "modifier .sat"),
        ("add.s32 %r1, %rd2, %r3;", "not of the size"),
        ("add.s32 %r1, %q2, %r3;", "unknown operand '%q2'"),
        ("bra $nowhere;", "unknown label"),
        ("ex2.approx.f16 %h1, %h2;", "ex2.f16 is not modelled at PTX line 16"),
        ("add.f32 %f1, %f2;", "add.f32 with 2 operands"),
        ("min.f32 %f1, %f2, %f3, %f4;", "min.f32 with 4 operands"),
        ("ld.global.v2.f32 {%f1}, [%rd0];", "ld.global.v2.f32 of 1 registers"),
        ("ld.global.b128 %rd1, [%rd0];", "ld.global.b128 of 1 registers"),
        (".reg .b128 %q;", "unknown type .b128"),
        ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%f1}, {%r1}, {%r2}, {%f2};", "not modelled"),
        ("setmaxnreg.inc.sync.aligned.u32 50;", "multiple of 8"),
        ("call.uni (%r1), malloc, (%r2);", "this call of malloc is not modelled at PTX line 16"),
        ("call (%r1), %rd2, (%r2), prototype;", "this call of %rd2 is not modelled"),
        (".surface thing;", "unknown directive"),
        ("ld.global.b32 %r1, %rd0;", "cannot read the address"),
    ],
)
def test_unknown_ptx_is_refused_before_anything_runs(line, problem):
    with pytest.raises(PtxError) as caught:
        load_ptx(module(f"    {line}", {"x": "u64"}))
    assert problem in str(caught.value)


def test_an_entry_compiled_for_one_block_size_is_launched_with_it():
    text = COPY.replace(")\n\n{", ")\n.reqntid 64\n{")
    assert text != COPY
    load_ptx(text).launch(None, 1, 64, [ints(64), ints(64)])
    with pytest.raises(LaunchError, match="compiled for a block of"):
        load_ptx(text).launch(None, 1, 32, [ints(64), ints(64)])
    with pytest.raises(LaunchError, match="more threads than"):
        load_ptx(text.replace(".reqntid", ".maxntid")).launch(None, 1, 128, [ints(128), ints(128)])


def test_malformed_text():
    for text, problem in (
        ("", "no entry"),
        (COPY.replace(("ret;\n}"), "ret;\n"), "unexpected end"),
        (COPY + "}", "unbalanced"),
        (".func helper(.reg .b32 %r) { ret; }\n" + COPY, "cannot read the function"),
    ):
        with pytest.raises(PtxError, match=problem):
            load_ptx(text)


def test_calls_that_cannot_be_copied_are_refused():
    recursive = ".func helper()\n{\n    call.uni helper;\n    ret;\n}\n"
    with pytest.raises(PtxError, match="a recursive call of helper is not modelled at PTX line 6.* at PTX line"):
        load_ptx(module("    call.uni helper;", {"x": "u64"}, recursive))
    predicated = "    setp.eq.u64 %p1, %rd0, 0;\n    @%p1 call.uni helper;"
    with pytest.raises(PtxError, match="this call of helper is not modelled"):
        load_ptx(module(predicated, {"x": "u64"}, ".func helper()\n{\n    ret;\n}\n"))


def test_failed_assertions_trap():
    declared = ".extern .func __assertfail(.param .b64 message, .param .b32 line);\n"
    body = pointers("x") + (
        "\n    ld.global.b32 %r1, [%rd0];\n    setp.ne.s32 %p1, %r1, 0;\n    @%p1 bra $ok;\n    {\n"
        "    .param .b64 param0;\n    .param .b32 param1;\n    call.uni __assertfail, (param0, param1);\n    }\n$ok:"
    )
    run = load_ptx(module(body, {"x": "u64"}, declared))
    run.launch(None, 1, 1, {"x": ints(2)[1:]})
    with pytest.raises(TrapError, match="PTX line .*__assertfail"):
        run.launch(None, 1, 1, {"x": ints(1)})


def test_what_a_kernel_prints():
    from tests.emulator.conformance import all_cases

    ptx = next(case for case in all_cases() if case.name == "vprintf").ptx
    printed = load_ptx(ptx).launch(None, 1, 2, [torch.zeros(2, dtype=torch.int32)]).printed
    assert printed == "  0|0|a word|0x123456789a|1.50|%\n  1|-1|a word|0x123456789a|1.50|%\n"
    with pytest.raises(TrapError, match=r"executed trap; it printed:   0\|0\|a word"):
        load_ptx(ptx.replace("    ret;\n}", "    trap;\n    ret;\n}")).launch(None, 1, 1, [ints(1)])


def test_source_lines_come_from_loc():
    body = pointers("x") + (
        "\n    .loc 1 42 7  // kernel.py:42:7 @[ caller.py:7:3 @[ top.py:9:1 ] ]\n    ld.global.b32 %r1, [%rd0];\n"
    )
    text = module(body, {"x": "u64"}) + '.file 1 "/somewhere/kernel.py"\n'
    with pytest.raises(UninitialisedError) as caught:
        load_ptx(text).launch(None, 1, 1, {"x": ints(1)}, uninitialised=("x",))
    assert "kernel.py:42 < caller.py:7 < top.py:9 (PTX line" in str(caught.value)
    assert caught.value.sites[-1].source.startswith("kernel.py:42")
    nvcc = text.replace("// kernel.py:42:7 @[ caller.py:7:3 @[ top.py:9:1 ] ]", "").replace(
        ".loc 1 42 7", ".loc 1 42 7, function_name $L__name, inlined_at 1 99 1"
    )
    with pytest.raises(UninitialisedError, match="kernel.py:42 < kernel.py:99"):
        load_ptx(nvcc).launch(None, 1, 1, {"x": ints(1)}, uninitialised=("x",))


def test_seeds_repeat_exactly():
    from tests.emulator.conformance import EmulatorRunner, all_cases

    case = next(case for case in all_cases() if case.name == "tickets")
    counts = set()
    for seed in (0, 5, 5):
        args = {name: tensor.clone() for name, tensor in case.args.items()}
        counts.add(
            (
                seed,
                load_ptx(case.ptx)
                .launch(None, 4, 64, args, options=LaunchOptions(seed=seed, shuffle_ctas=True))
                .switches,
            )
        )
    assert len({count for count in counts if count[0] == 5}) == 1
    assert EmulatorRunner(seed=5).run(case)["counter"][0] == 256


def test_two_launches_at_once():
    """Launches share nothing: threads of the host may run them side by side."""
    from concurrent.futures import ThreadPoolExecutor

    def run(n):
        y = torch.zeros(128, dtype=torch.int32)
        load_ptx(COPY).launch(None, 1, 128, {"x": ints(128) + n, "y": y})
        return torch.equal(y, ints(128) + n)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(32)))


def test_the_engine_is_built_once():
    assert library() is library()
    assert operations()["add.s32"] != operations()["add.u32"]
