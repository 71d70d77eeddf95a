"""Exchanges between lanes, barriers and control flow."""

import torch

from .case import Case, elementwise, module, pointers

_N = 128


def _x(seed=0):
    return torch.randint(-(2**31), 2**31 - 1, (_N,), generator=torch.Generator().manual_seed(seed)).int()


def _warps(x):
    return x.view(-1, 32)


def _shuffles():
    lane = torch.arange(32)
    for width in (32, 8):
        segment = 32 - width
        first, last = lane // width * width, lane // width * width + width - 1
        for mode, amount in (("up", 3), ("down", 5), ("bfly", 6), ("idx", 2)):
            clamp = (segment << 8) | (0 if mode == "up" else 31)
            source = {"up": lane - amount, "down": lane + amount, "bfly": lane ^ amount, "idx": first + amount % width}[
                mode
            ]
            inside = source >= first if mode == "up" else source <= last
            source = torch.where(inside, source, lane)
            x = _x()
            text = f"shfl.sync.{mode}.b32 {{d}}|%p1, {{a}}, {amount}, {clamp}, -1;\n    selp.b32 {{e}}, 1, 0, %p1;"
            yield elementwise(
                f"shfl.{mode} width {width}",
                text,
                [x],
                [_warps(x)[:, source].reshape(-1), inside.int().repeat(_N // 32)],
            )


def _votes():
    x = _x()
    x[32:64] = x[32:64].abs()
    negative = _warps(x) < 0
    predicate = "setp.lt.s32 %p1, {a}, 0;\n    "
    for mode, result in {
        "all": negative.all(1),
        "any": negative.any(1),
        "uni": negative.all(1) | ~negative.any(1),
    }.items():
        text = predicate + f"vote.sync.{mode}.pred %p2, %p1, -1;\n    selp.b32 {{d}}, 1, 0, %p2;"
        yield elementwise(f"vote.{mode}", text, [x], [result.int().repeat_interleave(32)])
    weights = torch.tensor([1 << i for i in range(32)])
    ballot = (negative * weights).sum(1)
    yield elementwise(
        "vote.ballot",
        predicate + "vote.sync.ballot.b32 {d}, %p1, -1;",
        [x],
        [ballot.to(torch.int64).repeat_interleave(32).to(torch.uint32).view(torch.int32)],
    )
    few = x % 4
    equal = (_warps(few)[:, :, None] == _warps(few)[:, None, :]) * weights
    yield elementwise(
        "match.any",
        "match.any.sync.b32 {d}, {a}, -1;",
        [few],
        [equal.sum(2).reshape(-1).to(torch.uint32).view(torch.int32)],
    )
    same = torch.arange(_N).div(32, rounding_mode="floor").int()
    text = "match.all.sync.b32 {d}|%p1, {a}, -1;\n    selp.b32 {e}, 1, 0, %p1;"
    yield elementwise(
        "match.all", text, [same], [torch.full((_N,), -1, dtype=torch.int32), torch.ones(_N, dtype=torch.int32)]
    )
    yield elementwise(
        "match.all differs", text, [few], [torch.zeros(_N, dtype=torch.int32), torch.zeros(_N, dtype=torch.int32)]
    )


def _reductions():
    x = _x()
    rows = _warps(x)
    unsigned = rows.long() & 0xFFFFFFFF
    models = {"add.s32": rows.long().sum(1), "min.s32": rows.min(1).values.long(), "max.s32": rows.max(1).values.long()}
    models |= {"min.u32": unsigned.min(1).values, "max.u32": unsigned.max(1).values}
    for name, start in (("and", -1), ("or", 0), ("xor", 0)):
        folded = torch.full((len(rows),), start, dtype=torch.int32)
        for column in rows.T:
            folded = {"and": folded & column, "or": folded | column, "xor": folded ^ column}[name]
        models[f"{name}.b32"] = folded.long()
    for name, result in models.items():
        wrapped = (result & 0xFFFFFFFF).to(torch.uint32).view(torch.int32).repeat_interleave(32)
        yield elementwise(f"redux.{name}", f"redux.sync.{name} {{d}}, {{a}}, -1;", [x], [wrapped])


def _lanes():
    lane = torch.arange(_N).int() % 32
    text = "elect.sync %r9|%p1, -1;\n    selp.b32 {d}, 1, 0, %p1;"
    leads = elementwise("elect.sync", text, [lane], [(lane == 0).int()], arch="sm_90")
    yield leads
    # Any subset has one leader, of which every lane of it learns the index.
    text = (
        "mov.u32 %r9, %laneid;\n    setp.lt.u32 %p3, %r9, 12;\n    selp.b32 %r8, 0xfff, 0xfffff000, %p3;\n"
        "    elect.sync {d}|%p1, %r8;\n    setp.eq.u32 %p2, {d}, %r9;\n    xor.pred %p2, %p1, %p2;\n"
        "    selp.b32 {e}, 1000, 0, %p2;\n    elect.sync _|%p1, %r8;\n    vote.sync.ballot.b32 %r10, %p1, %r8;\n"
        "    popc.b32 %r10, %r10;\n    add.s32 {e}, {e}, %r10;\n    setp.lt.u32 %p1, {d}, 12;\n"
        "    selp.b32 {d}, 1, 2, %p1;"
    )
    subset = torch.where(lane < 12, 1, 2).int()
    yield elementwise("elect.sync of some lanes", text, [lane], [subset, torch.ones_like(lane)], arch="sm_90")
    yield elementwise("activemask", "activemask.b32 {d};", [lane], [torch.full((_N,), -1, dtype=torch.int32)])
    masks = {
        "eq": 1 << lane.long(),
        "lt": (1 << lane.long()) - 1,
        "le": (2 << lane.long()) - 1,
        "ge": (1 << 32) - (1 << lane.long()),
        "gt": (1 << 32) - (2 << lane.long()),
    }
    for name, mask in masks.items():
        yield elementwise(
            f"%lanemask_{name}", f"mov.u32 {{d}}, %lanemask_{name};", [lane], [mask.to(torch.uint32).view(torch.int32)]
        )
    text = (
        "mov.u32 {d}, %ntid.x;\n    mov.u32 %r9, %laneid;\n    mad.lo.s32 {d}, %r9, 1000, {d};\n"
        "    mov.u32 %r9, %nctaid.x;\n    add.s32 {d}, {d}, %r9;"
    )
    yield elementwise("special registers", text, [lane], [lane * 1000 + _N + 1])


def _grid():
    """Three-dimensional grids and blocks."""
    body = pointers("y")
    index, scale = [], 1
    for register, extent in (
        ("%tid.x", 4),
        ("%tid.y", 2),
        ("%tid.z", 4),
        ("%ctaid.x", 3),
        ("%ctaid.y", 2),
        ("%ctaid.z", 2),
    ):
        index.append(f"    mov.u32 %r1, {register};\n    mad.lo.s32 %r0, %r1, {scale}, %r0;")
        scale *= extent
    body += "\n    mov.u32 %r0, 0;\n" + "\n".join(index)
    body += "\n    mul.wide.u32 %rd1, %r0, 4;\n    add.s64 %rd0, %rd0, %rd1;\n    st.global.b32 [%rd0], %r0;"
    y = torch.full((scale,), -1, dtype=torch.int32)
    yield Case(
        "3-D grid and block",
        module(body, {"y": "u64"}),
        {"y": y},
        {"y": torch.arange(scale).int()},
        grid=(3, 2, 2),
        block=(4, 2, 4),
    )


def _halves():
    """The two halves of a warp meet at one instruction, each with a member mask of its own."""
    x = _x()
    half = x.view(-1, 16)
    text = (
        "mov.u32 %r9, %laneid;\n    setp.lt.u32 %p3, %r9, 16;\n    selp.b32 %r8, 0xffff, 0xffff0000, %p3;\n"
        "    setp.lt.s32 %p1, {a}, 0;\n    "
    )
    negative = half < 0
    lanes = torch.tensor([1 << i for i in range(32)]).view(2, 16).repeat(_N // 32, 1)
    ballot = (negative * lanes).sum(1, keepdim=True).expand(half.shape)
    few = x % 4
    rows = few.view(-1, 16)
    equal = ((rows[:, :, None] == rows[:, None, :]) * lanes[:, None, :]).sum(2)
    results = {
        "shfl.sync.bfly.b32 {d}, {a}, 3, 31, %r8;": (x, half[:, torch.arange(16) ^ 3]),
        "vote.sync.ballot.b32 {d}, %p1, %r8;": (x, ballot),
        "match.any.sync.b32 {d}, {a}, %r8;": (few, equal),
        "redux.sync.add.s32 {d}, {a}, %r8;": (x, half.long().sum(1, keepdim=True).expand(half.shape)),
    }
    for instruction, (source, result) in results.items():
        wrapped = (result.reshape(-1).long() & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
        yield elementwise(f"{instruction.split()[0]} of halves", text + instruction, [source], [wrapped])


def _divergence():
    """A loop that every lane leaves at another time, with a shuffle after it; and a branch inside it."""
    text = """mov.u32 %r9, %laneid;
    mov.u32 {d}, 0;
    mov.u32 %r10, 0;
$loop:
    setp.ge.u32 %p1, %r10, %r9;
    @%p1 bra $done;
    and.b32 %r11, %r10, 1;
    setp.eq.u32 %p2, %r11, 0;
    @%p2 bra $even;
    add.s32 {d}, {d}, 100;
    bra.uni $next;
$even:
    add.s32 {d}, {d}, {a};
$next:
    add.s32 %r10, %r10, 1;
    bra.uni $loop;
$done:
    shfl.sync.bfly.b32 {e}, {d}, 1, 31, -1;"""
    lane = torch.arange(_N) % 32
    x = _x() % 1000
    d = (lane // 2 * 100 + (lane + 1) // 2 * x).int()
    yield elementwise("divergent loop", text, [x], [d, _warps(d)[:, torch.arange(32) ^ 1].reshape(-1)])
    text = (
        "mov.u32 %r9, %laneid;\n    setp.lt.u32 %p1, %r9, 7;\n    mov.u32 {d}, 1;\n"
        "    @%p1 bra $skip;\n    activemask.b32 {d};\n    bar.warp.sync 0xffffff80;\n$skip:\n"
        "    bar.warp.sync -1;"
    )
    expected = torch.where(lane < 7, torch.ones(_N, dtype=torch.long), torch.full((_N,), -128, dtype=torch.long))
    yield elementwise("bar.warp.sync of some lanes", text, [x], [expected.int()])


def _barriers():
    shared = ".shared .align 4 .b8 buffer[1024];"
    head = pointers("x", "y") + (
        "\n    mov.u32 %r0, %tid.x;\n    mul.wide.u32 %rd4, %r0, 4;\n    add.s64 %rd0, %rd0, %rd4;\n"
        "    add.s64 %rd1, %rd1, %rd4;\n"
    )
    head += (
        "    ld.global.b32 %r1, [%rd0];\n    mov.u32 %r2, buffer;\n    shl.b32 %r3, %r0, 2;\n"
        "    add.s32 %r4, %r2, %r3;\n    st.shared.b32 [%r4], %r1;\n"
    )
    tail = (
        "    xor.b32 %r3, %r3, 128;\n    add.s32 %r4, %r2, %r3;\n    ld.shared.b32 %r5, [%r4];\n"
        "    st.global.b32 [%rd1], %r5;"
    )
    x = _x()
    swapped = _warps(x)[[1, 0, 3, 2]].reshape(-1)
    pairs = "    shr.u32 %r6, %r0, 6;\n    add.s32 %r6, %r6, 1;\n"
    variants = {
        "bar.sync 0": "    bar.sync 0;\n",
        "bar.sync with a count": f"    bar.sync 3, {_N};\n",
        "barrier.sync": "    barrier.sync 0;\n",
        "named barriers of two warps": pairs + "    bar.sync %r6, 64;\n",
    }
    for name, text in variants.items():
        yield Case(
            name,
            module(head + text + tail, {"x": "u64", "y": "u64"}, shared),
            {"x": x, "y": torch.zeros_like(x)},
            {"y": swapped},
            block=_N,
        )
    # Warps 0 and 1 hand over without waiting; 2 and 3 wait and read what they wrote.
    producer = (
        "    setp.lt.u32 %p1, %r0, 64;\n    @%p1 bar.arrive 2, 128;\n    @%p1 bra $out;\n"
        "    bar.sync 2, 128;\n    sub.s32 %r4, %r4, 256;\n    ld.shared.b32 %r5, [%r4];\n"
        "    st.global.b32 [%rd1], %r5;\n$out:"
    )
    expected = torch.cat([torch.zeros(64, dtype=torch.int32), x[:64]])
    yield Case(
        "bar.arrive",
        module(head + producer, {"x": "u64", "y": "u64"}, shared),
        {"x": x, "y": torch.zeros_like(x)},
        {"y": expected},
        block=_N,
    )
    count = int((x < 0).sum())
    reduced = {"popc.u32 %r9": count, "and.pred %p2": 0, "or.pred %p2": 1}
    for operation, value in reduced.items():
        name, destination = operation.split()
        text = (f"setp.lt.s32 %p1, {{a}}, 0;\n    bar.red.{name} {destination}, 1, %p1;\n    ") + (
            "mov.u32 {d}, %r9;" if "popc" in name else "selp.b32 {d}, 1, 0, %p2;"
        )
        yield elementwise(f"bar.red.{name}", text, [x], [torch.full((_N,), value, dtype=torch.int32)])
    yield elementwise("nanosleep", "nanosleep.u32 100;\n    mov.b32 {d}, {a};", [x], [x])
    yield elementwise(
        "clock", ("mov.u32 %r9, %clock;\n    mov.u64 %rd20, %globaltimer;\n    mov.b32 {d}, {a};"), [x], [x]
    )


def cases():
    yield from _shuffles()
    yield from _votes()
    yield from _reductions()
    yield from _lanes()
    yield from _grid()
    yield from _halves()
    yield from _divergence()
    yield from _barriers()
