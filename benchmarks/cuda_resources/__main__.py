"""What the compiled CUDA kernels are made of: resources; instructions, stalls and waits by loop.

\b
    python -m benchmarks.cuda_resources             rewrites results/cuda_resources.* (minutes of compiling)
    python -m benchmarks.cuda_resources --check     compares the library with the table, compiling nothing
    python -m benchmarks.cuda_resources --show bf16_128x256_r16$      the rows of these kernels of the library
    python -m benchmarks.cuda_resources --listing lora_sm90_forward_bf16_128x256_r16    instruction by instruction

Exits with 1 where a kernel breaks the gate: a waterfall, a spill, a remark that products are serialised, products or
copies missing, or (--check) a count that is not the table's.
"""

from pathlib import Path

import click

from benchmarks import RESULTS
from benchmarks.cuda_resources import sass, table, toolkit
from benchmarks.cuda_resources.naming import Names
from benchmarks.cuda_resources.report import as_markdown
from fastlora.backends.cuda import extension

TABLE = RESULTS / "cuda_resources.json"


def check(recorded: dict, library: Path, variants: list[dict]) -> tuple[list[str], list[str]]:
    """(what breaks the gate, what could not be compared)."""
    if recorded["source"] != toolkit.source_digest():
        return ["csrc/ has changed since the table was made: run python -m benchmarks.cuda_resources"], []
    built = table.read_library(library, variants)
    problems = table.faults({"remarks": recorded["remarks"], "kernels": built})
    here = toolkit.nvcc_version()
    if here != recorded["nvcc"]:
        note = f"the table was made with nvcc {recorded['nvcc']}, here is {here}: counts are not compared"
        return problems, [note]
    return table.differences(recorded["kernels"], built) + problems, []


def print_listing(kernel: str, library: Path) -> None:
    """Control bits, instructions and names of a kernel."""
    for image in sass.cubins(library.read_bytes()):
        if kernel.encode() in image:
            code = sass.disassemble(toolkit.tool("nvdisasm"), image).get(kernel)
            names = Names(toolkit.CSRC)
            for each in code or ():
                text = f"{'@' + each.predicate if each.predicate else '':5} {each.opcode} {each.operands}"
                click.echo(f"{each.address:5x}  {each.control}  {text:70}  {names.name(each.places)}")
            if code:
                return
    raise click.ClickException(f"no kernel {kernel}")


@click.command(help=__doc__)
@click.option("--check", "checks", is_flag=True, help="Compare the library with the table.")
@click.option("--show", metavar="REGEX", help="Print the rows of kernels of the built library; write nothing.")
@click.option("--listing", metavar="KERNEL", help="Print a kernel's instructions with their control bits.")
def main(checks: bool, show: str | None, listing: str | None) -> None:
    module, reason = extension.load()
    if module is None:
        raise click.ClickException(f"nothing to count: {reason}")
    library, variants = Path(module.__file__), module.variants()
    if listing:
        print_listing(listing, library)
        return
    notes: list[str] = []
    try:
        if show:
            for name, kernel in table.read_library(library, variants, show).items():
                click.echo(table.as_text(name, kernel["rows"]))
            return
        if checks:
            problems, notes = check(table.from_json(TABLE.read_text()), library, variants)
        else:
            made = table.make_table(library, variants)
            TABLE.write_text(table.to_json(made))
            TABLE.with_suffix(".md").write_text(as_markdown(made))
            problems = table.faults(made)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo("\n".join(notes + problems) or f"{len(variants)} kernels pass")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
