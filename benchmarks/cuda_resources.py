"""What the compiled CUDA kernels use, read from the library and from the compiler's own report.

    python -m benchmarks.cuda_resources          rewrites results/cuda_resources.json and .md (minutes of compiling)
    python -m benchmarks.cuda_resources --check  compares the library with the table, compiling nothing

Exits with 1 where a kernel breaks the gate: a spill, a remark that products are serialised, an instruction missing.
"""

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from benchmarks import RESULTS, ROOT

TABLE = RESULTS / "cuda_resources.json"
# HGMMA: warpgroup products. UTMALDG, UTMASTG: the copy engine. USETMAXREG: registers change hands. LDL, STL: spills.
COUNTED = ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "LDL", "STL")
# Counted in innermost loops of products, where it waits for all memory of the GPU in front of every step's products.
BARRIERS = "MEMBAR.GPU in loops"
REQUIRED, FORBIDDEN = COUNTED[:4], (*COUNTED[4:], BARRIERS)
SOURCES = (".cpp", ".cu", ".cuh", ".def", ".h")
REMARK = re.compile(r"\(C75\d\d\)[^\n]*")


def tool(name: str) -> str:
    """A program of the CUDA toolkit, or the copy that Triton brings along."""
    found = shutil.which(name)
    if found:
        return found
    import triton

    beside_triton = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if beside_triton.exists():
        return str(beside_triton)
    raise FileNotFoundError(f"{name} is neither on PATH nor in the triton package")


def source_digest() -> str:
    """Changes with anything that the kernels are compiled from."""
    digest = hashlib.sha256()
    for path in sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in SOURCES):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def read_library(library: Path) -> dict[str, dict]:
    """Registers, stack bytes and instruction counts of each kernel in a library."""
    kernels: dict[str, dict] = {}
    usage = _run(tool("cuobjdump"), "--dump-resource-usage", library)
    for name, registers, stack in re.findall(r"Function (lora_\w+):\s*REG:(\d+) STACK:(\d+)", usage):
        kernels[name] = {"registers": int(registers), "stack": int(stack), **dict.fromkeys((*COUNTED, BARRIERS), 0)}
    for function in _run(tool("cuobjdump"), "-sass", library).split("Function : ")[1:]:
        name, _, body = function.partition("\n")
        if name.strip() in kernels:
            kernels[name.strip()] |= read_instructions(body)
    return kernels


def read_instructions(sass: str) -> dict[str, int]:
    """How often the counted instructions occur in a kernel's disassembly."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    found = dict.fromkeys((*COUNTED, BARRIERS), 0)
    for _, text in code:
        if counted := re.search(rf"\b({'|'.join(COUNTED)})\b", text):
            found[counted.group(1)] += 1
    # A loop ends with a conditional jump; unconditional ones return from waits, which lie behind everything else.
    jumps = ((at, re.match(r"@!?U?P\d BRA 0x([0-9a-f]+)", text)) for at, text in code)
    loops = [(int(jump.group(1), 16), at) for at, jump in jumps if jump and int(jump.group(1), 16) < at]
    products = [at for at, text in code if "HGMMA" in text]
    loops = [(start, end) for start, end in loops if any(start <= at <= end for at in products)]
    for start, end in loops:
        if not any(start <= s and e <= end for s, e in loops if (s, e) != (start, end)):  # innermost
            found[BARRIERS] += sum(start <= at <= end and bool(re.search(r"MEMBAR\S*\.GPU", t)) for at, t in code)
    return found


def _run(*command) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def load_setup():
    """setup.py, as a module."""
    spec = importlib.util.spec_from_file_location("fastlora_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_report() -> tuple[list[str], dict[str, int]]:
    """Compiles every kernel. Returns the assembler's performance remarks, and each kernel's spilled bytes."""
    setup = load_setup()

    def report(source: str, flags: str) -> str:
        with tempfile.TemporaryDirectory() as work:
            command = [setup.NVCC, *setup.FLAGS.split(), *flags.split(), "-Xptxas", "-v", "-c", setup.CSRC / source]
            done = subprocess.run(
                [*map(str, command), "-o", f"{work}/out.o"], capture_output=True, text=True, check=True
            )
            return done.stdout + done.stderr

    with ThreadPoolExecutor() as pool:
        texts = list(pool.map(report, *zip(*((s, f) for _, s, f in setup.objects() if s.endswith(".cu")), strict=True)))
    text = "\n".join(texts)
    spills = {
        name: int(stores) + int(loads)
        for name, stores, loads in re.findall(
            r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", text, re.S
        )
    }
    return REMARK.findall(text), spills


def faults(table: dict) -> list[str]:
    """What breaks the gate."""
    found = [f"performance remark: {remark}" for remark in table["remarks"]]
    for name, kernel in table["kernels"].items():
        found += [f"{name}: no {op} among its instructions" for op in REQUIRED if not kernel[op]]
        found += [f"{name}: {kernel[op]} {op} among its instructions" for op in FORBIDDEN if kernel[op]]
        found += [f"{name}: {kernel[what]} bytes of {what}" for what in ("stack", "spilled") if kernel[what]]
        if kernel["shared"] > 227 * 1024:
            found.append(f"{name}: {kernel['shared']} bytes of shared memory are more than a block may have")
    return found


def nvcc_version() -> str | None:
    """The compiler's version, or None where there is no compiler."""
    nvcc = load_setup().NVCC
    return nvcc and re.search(r"release [\d.]+, V([\d.]+)", _run(nvcc, "--version")).group(1)


