"""The one-launch protocol of the CUDA kernels: the same bits under every schedule, a workspace that cleans itself, and
seeded bugs, each of which the emulator or a comparison finds."""

from dataclasses import replace

import pytest
import torch

from fastlora.backends import workspace
from fastlora.backends.cuda import launch as cuda
from tests.emulator import EmulatorError
from tests.support import launches, numerics
from tests.support.cuda_bugs import SEEDED_BUGS, check_seeded
from tests.support.cuda_checks import (
    ALL,
    FLOAT16_LAYERS,
    LARGE,
    LAYERS,
    SMALL,
    TRANSPOSED_LAYERS,
    check_float16_schedules,
    check_schedules,
    is_clean,
    needs_kernels,
)
from tests.support.cuda_emulation import SCHEDULES, emulated

pytestmark = [needs_kernels, pytest.mark.usefixtures("own_workspace")]


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@pytest.mark.parametrize("tile, sizes", LAYERS)
def test_every_schedule_gives_the_same_bits(poisoned, tile, sizes, dropout_p):
    check_schedules(tile, sizes, dropout_p)


@pytest.mark.parametrize("tile, sizes, dropout_p", TRANSPOSED_LAYERS)
def test_every_schedule_over_a_transposed_weight_gives_the_same_bits(poisoned, tile, sizes, dropout_p):
    check_schedules(tile, sizes, dropout_p, schedules=SCHEDULES[3:], transposed=True)


@pytest.mark.parametrize("tile, rank", FLOAT16_LAYERS)
def test_every_schedule_of_fp16_gives_the_same_bits(poisoned, tile, rank):
    check_float16_schedules(tile, rank)


def test_workspaces_of_two_streams_do_not_meet(poisoned, monkeypatch):
    """Launches of two streams in turn, each over its own workspace, which the next launch of the stream finds clean."""
    case = numerics.draw_integer_case(392, 136, 264, 16, torch.bfloat16)
    buffers = [torch.zeros(256, dtype=torch.int32) for _ in range(2)]
    used = []

    def borrow(n_words, device):
        assert n_words <= buffers[0].numel()
        used.append(buffers[len(used) % 2])
        return used[-1]

    monkeypatch.setattr(cuda, "borrow_workspace", borrow)
    c = case
    for options in SCHEDULES[1:3]:
        with emulated(options):
            forward = [
                launches.forward(
                    cuda, c.x, c.weight, c.lora_a, c.lora_b, c.bias, c.scaling, 0.0, None, tile=LARGE, ctas=4
                )
                for _ in range(2)
            ]
            backward = [
                launches.backward(
                    cuda, c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, c.scaling, 0.0, None, ALL, tile=LARGE, ctas=4
                )
                for _, s in forward
            ]
        for (y, _), gradients in zip(forward, backward, strict=True):
            numerics.assert_exact({"y": y, **gradients._asdict()}, case)
    assert len({buffer.data_ptr() for buffer in used}) == 2 and not any(buffer.any() for buffer in used)


def test_a_workspace_longer_than_one_pass_of_its_clearing(poisoned):
    """Of 384 threads, a word each."""
    case = numerics.draw_integer_case(64 * 800 + 13, 24, 64, 8, torch.bfloat16)
    tile = replace(SMALL, splits=1)
    c = case
    for options in SCHEDULES[1:3]:
        with emulated(options):
            y, _ = launches.forward(
                cuda, c.x, c.weight, c.lora_a, c.lora_b, c.bias, c.scaling, 0.0, None, tile=tile, ctas=6
            )
        assert is_clean(), "the workspace was left dirty"
        assert max(buffer.numel() for buffer in workspace._by_stream.values()) > 4 * 384
        numerics.assert_exact({"y": y}, case)


@pytest.mark.parametrize("name", SEEDED_BUGS)
def test_seeded_bugs_are_found(poisoned, name):
    with pytest.raises((EmulatorError, AssertionError)):
        check_seeded(name)
