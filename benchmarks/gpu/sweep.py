"""Where each CUDA tile wins, and what the parts of a backward cost: one GPU, bf16, R = 16, K = N = 4096.

    python -m benchmarks.gpu.sweep --output sweep.json
    python -m benchmarks.gpu.sweep --once backward      # a few launches, for a profiler

Forward at M = 16 ... 8192 by every compiled tile and split of its contraction, and the default; backward by the
default: all of it, dX alone, the gradients alone. As in benchmarks.mark, what is timed is right, and what is compared
runs in one rotation with cuBLAS. The file is complete after each.
"""

import json
import shlex
import sys
from pathlib import Path

import click
import torch

from benchmarks.mark import DIRECTIONS, Launch, Rotation, as_line, launch_of
from fastlora.bench.cases import LayerCase
from fastlora.bench.layer import input_sets
from fastlora.environment import describe
from fastlora.problem import Needs

TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SIZE, RANK = 4096, 16
ABLATIONS = {
    "backward": Needs(True, True, True, False),
    "dX alone": Needs(True, False, False, False),
    "gradients alone": Needs(False, True, True, False),
}
ONCE = 3  # launches for a profiler, which may skip the first


def forward_launches(case: LayerCase) -> dict[str, Launch]:
    """The default first, then every tile and split."""
    from fastlora.backends.cuda import launch as cuda
    from fastlora.backends.cuda.tiles import SPLITS, CudaTile, group_size, kernels

    found = {"cuda": launch_of("forward", cuda, {})}
    for kernel in kernels(case.r, dropout=False, backward=False):
        splits = [s for s in SPLITS if s * kernel["block_k"] <= case.k] if kernel["splits"] else [1]
        for split in splits:
            tile = CudaTile(kernel["block_m"], kernel["block_n"], group_size(kernel["cluster"], case.m), split)
            name = f"{tile.block_m}x{tile.block_n} splits {split}"
            found[name] = launch_of("forward", cuda, {"tile": tile})
    return found


def backward_launches(case: LayerCase) -> dict[str, Launch]:
    """All of it first, then its parts."""
    from fastlora.backends.cuda import launch as cuda

    return {name: launch_of("backward", cuda, {}, needs) for name, needs in ABLATIONS.items()}


LAUNCHES = {"forward": forward_launches, "backward": backward_launches}


def once(direction: str, case: LayerCase, device: str) -> None:
    """A few launches of the default."""
    tensors = input_sets(case, device)[0]
    launch = next(iter(LAUNCHES[direction](case).values()))
    for _ in range(ONCE):
        launch(tensors)
    if device == "cuda":
        torch.cuda.synchronize()


@click.command()
@click.option("--output", default="sweep.json", show_default=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--rounds", default=25, show_default=True, type=click.IntRange(5))
@click.option("--tokens", default=TOKENS, multiple=True, type=click.IntRange(1), help="M; may be repeated.")
@click.option("--size", default=SIZE, show_default=True, type=click.IntRange(8), help="K and N.")
@click.option("--once", "single", type=click.Choice(DIRECTIONS), help="A few launches, and nothing timed.")
@click.option("--device", default="cuda", hidden=True)
def main(output: Path, rounds: int, tokens: tuple[int, ...], size: int, single: str | None, device: str) -> None:
    """Time tiles, splits and the parts of a backward."""
    if single:
        once(single, LayerCase(max(tokens), size, size, RANK), device)
        return
    command = shlex.join(["python", "-m", "benchmarks.gpu.sweep", *sys.argv[1:]])
    report: dict = {"command": command, "environment": describe(device), "rows": []}
    for m in tokens:
        case = LayerCase(m, size, size, RANK)
        sets = input_sets(case, device)
        for direction in DIRECTIONS:
            before = list(report["rows"])

            def write(rows: list[dict], before: list[dict] = before) -> None:
                report["rows"] = [*before, *rows]
                output.write_text(json.dumps(report, indent=1) + "\n")

            rotation = Rotation(direction, case, sets, write)
            rotation.time(rotation.check(LAUNCHES[direction](case)), rounds)
            for row in rotation.rows:
                print(f"M={row['m']:<5}", as_line(row), flush=True)
    if any("ratio" not in row for row in report["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
