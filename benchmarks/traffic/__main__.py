"""What every order of a LoRA layer's work reads, writes and multiplies, counted on the kernels' own PTX.

python -m benchmarks.traffic          rewrites results/traffic.json and .md (a minute on a CPU)
python -m benchmarks.traffic --check  counts again and compares with the table
python -m benchmarks.traffic --m 384 --n 640 --k 256 --r 8 --output DIR     another shape, elsewhere
"""

import json
from pathlib import Path

import click

from benchmarks import RESULTS
from benchmarks.traffic import count
from benchmarks.traffic.report import as_markdown, faults
from fastlora.backends.configs import FUSED_RANK
from tests.support import cuda_emulation

TABLE = RESULTS / "traffic.json"


def check_shape(m: int, n: int, k: int, r: int) -> None:
    """
    Raises:
        click.UsageError: not a shape that every row can have, or one at which passes are not whole.
    """
    if n % 8 or k % 8 or r % 8:
        raise click.UsageError(f"--n {n}, --k {k} and --r {r} must be multiples of 8: the CUDA kernels want that")
    if m % 64:
        raise click.UsageError(f"--m {m} must be a multiple of 64: of a tile's rows past the end kernels read others")
    if r > FUSED_RANK:
        raise click.UsageError(f"--r {r} is above {FUSED_RANK}: beyond, no kernel fuses the shrink")


@click.command(help=__doc__)
@click.option("--m", type=click.IntRange(1), default=count.SHAPE["m"], show_default=True, help="Tokens.")
@click.option("--n", type=click.IntRange(8), default=count.SHAPE["n"], show_default=True, help="out_features.")
@click.option("--k", type=click.IntRange(8), default=count.SHAPE["k"], show_default=True, help="in_features.")
@click.option("--r", type=click.IntRange(8), default=count.SHAPE["r"], show_default=True, help="Rank.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Folder of traffic.json and .md.")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Processes.")
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 where the table is not what is counted now.")
def main(m: int, n: int, k: int, r: int, output: Path | None, jobs: int, check: bool) -> None:
    shape = {"m": m, "n": n, "k": k, "r": r}
    check_shape(**shape)
    if shape != count.SHAPE and output is None:
        raise click.UsageError("another shape needs --output: benchmarks/results holds the default one")
    reason = cuda_emulation.unavailable()
    if reason:
        raise click.ClickException(f"the CUDA kernels' rows need the extension and its PTX: {reason}")
    path = output / TABLE.name if output else TABLE
    old = json.loads(path.read_text()) if check else None
    table = count.make_table(shape, jobs)
    problems = faults(table)
    if check:
        problems += count.differences(old, table)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table, indent=1) + "\n")
        path.with_suffix(".md").write_text(as_markdown(table))
    click.echo("\n".join(problems) or f"{len(table['rows'])} rows")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
