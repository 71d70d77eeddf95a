"""The seam for backends that serve several projections of one input by one launch."""

from types import SimpleNamespace

import torch
from torch.nn.functional import linear

import fastlora
from fastlora import lora_linears, one_launch, projections, routes, selection
from fastlora.backends import reference
from fastlora.problem import PassingReason
from tests.support.lora_linears import SCALINGS, SIZES, WHOLE, K, draw, gradients, one_by_one
from tests.support.numerics import assert_reordered


class OneLaunch(SimpleNamespace):
    """A stand-in for a backend that has one launch for several projections."""

    def why_unsupported(self, spec):
        self.asked.append(spec)
        return self.refusal if spec.branch == "shared_input" else "not asked for"

    def prepare(self, spec):
        self.specs.append(spec)

        def forward(operands):
            x, of_each = operands
            made = [(linear(x, p[0], p[3]), None) if p[1] is None else reference.lora_forward(x, *p) for p in of_each]
            return [y for y, _ in made], [s for _, s in made]

        def backward(operands):
            dx, others = None, []
            dys, x, *of_each = operands
            for dy, (weight, a, b, _, *numbers), s, needs in zip(dys, *of_each, strict=True):
                found = projections.NO_GRADIENTS
                if dy is not None and a is None:
                    found = fastlora.problem.Gradients(dy @ weight, None, None, dy.sum(0) if needs.dbias else None)
                elif dy is not None:
                    found = reference.lora_backward(dy, x, weight, a, b, s, *numbers, needs)
                dx = found.dx if dx is None else dx if found.dx is None else dx + found.dx
                others.append(found)
            return dx, others

        return forward if spec.direction == "forward" else backward


def test_a_backend_with_one_launch_is_asked_and_serves(monkeypatch):
    """The seam: a LaunchSpec of branch "shared_input", one launch each way, refusals counted, routes remembered."""
    backend = OneLaunch(specs=[], asked=[], refusal=None)
    monkeypatch.setattr(one_launch, "TOGETHER", ("triton",))
    monkeypatch.setattr(selection, "why_unsupported", lambda name, spec: backend.why_unsupported(spec))
    monkeypatch.setattr(selection, "serving_module", lambda name, spec: backend)
    routes.forget_routes()
    arguments = draw(lead=(6,))
    try:
        for _ in range(2):
            fastlora.reset_dispatch_counts()
            ys = lora_linears(*arguments, dropout_p=(0.5, 0.0, 0.0, 0.0), backend="triton")
            got = gradients([ys[0], ys[1], ys[3]], arguments, allow_unused=True)
            counts = fastlora.dispatch_counts()
            assert counts["triton"] == 2 and counts["reference"] == 0 and not counts["fallbacks"]
        forward, backward = backend.specs
        assert (forward.direction, forward.branch, forward.sizes) == ("forward", "shared_input", (6, 23, K, 21))
        assert [each.sizes[1::2] for each in forward.members] == [(n, r or 0) for n, r in SIZES]
        assert [each.branch for each in forward.members] == ["single", "none", "single", "single"]
        assert [each.dropout for each in forward.members] == [True, False, False, False]
        assert [each.bias for each in forward.members] == [True, True, False, False]
        assert (backward.direction, backward.sizes) == ("backward", (6, 17, K, 4)) and len(backward.members) == 3
        assert [tuple(each.needs) for each in backward.members] == [(True,) * 4, (True, False, False, True),
                                                                    (True, True, True, False)]  # fmt: skip
        torch.manual_seed(5)
        ys = lora_linears(*arguments, backend="triton")
        expected = one_by_one(*arguments)
        assert all(map(torch.equal, ys, expected))
        got, wanted = (gradients([r[0], r[1], r[3]], arguments, allow_unused=True) for r in (ys, expected))
        assert [g is None for g in got] == [w is None for w in wanted]
        assert_reordered(*([g for g in each if g is not None] for each in (got, wanted)), 64)
        routes.forget_routes()
        backend.refusal = "triton: too wide"
        fastlora.reset_dispatch_counts()
        of_each = zip(*arguments[1:4], arguments[5], SCALINGS, WHOLE, strict=True)
        operands = projections.SharedForward(arguments[0], tuple(projections.Projection(*p) for p in of_each))
        asked = len(backend.asked)
        for calls in (1, 2):  # described, and known again
            assert one_launch.together_forward(operands, "triton") is None
            assert fastlora.dispatch_counts()["fallbacks"] == {"triton: too wide": calls}
        assert len(backend.asked) == asked + 1
        backend.refusal = PassingReason("triton: not now")
        routes.forget_routes()
        for _ in range(2):
            assert one_launch.together_forward(operands, "triton") is None
        assert len(backend.asked) == asked + 3, "a reason that may pass is not remembered"
    finally:
        routes.forget_routes()


def test_which_calls_ask_for_one_launch():
    on_gpu = SimpleNamespace(is_cpu=False, device=torch.device("cuda"))
    asked = {name: one_launch.may_launch_together(on_gpu, name) for name in (None, "cuda", "triton", "composed")}
    assert asked == {None: True, "cuda": True, "triton": True, "composed": False}
    assert not one_launch.may_launch_together(torch.zeros(1), None)
    assert one_launch.may_launch_together(torch.zeros(1), "triton")
