"""Copies of the Triton kernels with one defect each, to see the proof find it."""

import importlib
import importlib.util
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import fastlora.backends.triton

SOURCES = Path(fastlora.backends.triton.__file__).parent
MODULES = (
    "structs",
    "variant",
    "schedule",
    "memory",
    "row_map",
    "base_weight",
    "branch",
    "column_scale",
    "epilogue",
    "tiles",
    "gradients",
    "kernels",
    "launch",
    "projections",
    "projection_kernels",
    "projection_launch",
    "packed_format",
    "packed_weight",
    "quantised_kernels",
    "quantised_launch",
    "scaled_kernels",
    "scaled_launch",
    "segments",
    "segment_kernels",
    "segment_launch",
)


@dataclass(frozen=True)
class Mutant:
    """One replacement in one module, or in one line of it. ``shows``: under which check (support/defects.py)."""

    name: str
    module: str
    old: str
    new: str
    shows: str = "integers"
    line: int | None = None

    def apply(self, text: str) -> str:
        """
        Raises:
            ValueError: the text to replace is not in the module; the kernels have changed and the mutant must follow.
        """
        if self.line is None:
            head, part, tail = "", text, ""
        else:
            lines = text.splitlines(keepends=True)
            head, part, tail = "".join(lines[: self.line - 1]), lines[self.line - 1], "".join(lines[self.line :])
        if self.old not in part:
            raise ValueError(f"mutant {self.name!r}: {self.module}.py has no {self.old!r}")
        return head + part.replace(self.old, self.new) + tail


