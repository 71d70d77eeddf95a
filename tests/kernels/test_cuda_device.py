"""The CUDA kernels on the GPU they are made for. Everything that the emulator cannot tell: that the hardware agrees.

What is marked ``contact``, 25 tests over every tile, is what new hardware or a new build runs first
(benchmarks.gpu)."""

import pytest
import torch

from fastlora.backends import workspace
from fastlora.backends.cuda import launch as cuda
from fastlora.backends.cuda import quantised_launch, segment_launch
from fastlora.ops import lora_linear
from fastlora.problem import Needs
from tests.support import cuda_quantised_checks, launches, numerics, quantised_checks, segments
from tests.support.cuda_checks import lying_transposed
from tests.support.cuda_emulation import run_layer
from tests.support.cuda_projection_checks import GROUPS, assert_exact, expected
from tests.support.cuda_projection_checks import NEEDS as PROJECTION_NEEDS
from tests.support.cuda_projection_checks import draw as draw_projections
from tests.support.cuda_projection_checks import launch as launch_projections
from tests.support.cuda_segment_checks import NEEDS as SEGMENT_NEEDS
from tests.support.cuda_segment_checks import SHORT, TALL
from tests.support.segment_checks import LAYOUTS, draw, launch

pytestmark = pytest.mark.skipif(cuda.unusable() is not None, reason=f"CUDA kernels: {cuda.unusable()}")

LARGEST = cuda.CudaTile(128, 256, 16)
TILES = (
    LARGEST, cuda.CudaTile(128, 256, 4, fused=True, gradients_last=True), cuda.CudaTile(128, 128, 4, 2),
    cuda.CudaTile(64, 128, 4, 4),
)  # fmt: skip


def n_sms() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


@pytest.mark.contact
@pytest.mark.parametrize("dropout_p", (0.0, 0.5))
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_small_layers(poisoned, tile, dropout_p):
    """Small enough for compute-sanitizer; a launch that hangs or faults shows here first."""
    case = on_device(numerics.draw_case(200, 264, 328, 16, torch.bfloat16, dropout_p=dropout_p))
    results, _ = run_layer(case, tile, ctas=n_sms())
    numerics.assert_accurate(results, case)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("r", (8, 32, 64, 256))
@pytest.mark.parametrize(
    "m, n, k", (pytest.param(64, 520, 392, marks=pytest.mark.contact), (1000, 1032, 2056), (4096, 1024, 4096))
)
def test_integers_are_exact(poisoned, tile, m, n, k, r):
    if r > 64 and tile.block_n == 128:
        pytest.skip("small tiles are compiled up to rank 64")
    case = numerics.draw_integer_case(m, n, k, r, torch.bfloat16)
    results, _ = run_layer(on_device(case), tile, ctas=n_sms())
    numerics.assert_exact({name: result.cpu() for name, result in results.items()}, case)


