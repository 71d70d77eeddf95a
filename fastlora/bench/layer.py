"""One LoRA layer: builds every variant, checks it, times forward, backward and step, counts launches and memory."""

from dataclasses import asdict

import torch

from fastlora.bench.cases import LayerCase
from fastlora.bench.correctness import SEED, WrongResult, check_variant
from fastlora.bench.cost import PASSES, Cost, pass_cost
from fastlora.bench.memory import allocation_peak, launches, saved_bytes
from fastlora.bench.peers import FROZEN, Layer, LayerTensors, Peer
from fastlora.bench.timing import GRAPH_BELOW_US, Stage, captured, time_interleaved
from fastlora.environment import l2_bytes

CPU_CACHE_BYTES = 32 << 20
MAX_SETS = 8


def random_tensors(case: LayerCase, device: str, generator: torch.Generator) -> LayerTensors:
    """Normal inputs scaled so that the branch's output is about as large as the base product's."""

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(*shape, device=device, generator=generator, dtype=torch.float32)
        return values.mul_(scale).to(case.torch_dtype)

    return LayerTensors(
        x=normal(case.m, case.k),
        dy=normal(case.m, case.n),
        weight=normal(case.n, case.k, scale=case.k**-0.5),
        lora_a=normal(case.r, case.k, scale=case.k**-0.5),
        lora_b=normal(case.n, case.r, scale=case.r**-0.5),
    )


def input_sets(case: LayerCase, device: str) -> list[LayerTensors]:
    """As many sets as push each other out of the last cache: two caches' worth, 2 to MAX_SETS."""
    generator = torch.Generator(device=device).manual_seed(SEED)
    cache = l2_bytes() if device == "cuda" else CPU_CACHE_BYTES
    per_set = pass_cost(case, "step", lora=True).bytes // 2
    count = min(MAX_SETS, max(2, -(-2 * cache // per_set) + 1))
    return [random_tensors(case, device, generator) for _ in range(count)]


def make_stage(layer: Layer, tensors: LayerTensors) -> Stage:
    """Forward (with its autograd graph) and backward of one layer over one set of inputs."""
    x = tensors.x.detach().requires_grad_(True)
    held: list = [None]

    def prepare() -> None:
        layer.load(tensors)

    def forward() -> None:
        held[0] = layer.call(x)

    def backward() -> None:
        torch.autograd.grad(held[0], [x, *layer.trained], tensors.dy)
        held[0] = None  # or the next step's peak would begin with this output, and free it on the way

    return Stage(prepare, forward, backward)


def build_variants(
    case: LayerCase, peers: list[Peer], tensors: LayerTensors
) -> tuple[dict[str, tuple], dict[str, str]]:
    """Builds and checks every peer that serves the case.

    Returns:
        name -> (peer, layer), and name -> why it is missing.

    Raises:
        WrongResult: a variant of ours, or the frozen layer, is wrong. A wrong peer is listed as missing.
    """
    built, missing = {}, {}
    for peer in peers:
        refusal = peer.refuses(case)
        if refusal:
            missing[peer.name] = refusal
            continue
        try:
            layer = peer.build(case, tensors)
            check_variant(peer, layer, case, tensors)
        except Exception as error:
            missing[peer.name] = _why_missing(peer, error)
        else:
            built[peer.name] = (peer, layer)
    return built, missing


def _why_missing(peer: Peer, error: Exception) -> str:
    """A peer's own failure must not cost the user the rest of the run: the report names it. Ours is raised again."""
    if isinstance(error, ImportError):
        return f"not installed: {error}"
    if peer.kind in ("ours", "frozen") or (peer.kind == "backend" and isinstance(error, WrongResult)):
        raise error
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def measure_layer(case: LayerCase, peers: list[Peer], device: str, peaks: dict, seconds: float) -> tuple[list, dict]:
    """All rows of one case.

    Args:
        case: the layer.
        peers: variants; the frozen layer is put in front where it is not among them.
        device: "cpu" or "cuda".
        peaks: of measure_peaks.
        seconds: time to spend on timing.

    Returns:
        Rows, one per variant and pass, as JSON-able dicts; and name -> why a variant is missing here.
    """
    sets = input_sets(case, device)
    peers = peers if FROZEN in peers else [FROZEN, *peers]
    built, missing = build_variants(case, peers, sets[0])
    tflops, gbs = peaks["matmul_tflops"][case.dtype], peaks["copy_gbs"]
    use_graphs = device == "cuda" and pass_cost(case, "step", lora=True).floor_us(tflops, gbs) < GRAPH_BELOW_US
    stages, counts = {}, {}
    for name, (peer, layer) in list(built.items()):
        stages[name] = [make_stage(layer, tensors) for tensors in sets]
        try:
            counts[name] = _counts(layer, stages[name][0], device)
            for stage in stages[name][1:]:  # once each: what fails from the second call on fails here, and not amid all
                _run_step(stage)
        except Exception as error:
            missing[name] = _why_missing(peer, error)
            del stages[name], built[name]
    notes: dict[str, str] = {}
    if use_graphs:
        stages = {name: _captured_or_not(name, found, notes) for name, found in stages.items()}
    timings = time_interleaved(stages, device, seconds)
    rows = []
    for name, (peer, _) in built.items():
        for which in PASSES:
            timing, cost = timings[name][which], _cost(peer, case, which)
            rows.append(
                {
                    "device": device,
                    "variant": name,
                    "kind": peer.kind,
                    "pass": which,
                    **asdict(case),
                    **asdict(timing),
                    "tflops": cost.flops / timing.median_us / 1e6,
                    "gbs": cost.bytes / timing.median_us / 1e3,
                    "ratio_to_frozen": timing.median_us / timings[FROZEN.name][which].median_us,
                    **counts[name][which],
                    **({"note": notes[name]} if name in notes else {}),
                }
            )
    return rows, missing


def _cost(peer: Peer, case: LayerCase, which: str) -> Cost:
    return pass_cost(case, which, peer.kind != "frozen", peer.weight_bytes)


def _run_step(stage: Stage) -> None:
    stage.prepare()
    stage.forward()
    stage.backward()


def _captured_or_not(name: str, stages: list[Stage], notes: dict[str, str]) -> list[Stage]:
    try:
        return [captured(stage) for stage in stages]
    except RuntimeError as error:
        # Launch times are then part of this variant's row, which says so.
        notes[name] = f"not captured into a graph: {' '.join(str(error).split())[:120]}"
        torch.cuda.synchronize()
        return stages


def _counts(layer: Layer, stage: Stage, device: str) -> dict[str, dict]:
    """pass -> launches, saved bytes and peak bytes; None where a count belongs to another pass."""
    _run_step(stage)  # what is made once (workspaces, compiled code) is there from now on

    def forward_output() -> torch.Tensor:
        stage.forward()
        return None

    saved = saved_bytes(forward_output, layer.parameters.values())
    forward = launches(stage.forward, device)
    backward = launches(stage.backward, device)

    def step() -> None:
        stage.forward()
        stage.backward()

    peak = allocation_peak(step, device)
    return {
        "forward": {"launches": forward, "saved_bytes": saved, "peak_bytes": None},
        "backward": {"launches": backward, "saved_bytes": None, "peak_bytes": None},
        "step": {"launches": forward + backward, "saved_bytes": saved, "peak_bytes": peak},
    }
