"""Values of the Triton kernels for rows in segments: layouts of segments, dtypes, and what a call may leave out."""

import pytest
import torch

import fastlora
from fastlora.backends import workspace
from fastlora.backends.configs import TileConfig
from fastlora.backends.triton import segment_launch
from fastlora.problem import Needs
from tests.support import segment_checks
from tests.support.segment_checks import LAYOUTS, draw, launch
from tests.support.segments import Case, assert_accurate, assert_exact, changed, compute, draw_case

SMALL = TileConfig(64, 64, 64, 2, 4, 2, gradient_m=64, gradient_n=64, slice_n=32)
# The rest only differs in what is not queued: these have every pair of gradients, and each alone or with another.
SUBSETS = [
    Needs(True, False, False, False),
    Needs(False, True, False, True),
    Needs(False, False, True, False),
    Needs(False, False, False, True),
    Needs(True, True, False, False),
    Needs(False, True, True, False),
]

pytestmark = pytest.mark.usefixtures("poisoned")


def run(case: Case, device, needs: Needs = segment_checks.ALL, config: TileConfig | None = SMALL):
    """On the tests' device; results on the CPU."""
    moved = {name: value.to(device) for name, value in vars(case).items() if torch.is_tensor(value)}
    results = launch(changed(case, **moved), config, needs)
    assert all(not buffer.any() for buffer in workspace._by_stream.values()), "the workspace was left dirty"
    return {name: result.cpu() for name, result in results.items()}