@pytest.mark.parametrize("dropout_p", (0.0, 0.1))
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("r", (16, 64))
def test_a_base_weight_that_lies_transposed(poisoned, tile, r, dropout_p):
    case = lying_transposed(on_device(numerics.draw_case(1000, 1032, 520, r, torch.bfloat16, dropout_p=dropout_p)))
    results, _ = run_layer(case, tile, ctas=n_sms())
    numerics.assert_accurate(results, case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tile", (SHORT, TALL), ids=str)
@pytest.mark.parametrize("transposed", (False, True))
def test_rows_in_segments(poisoned, layout, tile, transposed):
    case = draw(layout, 520, 264, 24, torch.bfloat16, integers=True, bias="each", scaling="each", transposed=transposed)
    tensors = {name: value.cuda() for name, value in vars(case).items() if isinstance(value, torch.Tensor)}
    moved = segments.changed(case, **tensors)
    first = launch(moved, tile, SEGMENT_NEEDS, segment_launch)
    segments.assert_exact({name: result.cpu() for name, result in first.items()}, case)
    for _ in range(10):
        again = launch(moved, tile, SEGMENT_NEEDS, segment_launch)
        assert all(torch.equal(again[name], result) for name, result in first.items())


@pytest.mark.parametrize("name", GROUPS)
def test_projections_that_share_an_input(poisoned, name):
    group, tile = GROUPS[name]
    cases = draw_projections(group, 1000)
    wanted = expected(group, cases)
    moved = [on_device(case) for case in cases]
    first = launch_projections(group, moved, tile, PROJECTION_NEEDS, n_sms())
    on_host = {what: [each if each is None else each.cpu() for each in values] for what, values in first.items()}
    assert_exact(on_host, wanted)
    for _ in range(10):
        again = launch_projections(group, moved, tile, PROJECTION_NEEDS, n_sms())
        for what, values in again.items():
            assert all(a is None or torch.equal(a, b) for a, b in zip(values, first[what], strict=True)), what


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("dropout_p", (0.0, 0.1))
def test_results_are_as_accurate_as_eager_and_the_same_every_time(poisoned, dtype, tile, dropout_p):
    case = on_device(numerics.draw_case(1000, 1032, 1032, 64, dtype, dropout_p=dropout_p))
    first, _ = run_layer(case, tile, ctas=n_sms())
    numerics.assert_accurate(first, case)
    for _ in range(20):
        again, _ = run_layer(case, tile, ctas=n_sms())
        for name, result in again.items():
            assert torch.equal(result.view(torch.int16), first[name].view(torch.int16)), name
    torch.cuda.synchronize()
    assert not any(buffer.any() for buffer in workspace._by_stream.values())


@pytest.mark.parametrize("tile", (LARGEST, cuda.CudaTile(128, 128, 8, 2)), ids=str)
@pytest.mark.parametrize("name", ("nf4", "nf4 nested", "fp4", "int8", "float8"))
def test_packed_weights_are_decoded_bit_for_bit(poisoned, name, tile):
    case, packed = quantised_checks.draw(name, (1000, 1032, 1032, 64), torch.bfloat16)
    case, packed = on_device(case), packed._replace(tensors=tuple(tensor.cuda() for tensor in packed.tensors))
    for _ in range(3):
        results = quantised_checks.run_layer(
            case, packed, Needs(True, True, True, True), lambda spec: quantised_launch.prepare(spec, tile, n_sms())
        )
        numerics.assert_accurate(results, case)


@pytest.mark.parametrize("name", ("nf4", "nf4 nested", "fp4", "int8", "float8", "float8 e5m2"))
def test_products_in_the_loop_see_the_librarys_own_bits(poisoned, name):
    """By the tile that is chosen; and few rows with the branch."""
    case, packed = cuda_quantised_checks.draw_selected(name, 1032, 416, torch.bfloat16, 64)
    packed = packed._replace(tensors=tuple(tensor.cuda() for tensor in packed.tensors))

    def prepare(spec):
        return quantised_launch.prepare(spec, None, n_sms(), True)

    results = quantised_checks.run_layer(on_device(case), packed, None, prepare, in_loop=True)
    numerics.assert_exact({each: result.cpu() for each, result in results.items()}, case)
    if name != "float8 e5m2":
        case, packed = quantised_checks.draw(name, (48, 1032, 416, 64), torch.bfloat16)
        packed = packed._replace(tensors=tuple(tensor.cuda() for tensor in packed.tensors))
        for _ in range(3):
            results = quantised_checks.run_layer(on_device(case), packed, None, prepare, in_loop=True)
            numerics.assert_accurate(results, on_device(case))


@pytest.mark.contact
def test_a_captured_graph_replays(poisoned):
    case = on_device(numerics.draw_integer_case(512, 264, 392, 16, torch.bfloat16))
    c = case
    arguments = (c.x, c.weight, c.lora_a, c.lora_b, c.bias, c.scaling, 0.0, None)
    y, s = launches.forward(cuda, *arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, captured_s = launches.forward(cuda, *arguments)
        gradients = launches.backward(
            cuda,
            c.dy,
            c.x,
            c.weight,
            c.lora_a,
            c.lora_b,
            captured_s,
            c.scaling,
            0.0,
            None,
            Needs(True, True, True, True),
        )
    for _ in range(3):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, y)
        numerics.assert_exact({n: g.cpu() for n, g in gradients._asdict().items()}, to_cpu(case))


@pytest.mark.contact
def test_streams_do_not_share_flags(poisoned):
    case = on_device(numerics.draw_integer_case(2048, 1032, 1032, 16, torch.bfloat16))
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    torch.cuda.synchronize()
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(run_layer(case, LARGEST, ctas=n_sms())[0])
    torch.cuda.synchronize()
    for each in results:
        numerics.assert_exact({name: result.cpu() for name, result in each.items()}, to_cpu(case))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ("cuda", "triton"))
def test_tensors_may_be_on_another_device_than_the_current_one(backend):
    case = _moved(numerics.draw_case(300, 136, 72, 8, torch.bfloat16), "cuda:1")
    y = lora_linear(case.x, case.weight, case.lora_a, case.lora_b, case.scaling, case.bias, backend=backend)
    assert torch.cuda.current_device() == 0 and y.device.index == 1
    numerics.assert_accurate({"y": y}, case)


@pytest.mark.contact
def test_the_public_layer_runs_here():
    case = on_device(numerics.draw_case(300, 136, 72, 8, torch.bfloat16))
    x, a, b = (t.clone().requires_grad_() for t in (case.x, case.lora_a, case.lora_b))
    y = lora_linear(x, case.weight, a, b, case.scaling, case.bias, backend="cuda")
    y.backward(case.dy)
    numerics.assert_accurate({"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad}, case)


def on_device(case: numerics.Case) -> numerics.Case:
    return _moved(case, "cuda")


def to_cpu(case: numerics.Case) -> numerics.Case:
    return _moved(case, "cpu")


def _moved(case: numerics.Case, device: str) -> numerics.Case:
    fields = {n: t.to(device) if isinstance(t, torch.Tensor) and n != "seed" else t for n, t in vars(case).items()}
    return numerics.Case(**fields)
