"""Calls of device functions, as nvcc writes them, and which space a generic address is in."""

import torch

from .case import Case, module, pointers

# Squares its first parameter and adds the second one; one way out is in the middle.
_HELPER = """
.func (.param .b32 result) helper(.param .b32 helper_a, .param .b32 helper_b)
{
    .reg .pred %p<2>;
    .reg .b32 %r<4>;
    ld.param.b32 %r1, [helper_a];
    ld.param.b32 %r2, [helper_b];
    mul.lo.s32 %r3, %r1, %r1;
    setp.gt.s32 %p1, %r2, 40;
    @%p1 bra $far;
    add.s32 %r3, %r3, %r2;
    st.param.b32 [result], %r3;
    ret;
$far:
    st.param.b32 [result], %r3;
    ret;
}
.func (.param .align 8 .b8 result[16]) pair(.param .b64 pair_a)
{
    .reg .b32 %r<4>;
    .reg .b64 %rd<4>;
    ld.param.b64 %rd1, [pair_a];
    cvt.u32.u64 %r1, %rd1;
    {
    .param .b32 param0;
    st.param.b32 [param0], %r1;
    .param .b32 param1;
    st.param.b32 [param1], %r1;
    .param .b32 retval0;
    call.uni (retval0), helper, (param0, param1);
    ld.param.b32 %r2, [retval0];
    }
    cvt.u64.u32 %rd2, %r2;
    st.param.b64 [result], %rd1;
    st.param.b64 [result+8], %rd2;
    ret;
}
"""

_CALL = """
    mov.u32 %r0, %tid.x;
    cvt.u64.u32 %rd2, %r0;
    {
    .param .b64 param0;
    st.param.b64 [param0], %rd2;
    .param .align 8 .b8 retval0[16];
    call.uni (retval0), pair, (param0);
    ld.param.b64 %rd3, [retval0];
    ld.param.b64 %rd4, [retval0+8];
    }
    add.s64 %rd3, %rd3, %rd4;
    mul.wide.u32 %rd5, %r0, 8;
    add.s64 %rd0, %rd0, %rd5;
    st.global.b64 [%rd0], %rd3;"""


def _calls():
    lane = torch.arange(64)
    expected = lane + lane * lane + torch.where(lane > 40, 0, lane)
    ptx = module(pointers("y") + _CALL, {"y": "u64"}, _HELPER)
    yield Case("calls", ptx, {"y": torch.zeros(64, dtype=torch.int64)}, {"y": expected}, block=64)


_PRINT = """
    .local .align 8 .b8 values[40];
    mov.u32 %r0, %tid.x;
    mov.u64 %rd1, values;
    cvta.local.u64 %rd2, %rd1;
    neg.s32 %r1, %r0;
    st.local.v2.u32 [%rd1], {%r0, %r1};
    mov.u64 %rd3, word;
    cvta.global.u64 %rd3, %rd3;
    st.local.u64 [%rd1+8], %rd3;
    mov.u64 %rd4, 0x123456789a;
    st.local.u64 [%rd1+16], %rd4;
    mov.f64 %fd1, 0d3ff8000000000000;
    st.local.f64 [%rd1+24], %fd1;
    mov.u64 %rd5, format;
    cvta.global.u64 %rd5, %rd5;
    {
    .param .b64 param0;
    st.param.b64 [param0], %rd5;
    .param .b64 param1;
    st.param.b64 [param1], %rd2;
    .param .b32 retval0;
    call.uni (retval0), vprintf, (param0, param1);
    ld.param.b32 %r2, [retval0];
    }
    mul.wide.u32 %rd6, %r0, 4;
    add.s64 %rd0, %rd0, %rd6;
    st.global.b32 [%rd0], %r2;"""


def _variable(name, text):
    data = text.encode() + b"\0"
    return f".global .align 1 .b8 {name}[{len(data)}] = {{{', '.join(map(str, data))}}};\n"


def _prints():
    declared = ".extern .func (.param .b32 func_retval0) vprintf(.param .b64 vprintf_0, .param .b64 vprintf_1);\n"
    declared += _variable("format", "%3u|%d|%s|%#llx|%.2f|%%\n") + _variable("word", "a word")
    ptx = module(pointers("y") + _PRINT, {"y": "u64"}, declared)
    counts = torch.full((2,), 5, dtype=torch.int32)
    yield Case("vprintf", ptx, {"y": torch.zeros_like(counts)}, {"y": counts}, block=2)


def _spaces():
    """Lane by lane a global, a shared and a local address."""
    body = (
        pointers("y")
        + """
    .local .align 4 .b8 own[4];
    mov.u32 %r0, %tid.x;
    mov.u64 %rd1, word;
    cvta.shared.u64 %rd2, %rd1;
    mov.u64 %rd3, own;
    cvta.local.u64 %rd4, %rd3;
    setp.eq.u32 %p1, %r0, 1;
    setp.eq.u32 %p2, %r0, 2;
    selp.b64 %rd5, %rd2, %rd0, %p1;
    selp.b64 %rd5, %rd4, %rd5, %p2;
    isspacep.global %p3, %rd5;
    isspacep.shared %p4, %rd5;
    isspacep.local %p5, %rd5;
    selp.b32 %r1, 1, 0, %p3;
    selp.b32 %r2, 2, 0, %p4;
    selp.b32 %r3, 4, 0, %p5;
    or.b32 %r1, %r1, %r2;
    or.b32 %r1, %r1, %r3;
    mul.wide.u32 %rd6, %r0, 4;
    add.s64 %rd0, %rd0, %rd6;
    st.global.b32 [%rd0], %r1;"""
    )
    ptx = module(body, {"y": "u64"}, ".shared .align 4 .b8 word[4];")
    expected = torch.tensor([1, 2, 4, 1], dtype=torch.int32)
    yield Case("isspacep", ptx, {"y": torch.zeros(4, dtype=torch.int32)}, {"y": expected}, block=4)


def cases():
    yield from _calls()
    yield from _prints()
    yield from _spaces()