def check(results, case: Case) -> None:
    """In float32 a sum over rows is made in order, the CPU's eager product in blocks, with a smaller error."""
    assert_accurate(results, case, against_eager=case.x.dtype != torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    n, k = (24, 40) if layout == "hundreds" else (72, 104)  # of hundreds, the segments are what takes the time
    case = draw(layout, n, k, 5, torch.float32, bias="each", scaling="each")
    check(run(case, device), case)


@pytest.mark.parametrize(
    "options, r, dtype",
    [
        ({"bias": "one", "transposed": True}, 3, torch.bfloat16),
        ({"dropout_p": 0.3, "scaling": "each"}, 5, torch.float16),
        ({"dropout_p": 0.3, "transposed": True, "bias": "each"}, 72, torch.float32),
    ],
    ids=["transposed", "dropout", "separate, transposed, dropout"],
)
def test_ways(options, r, dtype, device):
    case = draw("ragged", 33, 47, r, dtype, **options)
    check(run(case, device), case)


@pytest.mark.parametrize("needs", SUBSETS, ids=str)
def test_only_the_gradients_asked_for(needs, device):
    case = draw("few", 24, 32, 4, torch.float16, bias="each", integers=True)
    results = run(case, device, needs)
    assert_exact(results, case)


def test_float32_adapters_over_a_16_bit_layer_and_the_other_way_round(device):
    case = draw("few", 40, 48, 5, torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.3)
    results = run(case, device)
    assert results["da"].dtype == results["db"].dtype == torch.float32
    check(results, case)
    weight = case.weight.float()  # as autocast leaves it
    assert all(torch.equal(again, results[name]) for name, again in run(changed(case, weight=weight), device).items())


def test_more_segments_than_are_looked_at_together(device):
    """More than twice as many, and rows on both sides of where the second lot begins."""
    lengths = [0] * 530
    lengths[3], lengths[255], lengths[256], lengths[520] = 9, 17, 1, 20
    adapters = [g % 3 - 1 for g in range(530)]
    case = draw_case(lengths, 24, 32, 4, n_weights=1, n_adapters=3, adapters=adapters, rows_after=5, bias="one")
    check(run(case, device), case)


def test_a_stack_that_is_a_transposed_view_and_wide_rows_are_read_in_place(device):
    case = draw("few", 40, 48, 5, torch.float32)
    wanted = run(case, device)
    wide = {name: torch.nn.functional.pad(getattr(case, name), (8, 8), value=torch.nan) for name in ("x", "dy")}
    view = case.weight.transpose(1, 2).contiguous().transpose(1, 2)
    given = changed(case, weight=view, **{name: matrix[:, 8:-8] for name, matrix in wide.items()})
    results = run(given, device)
    for name, value in wanted.items():
        torch.testing.assert_close(results[name], value)


@pytest.mark.parametrize("scaling", [0.3, 1.0, 3.7, -100.7, 2.0**20])
def test_float16_scalings_are_split_on_the_device_as_on_the_host(scaling, device):
    case = draw("few", 24, 32, 4, torch.float16)
    case = changed(case, x=case.x / 16, lora_b=(case.lora_b / abs(scaling)).half() * 8, scaling=scaling)
    each = changed(case, scaling=torch.full((len(case.lora_a),), scaling))
    results = run(each, device)
    assert all(torch.equal(results[name], value) for name, value in run(case, device).items())


@pytest.mark.parametrize(
    "scaling, x, b, y",
    (
        (1.5, (1364, 4), (1, 0.5), 2048),  # 2 · 1024.5, a tie, which a factor above 2 would round up
        (1 + 2**-23, (1.25 * 2**-12, 0), (1024, 0), 2**-13),  # 2 · (0.625 · 2⁻²⁴), where 1.25 would be rounded down
        (1.0, (1.25 * 2**-12, 0), (1024, 0), 2**-14),
        (2.0**127, (1, 0), (0, 0), 0),  # the largest: in S it would be infinite
    ),
)
def test_what_multiplies_a_float16_branch_is_the_next_power_of_two(device, scaling, x, b, y):
    case = draw_case([32], 16, 16, 2, torch.float16, experts=[0], adapters=[0])
    zeros = {name: torch.zeros_like(getattr(case, name)) for name in ("x", "weight", "lora_a", "lora_b")}
    zeros["x"][0, :2], zeros["lora_b"][0, :] = torch.tensor(x), torch.tensor(b)
    zeros["lora_a"][0, :, :2] = torch.eye(2) * (2**-12 if max(x) < 1 else 1)
    case = changed(case, **zeros, scaling=torch.tensor([scaling]))
    assert (run(case, device)["y"][0] == y).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy, in the interpreter, about NaN
def test_nothing_of_a_skipped_adapter_gets_into_its_rows(device):
    case = draw("ragged", 24, 32, 4, torch.float32)
    broken = changed(case, lora_a=case.lora_a.clone(), lora_b=case.lora_b.clone())
    broken.lora_a[0], broken.lora_b[0] = torch.nan, torch.inf
    results, wanted = run(broken, device), run(case, device)
    adapters = torch.full((len(case.x),), -1)
    start = 0
    for end, adapter in zip(case.ends.tolist(), case.adapters.tolist(), strict=True):
        adapters[start:end], start = adapter, end
    for name in ("y", "dx"):
        assert results[name][adapters == 0].isnan().all()
        assert torch.equal(results[name][adapters != 0], wanted[name][adapters != 0])
    assert all(torch.equal(results[name][1:], wanted[name][1:]) for name in ("da", "db"))


def test_weights_and_adapters_that_do_not_exist_give_nan(device):
    """On the host nobody reads them; nothing outside of the stacks is touched."""
    case = draw_case([5, 17, 4], 24, 32, 4, experts=[0, 3, 2], adapters=[0, 1, 2], bias="each")
    for wrong in ({"experts": torch.tensor([0, -1, 2])}, {"experts": torch.tensor([0, 3, 2])}):
        results = run(changed(case, **wrong), device)
        assert results["y"][5:22].isnan().all() and results["dx"][5:22].isnan().all()
        assert results["y"][:5].isfinite().all() and results["y"][22:].isfinite().all()
    case = changed(case, experts=torch.tensor([0, 1, 2]))
    for wrong in (-2, 3, 2**32 + 1):
        results = run(changed(case, adapters=torch.tensor([0, wrong, 2])), device)
        assert results["y"][5:22].isnan().all() and results["dx"][22:].isfinite().all()


def test_the_op_is_served_and_counted(device, monkeypatch):
    monkeypatch.setattr(segment_launch, "_choose", lambda spec, target: SMALL)
    case = draw("few", 24, 32, 4, torch.float32, bias="each", dropout_p=0.4)
    moved = {name: value.to(device) for name, value in vars(case).items() if torch.is_tensor(value)}
    fastlora.reset_dispatch_counts()
    results = compute(changed(case, **moved), backend="triton")
    assert fastlora.dispatch_counts()["triton"] == 2 and not fastlora.dispatch_counts()["fallbacks"]
    if device.type == "cpu":  # whose seeds torch draws as the oracle does
        check(results, case)


@pytest.mark.parametrize("lengths", [[150], [3] * 12], ids=str)
def test_the_tables_own_tiles(lengths, device):
    case = draw_case(lengths, 72, 136, 8, n_weights=1)
    check(run(case, device, config=None), case)
