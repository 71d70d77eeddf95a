"""CUDA graphs of every make, on a GPU. What can be seen of them without one is in tests/core/test_workspace.py."""

import copy
import threading

import pytest
import torch

import fastlora
from fastlora.backends import workspace
from fastlora.module import LoRALinear
from tests.support import numerics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs: needs a GPU")

BACKENDS = ("cuda", "triton", "composed")
SIZE, TOKENS, RANK = 512, 96, 16


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Insisted on; with workspaces as a new process has them."""
    state = fastlora.available_backends()[request.param]
    if state != "usable":
        pytest.skip(f"{request.param}: {state}")
    monkeypatch.setenv("FASTLORA_BACKEND", request.param)
    for name in ("_by_stream", "_reserves"):
        monkeypatch.setattr(workspace, name, {})
    fastlora.reset_dispatch_counts()
    yield request.param
    torch.cuda.synchronize()
    assert fastlora.dispatch_counts()[request.param] > 0
    assert not any(buffer.any() for buffer in workspace._by_stream.values()), "the workspace was left dirty"


def make_model(dropout: float = 0.0, depth: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [
        LoRALinear(SIZE, SIZE, r=RANK, dropout=dropout, device="cuda", dtype=torch.bfloat16) for _ in range(depth)
    ]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return torch.nn.Sequential(*layers)


def inputs(seed: int = 1) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(TOKENS, SIZE, generator=generator, device="cuda", dtype=torch.bfloat16)


def gradients(model) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def same(backend: str, ours, theirs) -> bool:
    """The same bits; of cuBLAS, which may choose by the workspace that a capture gives it, the same numbers nearly."""
    if backend != "composed":
        return torch.equal(ours, theirs)
    return torch.allclose(ours, theirs, rtol=0.016, atol=1e-4)


def warm_up(step) -> None:
    """As torch's page on CUDA graphs has it: on a side stream, before the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)


def captured(model, x):
    """A whole step, forward and backward, as one graph, and its output."""

    def step():
        for p in model.parameters():
            p.grad = None
        y = model(x)
        y.float().square().mean().backward()
        return y

    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    return graph, y


def test_a_captured_step_is_the_eager_one(backend):
    model, x = make_model(), inputs()
    eager = copy.deepcopy(model)
    graph, y = captured(model, x)
    for seed in (2, 3):
        x.copy_(inputs(seed))
        graph.replay()
        expected = eager(inputs(seed))
        eager.zero_grad()
        expected.float().square().mean().backward()
        assert same(backend, y, expected)
        assert all(same(backend, a, b) for a, b in zip(gradients(model), gradients(eager), strict=True))


def test_each_replay_draws_another_mask(backend):
    model, x = make_model(dropout=0.5), inputs()
    graph, y = captured(model, x)
    found = []
    for _ in range(3):
        graph.replay()
        found.append([y.clone(), *gradients(model)])
    torch.cuda.synchronize()
    assert all(not torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))


def test_the_backward_of_a_replay_has_the_masks_of_its_forward(backend):
    """dX = dY·W + mask∘(…): with W = 0, A = 1 it is 0 where the mask drops, and Y's S only sums what is kept."""
    layer = make_model(dropout=0.5, depth=1)[0]
    torch.nn.init.zeros_(layer.weight)
    layer.lora_A.data.zero_()[0] = 1.0
    layer.lora_B.data.zero_()[:, 0] = 1.0
    x = torch.ones(TOKENS, SIZE, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step():
        y = layer(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        return y, dx

    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = step()
    for _ in range(3):
        graph.replay()
        kept = (dx != 0).sum(1, keepdim=True)
        assert 0.4 * SIZE < kept.float().mean() < 0.6 * SIZE
        bias = 0.0 if layer.bias is None else layer.bias.float()
        torch.testing.assert_close(
            y.float() - bias, (layer.scaling * 2.0 * kept).expand(-1, SIZE).float(), rtol=0.02, atol=2
        )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_make_graphed_callables(backend, dropout):
    model = make_model(dropout)
    eager = copy.deepcopy(model)
    graphed = torch.cuda.make_graphed_callables(model, (inputs().requires_grad_(),))
    outputs = []
    for _ in range(2):
        x = inputs(5).requires_grad_()
        y = graphed(x)
        y.float().square().mean().backward()
        outputs.append(y.detach().clone())
    if dropout:
        assert not torch.equal(*outputs)
    else:
        assert same(backend, outputs[0], eager(inputs(5))) and torch.equal(*outputs)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_compiled_with_graphs(backend, mode, dropout):
    """Torch raises if an allocation of ours in the graphs' pool outlives the warm-up."""
    torch._dynamo.reset()
    model = make_model(dropout)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    found = []
    for step in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(inputs(step // 4))
        y.float().square().mean().backward()
        found.append([y.detach().clone(), *gradients(model)])
        model.zero_grad()
    if dropout:
        assert all(not torch.equal(a, b) for a, b in zip(found[2], found[3], strict=True))
        return
    expected = eager(inputs(1))
    expected.float().square().mean().backward()
    for ours, theirs in zip(found[4], [expected.detach(), *gradients(eager)], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_replays_beside_eager_launches(backend):
    """On other streams, at the same time, with integers: a shared flag would be a wrong number or a hang."""
    case = numerics.draw_integer_case(TOKENS, SIZE, SIZE, RANK, torch.bfloat16)
    x, weight, a, b, bias = (t.cuda() for t in (case.x, case.weight, case.lora_a, case.lora_b, case.bias))

    def launch():
        return fastlora.lora_linear(x, weight, a, b, case.scaling, bias)

    expected = numerics.compose(case.to(torch.float64))["y"].to(torch.bfloat16).cuda()
    warm_up(launch)
    graphs, outputs = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            outputs.append(launch())
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    eager = []
    for _ in range(20):
        for stream, graph in zip(streams, graphs, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        for stream in streams[2:]:
            with torch.cuda.stream(stream):
                eager.append(launch())
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in (*outputs, *eager))


@pytest.mark.parametrize("handle", ["a stream of torch's by its handle", "cudaStreamPerThread"])
def test_streams_that_are_not_torchs_own(backend, handle):
    """Two threads, one handle."""
    case = numerics.draw_integer_case(TOKENS, SIZE, SIZE, RANK, torch.bfloat16)
    x, weight, a, b, bias = (t.cuda() for t in (case.x, case.weight, case.lora_a, case.lora_b, case.bias))
    expected = numerics.compose(case.to(torch.float64))["y"].to(torch.bfloat16).cuda()
    torch.cuda.synchronize()
    number = 2 if handle == "cudaStreamPerThread" else torch.cuda.Stream().cuda_stream
    kept: list[torch.Tensor] = []  # while anything runs: torch's own allocator takes the two streams for one

    def work():
        with torch.cuda.stream(torch.cuda.ExternalStream(number)):
            kept.extend(fastlora.lora_linear(x, weight, a, b, case.scaling, bias) for _ in range(50))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(kept) == 100 and all(torch.equal(y, expected) for y in kept)