def differences(table: dict) -> list[str]:
    """Where the sources or the library differ from the table. Another compiler's numbers are not compared."""
    from fastlora import _C

    if table["source"] != source_digest():
        return ["csrc/ has changed since the table was made: run python -m benchmarks.cuda_resources"]
    if table["nvcc"] != nvcc_version():
        return []
    shared = {variant["name"]: variant["shared_bytes"] for variant in _C.variants()}
    built = read_library(Path(_C.__file__))
    found = [f"{name}: in the table only" for name in table["kernels"].keys() - built.keys()]
    found += [f"{name}: in the library only" for name in built.keys() - table["kernels"].keys()]
    for name in built.keys() & table["kernels"].keys():
        actual = {**built[name], "shared": shared[name]}
        recorded = table["kernels"][name]
        found += [
            f"{name}: {key} {actual[key]}, in the table {recorded[key]}"
            for key in actual
            if actual[key] != recorded[key]
        ]
    return sorted(found)


def make_table() -> dict:
    """Compiles the sources and reads the library, which must have been built from them."""
    from fastlora import _C

    remarks, spills = compile_report()
    kernels = read_library(Path(_C.__file__))
    for variant in _C.variants():
        kernels[variant["name"]] |= {"shared": variant["shared_bytes"], "spilled": spills[variant["name"]]}
    return {
        "nvcc": nvcc_version(),
        "source": source_digest(),
        "remarks": remarks,
        "kernels": dict(sorted(kernels.items())),
    }


def as_markdown(table: dict) -> str:
    columns = ("registers", "shared", "stack", "spilled", *REQUIRED)
    lines = [
        "# Resources of the CUDA kernels",
        "",
        f"Made by `python -m benchmarks.cuda_resources` with nvcc {table['nvcc']} for sm_90a; {len(table['kernels'])} "
        f"kernels, {len(table['remarks'])} performance remarks of the assembler. Shared memory, stack and spills in "
        "bytes; the last columns count instructions. 168 registers a thread at entry become 40 for the producer "
        "warpgroup and 232 for each of the two consumer warpgroups (USETMAXREG).",
        "",
        "| kernel | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    lines += [f"| {name} | " + " | ".join(str(k[c]) for c in columns) + " |" for name, k in table["kernels"].items()]
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Compare the library with the table.")
def main(check: bool):
    if check:
        table = json.loads(TABLE.read_text())
        problems = differences(table) + faults(table)
    else:
        table = make_table()
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
        TABLE.with_suffix(".md").write_text(as_markdown(table))
        problems = faults(table)
    click.echo("\n".join(problems) or f"{len(table['kernels'])} kernels pass")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
