"""Layers on rows in segments run by the Triton kernels, in the interpreter or by their own PTX in the emulator, and
checked."""

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastlora.backends import workspace
from fastlora.backends.configs import TileConfig
from fastlora.backends.target import Target
from fastlora.backends.triton import segment_launch
from fastlora.problem import Needs
from fastlora.segments import GroupedBackward, GroupedForward, Segments, describe_segments
from tests.emulator import LaunchOptions
from tests.support import segments
from tests.support.triton_emulation import emulated

ALL = Needs(True, True, True, True)


def launch(
    case: segments.Case, config: TileConfig | None, needs: Needs | None = ALL, kernels: Any = segment_launch
) -> dict[str, Tensor]:
    """Y and the gradients that ``needs`` names; None: there is no backward."""
    c, seed = case, None
    if case.dropout_p:
        torch.manual_seed(case.seed)
        seed = torch.randint(0, 2**63 - 1, ())
    number, scalings = (1.0, c.scaling) if isinstance(c.scaling, Tensor) else (c.scaling, None)
    where, drop = Segments(c.ends, c.experts, c.adapters), (c.transposed, c.dropout_p, seed)
    forward = GroupedForward(c.x, c.weight, c.lora_a, c.lora_b, c.bias, number, scalings, where, *drop)
    operands, spec = describe_segments(forward)
    y, s = kernels.prepare(spec, config)(operands)
    if needs is None:
        return {"y": y}
    needs = needs._replace(dbias=needs.dbias and c.bias is not None)
    bias_dims = 0 if c.bias is None else c.bias.dim()
    given = (c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, bias_dims, number, scalings, where, *drop)
    operands, spec = describe_segments(GroupedBackward(*given), needs)
    gradients = kernels.prepare(spec, config)(operands)
    assert {name for name, need in needs._asdict().items() if need} == {
        name for name, gradient in gradients._asdict().items() if gradient is not None
    }
    return {"y": y, **{name: g for name, g in gradients._asdict().items() if g is not None}}


def run(
    case: segments.Case,
    config: TileConfig,
    arch: int,
    options: LaunchOptions,
    needs: Needs | None = ALL,
    kernels: Any = segment_launch,
    edit_ptx=None,
    on_kernel=None,
) -> tuple[dict[str, Tensor], list]:
    """The same in the emulator, on a device with few multiprocessors; and the counters of the launches."""
    if kernels is not segment_launch:  # what a mutant compiles to need not be covered
        edit_ptx = edit_ptx or str
    device = mock.patch.object(kernels, "target_of", lambda device: Target(arch, n_sms=3))
    with device, emulated(arch, options, edit_ptx, on_kernel) as stats:
        results = launch(case, config, needs, kernels)
    assert len(stats) == (1 if needs is None else 2), "one launch each way"
    assert not any(buffer.any() for buffer in workspace._by_stream.values()), "the workspace was left dirty"
    return results, stats