MUTANTS = (
    Mutant(
        "no wait for S",
        "tiles",
        "            wait_for(flags_ptr + row, s_is_made(shape, variant))\n        first_n",
        "        first_n",
    ),
    Mutant(
        "wait for the row before",
        "tiles",
        "wait_for(flags_ptr + row, s_is_made(shape, variant))",
        "wait_for(flags_ptr + row, 0)",
    ),
    Mutant("relaxed release", "schedule", 'flag_ptr, 1, sem="release"', 'flag_ptr, 1, sem="relaxed"'),
    Mutant("relaxed acquire", "schedule", 'flag_ptr, 0, sem="acquire"', 'flag_ptr, 0, sem="relaxed"'),
    Mutant(
        "no barrier before the release",
        "schedule",
        "    tl.debug_barrier()\n    tl.atomic_add(flag_ptr",
        "    tl.atomic_add(flag_ptr",
    ),
    Mutant("flag of the wrong row", "tiles", "publish(flags_ptr + row)", "publish(flags_ptr + row + 1)"),
    Mutant("flags not reset", "schedule", "mask=offs < n_words", "mask=offs < 2"),
    Mutant("ticket not reset", "schedule", "mask=offs < n_words", "mask=(offs < n_words) & (offs > 0)"),
    Mutant("reset one program early", "schedule", "tl.num_programs(0) - 1:", "tl.num_programs(0) - 2:"),
    Mutant(
        "tickets out of order",
        "schedule",
        'return tl.atomic_add(workspace_ptr, 1, sem="relaxed")',
        'return tl.num_programs(0) - 1 - tl.atomic_add(workspace_ptr, 1, sem="relaxed")',
    ),
    Mutant("no wait for dS", "kernels", "wait_for(flags_ptr + m, 1)", "wait_for(flags_ptr + m, 0)"),
    Mutant(
        "no wait for the chunk before",
        "gradients",
        "wait_for(counts_ptr + tile, chunk.index)",
        "wait_for(counts_ptr + tile, 0)",
    ),
    Mutant("sum not passed on", "gradients", "        publish(counts_ptr + tile)\n", ""),
    Mutant("partial sum dropped", "gradients", "acc += tl.load(partial_ptrs", "acc = tl.load(partial_ptrs"),
    Mutant(
        "bias partial dropped",
        "gradients",
        "acc_sum += tl.load(sums.column_sum.partial_ptr",
        "acc_sum = 0 * tl.load(sums.column_sum.partial_ptr",
    ),
    Mutant(
        "tail rows stored",
        "epilogue",
        "mask = (offs_m < shape.M)[:, None] & (offs_n < shape.N)[None, :]",
        "mask = (offs_m <= shape.M)[:, None] & (offs_n < shape.N)[None, :]",
    ),
    Mutant(
        "tail columns dropped",
        "epilogue",
        "mask = (offs_m < shape.M)[:, None] & (offs_n < shape.N)[None, :]",
        "mask = (offs_m < shape.M)[:, None] & (offs_n < shape.N - 1)[None, :]",
    ),
    Mutant("rows not clamped", "row_map", "variant.tile.block_m), M - 1)", "variant.tile.block_m), M)"),
    Mutant(
        "last step of K dropped",
        "tiles",
        "for k in range(0, shape.K, variant.tile.block_k):",
        "for k in range(0, shape.K - variant.tile.block_k, variant.tile.block_k):",
    ),
    Mutant("S unscaled", "branch", "acc_s *= scales.of_sum", "acc_s *= 1.0"),
    Mutant(
        "branch left out",
        "branch",
        "for r in tl.range(0, shape.R, STEP_R",
        "for r in tl.range(0, 0 * shape.R, STEP_R",
    ),
    Mutant("bias left out", "epilogue", "branch += bias[None, :]", "branch += 0.0 * bias[None, :]"),
    Mutant("dA and dB negated", "gradients", "(acc * sums.scale).to", "(acc * -sums.scale).to"),
    Mutant(
        "rows of the next chunk counted",
        "row_map",
        "first_row + variant.tile.group_m * variant.tile.block_m, M)",
        "first_row + variant.tile.group_m * variant.tile.block_m + 1, M)",
    ),
    Mutant(
        "dropout counter shifted",
        "memory",
        "offs_call = column // PER_CALL +",
        "offs_call = 1 + column // PER_CALL +",
        shows="dropout",
    ),
    Mutant(
        "dropout ignored in dA", "gradients", "            if DROPOUT:\n", "            if False:\n", shows="dropout"
    ),
    Mutant(
        "dropout ignored in dX",
        "branch",
        "tl.where(keep, branch * dropout.inverse_keep, 0.0)",
        "branch * dropout.inverse_keep",
        shows="dropout",
    ),
    Mutant(
        "dropout ignored in S", "tiles", "BLOCK_K), act_block, 0.0)", "BLOCK_K), act_block, act_block)", shows="dropout"
    ),
    Mutant(
        "kept elements unscaled in dA",
        "kernels",
        "scale=inverse_keep",
        "scale=1.0",
        shows="dropout",
    ),
    Mutant(
        "an overflow of S hidden",
        "branch",
        'acc_s = tl.where(tl.abs(rounded) == float("inf"), rounded, acc_s) * scales.in_s',
        "acc_s = acc_s * scales.in_s",
        shows="float16",
    ),
    Mutant("S beyond the range", "branch", "* scales.in_s", "* scales.in_s * 2", shows="float16"),
    Mutant("factor of the branch left out of Y", "epilogue", "branch *= on_branch", "branch *= 1.0", shows="float16"),
    Mutant("factor of the branch left out of dB", "kernels", "scale_b = on_branch", "scale_b = 1.0", shows="float16"),
    Mutant(
        "other columns of a product in dbias",
        "gradients",
        "tl.where((tl.arange(0, 16) == 0)[None, :], acc_sum, 0.0)",
        "acc_sum",
        shows="infinities",
    ),
    Mutant("panels not awaited", "base_weight", "weight.parts)", "0)", shows="quantised"),
    Mutant(
        "all parts of a panel but one awaited", "base_weight", "weight.parts)", "weight.parts - 1)", shows="quantised"
    ),
    Mutant(
        "the panel before awaited",
        "base_weight",
        "wait_for(weight.panels_ptr + n if",
        "wait_for(weight.panels_ptr + tl.maximum(n - 1, 0) if",
        shows="quantised",
    ),
    Mutant("parts not published", "quantised_kernels", "        publish(panels_ptr)\n", "", shows="quantised"),
    Mutant(
        "last part of a panel left out",
        "quantised_kernels",
        "PART), 0)",
        "PART - 8), 0)",
        shows="quantised",
    ),
    Mutant(
        "zero points ignored", "packed_weight", "        values -= tl", "        values -= 0 * tl", shows="quantised"
    ),
    Mutant(
        "wrong half of a byte", "packed_weight", "tl.arange(0, 8) ^ 1", "tl.arange(0, 8) ^ 0", shows="packed values"
    ),
    Mutant(
        "wrong half of a byte where bytes are read",
        "packed_weight",
        "((offs & 1) ^ 1)",
        "(offs & 1)",
        shows="packed values",
    ),
    Mutant(
        "scale of the block before",
        "packed_weight",
        "return (start // block).to(tl.int32) +",
        "return (start // block).to(tl.int32) - 1 * (start > 0) +",
        shows="packed values",
    ),
    Mutant(
        "nested scale of the block before",
        "packed_weight",
        "+ index // format.nested_block",
        "+ (index - 1) // format.nested_block",
        shows="packed values",
    ),
    Mutant(
        "offset of nested scales left out",
        "packed_weight",
        "+ tl.load(packed.offset_ptr)",
        "+ 0.0 * tl.load(packed.offset_ptr)",
        shows="packed values",
    ),
    Mutant(
        "nested scales by a fused multiply-add",
        "packed_weight",
        "tl.fma(inner, outer, 0.0) + tl.load(packed.offset_ptr)",
        "tl.fma(inner, outer, tl.load(packed.offset_ptr))",
        shows="packed values",
    ),
    Mutant(
        "nested scales left to the compiler",
        "packed_weight",
        "tl.fma(inner, outer, 0.0) +",
        "inner * outer +",
        shows="packed values",
    ),
    Mutant(
        "one rounding too many",
        "packed_weight",
        "return values * scales",
        "return (values * scales).to(tl.float16).to(tl.float32)",
        shows="packed values",
    ),
    Mutant("rows in the loop not clamped", "packed_weight", "shape.N - 1 - n", "shape.N - n", shows="packed values"),
    Mutant(
        "column K in the loop", "packed_weight", "(columns < shape.K)", "(columns <= shape.K)", shows="packed values"
    ),
    Mutant("sign of fp4 left out", "packed_weight", "code < 8, 1.0, -1.0", "code < 8, 1.0, 1.0", shows="packed values"),
    Mutant(
        "a segment ends a row late",
        "segments",
        "tl.maximum(tl.minimum(end, segments.M), start)",
        "tl.maximum(tl.minimum(end + 1, segments.M), start)",
        shows="segments",
    ),
    Mutant(
        "tail rows stored into the next segment",
        "segments",
        "Shape(segment.end_row - segment.first_row,",
        "Shape(segment.end_row + 1 - segment.first_row,",
        shows="segments",
    ),
    Mutant(
        "tail rows summed with the next segment's",
        "segments",
        "tl.minimum(end_row, segment.end_row))",
        "end_row)",
        shows="segments",
    ),
    Mutant(
        "gradients without rows left as they were", "segments", "return rows > 0", "return rows >= 0", shows="segments"
    ),
    Mutant(
        "adapter of the expert's number",
        "segments",
        "adapter64 = segment.first_row.to(tl.int64), expert.to(tl.int64), adapter.to(tl.int64)",
        "adapter64 = segment.first_row.to(tl.int64), expert.to(tl.int64), expert.to(tl.int64)",
        shows="segments",
    ),
    Mutant("the first expert's weight", "segments", "expert64 * weight_stride", "0 * weight_stride", shows="segments"),
    Mutant(
        "steps counted from the first row group",
        "segments",
        "index, count = group - segment.first_block // variant.tile.group_m, 0",
        "index, count = group, 0",
        shows="segments",
    ),
    Mutant(
        "steps of one segment alone",
        "segments",
        "own = (n_blocks > 0) & (_owner(owners, g, segments.count, LEAST) == owner)",
        "own = (n_blocks > 0) & (g == segment.index)",
        shows="segments",
    ),
    Mutant("dA of segments does not wait for dS", "segments", "if WAITS:", "if False:", shows="segments"),
    Mutant(
        "flag of the segment's own row block",
        "segments",
        "alone, flags_ptr + segment.first_block,",
        "alone, flags_ptr,",
        shows="segments",
    ),
    Mutant("a segment without rows is found", "segments", "0) <= block", "0) < block", shows="segments"),
    Mutant(
        "rows past the last end are ones",
        "segments",
        "_fill(product.out, 0.0",
        "_fill(product.out, 1.0",
        shows="segments",
    ),
    Mutant(
        "a branch without an adapter",
        "segments",
        "rank = tl.where(adapter >= 0, shape.R, 0)",
        "rank = shape.R",
        shows="segments",
    ),
    Mutant(
        "ends beyond M",
        "segments",
        "tl.maximum(tl.minimum(end, segments.M), start)",
        "tl.maximum(end, start)",
        shows="bad ends",
    ),
    Mutant(
        "ends that decrease",
        "segments",
        "tl.associative_scan(tl.maximum(start, before), 0, _larger)",
        "tl.maximum(start, before)",
        shows="bad ends",
    ),
    Mutant(
        "the mask of the segment's own rows",
        "segments",
        "dropout.inverse_keep, segment.first_row)",
        "dropout.inverse_keep, 0)",
        shows="segments, dropout",
    ),
    Mutant(
        "scale left out of Y",
        "epilogue",
        "branch *= column_factors(product.column_scale, offs_n, shape.N)[None, :]",
        "branch *= 1.0",
        shows="scaled",
    ),
    Mutant("scale left out of dY", "column_scale", "(block * factors)", "block", shows="scaled"),
    Mutant(
        "scale of the column before",
        "column_scale",
        "column_scale.magnitude_ptr + offs_n",
        "column_scale.magnitude_ptr + tl.maximum(offs_n - 1, 0)",
        shows="scaled",
    ),
    Mutant(
        "dm of the column before",
        "column_scale",
        "tl.store(dm.ptr + offs_n",
        "tl.store(dm.ptr + (offs_n + 1) % N",
        shows="scaled",
    ),
    Mutant(
        "counts of dm not reset",
        "scaled_launch",
        "self.n_words += n_groups + parts",
        "self.n_words += n_groups",
        shows="scaled",
    ),
    Mutant(
        "dB does not wait for scaled rows",
        "kernels",
        "            await_rows(dy, group, variant)\n",
        "",
        shows="scaled",
    ),
    Mutant(
        "no wait for another projection's dS",
        "projections",
        "wait_for(flags_ptr + i * n_rows + row, tl.minimum(pick(projections.R, i), 1))",
        "wait_for(flags_ptr + row, tl.minimum(pick(projections.R, i), 1))",
        shows="projections",
    ),
    Mutant(
        "dX without the last projection",
        "projections",
        "            for i in range(COUNT):\n                product, shape = "
        "_part_of_dx(projections, dx_ptr, ds_ptr, i, M, K)\n                acc = multiply(acc, product, row, n",
        "            for i in range(COUNT - 1):\n                product, shape = "
        "_part_of_dx(projections, dx_ptr, ds_ptr, i, M, K)\n                acc = multiply(acc, product, row, n",
        shows="projections",
    ),
    Mutant(
        "a column where nothing reads dS",
        "projection_launch",
        "fused, n_columns = self.variant.fused, 0",
        "fused, n_columns = self.variant.fused, 1",
        shows="projections",
    ),
    Mutant(
        "the first projection at a boundary",
        "projections",
        "index += tl.where(tile >= end, 1, 0)",
        "index += tl.where(tile > end, 1, 0)",
        shows="projections",
    ),
    Mutant(
        "a neighbour's weight",
        "projections",
        "            weight=pick_matrix(p.weights, index),\n            down=",
        "            weight=pick_matrix(p.weights, tl.maximum(index - 1, 0)),\n            down=",
        shows="projections",
    ),
    Mutant(
        "a neighbour's bias",
        "projections",
        "bias_ptr, bias_size = pick(bias_ptrs, index), pick(bias_sizes, index)",
        "bias_ptr, bias_size = pick(bias_ptrs, 0), pick(bias_sizes, 0)",
        shows="projections",
    ),
    Mutant(
        "a bias where there is none",
        "epilogue",
        "mask=offs_n < product.bias_size, other=0.0",
        "mask=offs_n < product.bias_size, other=1.0",
        shows="projections",
    ),
    Mutant(
        "a neighbour's scaling",
        "projections",
        "BranchScales(pick(p.scales.of_sum, index), in_s, on_branch)",
        "BranchScales(pick(p.scales.of_sum, 0), in_s, on_branch)",
        shows="projections",
    ),
    Mutant(
        "a neighbour's ranks of dS",
        "projections",
        "sum_before(p.R, index), shape.R)",
        "sum_before(p.R, index - 1), shape.R)",
        shows="projections",
    ),
    Mutant(
        "flag of a neighbour's S",
        "projections",
        "product_tile(product, flags_ptr + index * n_rows, row",
        "product_tile(product, flags_ptr + tl.minimum(index, 1) * n_rows, row",
        shows="projections",
    ),
    Mutant(
        "dA waits for the first projection's dS",
        "projection_kernels",
        "wait_for(flags_ptr + index * n_rows + m, 1)",
        "wait_for(flags_ptr + m, 1)",
        shows="projections",
    ),
    Mutant(
        "sums of all projections in one place",
        "projections",
        "total += tl.where(i < index, tl.cast(N[i], tl.int64) * R[i], 0)",
        "total += tl.where(i < index, 0 * tl.cast(N[i], tl.int64) * R[i], 0)",
        shows="projections",
    ),
    Mutant(
        "counts of gradients not reset",
        "projection_launch",
        "self.n_words = N_COUNTERS.value + count * self.n_rows + n_gradients",
        "self.n_words = N_COUNTERS.value + count * self.n_rows",
        shows="projections",
    ),
    Mutant(
        "the first projection's seed",
        "projections",
        "dropout_of(pick(ptrs, index), pick(seeds, index)",
        "dropout_of(pick(ptrs, index), pick(seeds, 0)",
        shows="projections, dropout",
    ),
    Mutant(
        "a neighbour's probability",
        "projections",
        "pick(thresholds, index)",
        "pick(thresholds, 0)",
        shows="projections, dropout",
    ),
    Mutant(
        "the first projection's factor of the branch",
        "projections",
        "pick(p.scales.in_s, index), pick(p.scales.on_branch, index)",
        "pick(p.scales.in_s, index), pick(p.scales.on_branch, 0)",
        shows="projections, dropout",
    ),
)


def source(module: str) -> str:
    """The text of a module of the Triton kernels."""
    return (SOURCES / f"{module}.py").read_text()


def load(mutant: Mutant) -> ModuleType:
    """The mutant's own copy of fastlora.backends.triton.launch, made afresh. Raises ValueError as Mutant.apply.

    The files stay: Triton reads a kernel's source again when it compiles it.
    """
    directory = Path(tempfile.mkdtemp(prefix="mutant_"))
    package = directory.name
    for name in MODULES:
        text = source(name)
        if name == mutant.module:
            text = mutant.apply(text)
        for other in MODULES:
            text = text.replace(f"fastlora.backends.triton.{other}", f"{package}.{other}")
        (directory / f"{name}.py").write_text(text)
    (directory / "__init__.py").touch()
    spec = importlib.util.spec_from_file_location(
        package, directory / "__init__.py", submodule_search_locations=[str(directory)]
    )
    sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package}.launch")
