"""The tables of a benchmark's report."""

from statistics import geometric_mean

from fastlora.tables import Table, mib, time_text


def spread_text(row: dict) -> str:
    """Median and quartiles."""
    return f"{time_text(row['median_us'])} ({time_text(row['q25_us'])} – {time_text(row['q75_us'])})"


def case_label(row: dict) -> str:
    dropout = f", p {row['dropout']:g}" if row["dropout"] else ""
    return f"M {row['m']}, N {row['n']}, K {row['k']}, R {row['r']}{dropout}, {row['dtype']}"


def unique(values) -> list:
    return list(dict.fromkeys(values))


def ratio_table(rows: list[dict], which: str) -> Table:
    """Every case's ratio to the frozen layer, a column per variant, and their geometric mean."""
    chosen = [row for row in rows if row["pass"] == which]
    variants = [name for name in unique(row["variant"] for row in chosen) if name != "frozen"]
    lines, ratios = [], {name: [] for name in variants}
    for label in unique(map(case_label, chosen)):
        found = {row["variant"]: row for row in chosen if case_label(row) == label}
        cells = [label, time_text(found["frozen"]["median_us"])]
        for name in variants:
            cells.append(f"{found[name]['ratio_to_frozen']:.3f}" if name in found else "–")
            if name in found:
                ratios[name].append(found[name]["ratio_to_frozen"])
        lines.append(cells)
    if len(lines) > 1:
        lines.append(["geometric mean", "", *(f"{geometric_mean(ratios[name]):.3f}" for name in variants)])
    return Table(
        f"One layer, {which}: ratio to the frozen layer",
        "Median time over the frozen F.linear's, in the same interleaved run; below 1 is faster. Means are over the "
        "cases that a variant serves.",
        ["case", "frozen", *variants],
        lines,
    )


def top_table(rows: list[dict], which: str) -> Table:
    """For a terminal: a row per variant, fastlora's first, then by its mean ratio to the frozen layer."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row["pass"] == which and row["variant"] != "frozen":
            ratios.setdefault(row["variant"], []).append(row["ratio_to_frozen"])
    order = sorted(ratios, key=lambda name: (name != "fastlora", geometric_mean(ratios[name])))
    lines = [
        [name, *(f"{value:.3f}" for value in (geometric_mean(found), min(found), max(found))), str(len(found))]
        for name, found in ((name, ratios[name]) for name in order)
    ]
    return Table(
        f"One layer, {which}: time ÷ the frozen layer's",
        "Medians of interleaved runs; lower is better, the frozen layer is 1. Means over the cases a variant serves.",
        ["variant", "mean", "lowest", "highest", "cases"],
        lines,
    )


def layer_details(rows: list[dict]) -> Table:
    """Every row of the layer section."""
    lines = [
        [
            case_label(row),
            row["pass"],
            row["variant"],
            spread_text(row),
            f"{row['tflops']:.3g}",
            f"{row['gbs']:.3g}",
            f"{row['share_of_peak']:.0%}",
            f"{row['ratio_to_frozen']:.3f}",
            str(row["launches"]),
            mib(row["saved_bytes"]),
            mib(row["peak_bytes"]),
            row["method"] + (f"; {row['note']}" if row.get("note") else ""),
        ]
        for row in rows
    ]
    columns = ["case", "pass", "variant", "median (quartiles)", "TFLOP/s", "GB/s", "of peak", "ratio", "launches"]
    return Table(
        "One layer, every row",
        "Share of peak: the time that the pass's arithmetic or traffic takes at the measured peaks, whichever is "
        "longer, over the measured time. Launches: GPU kernels, or ATen calls without a further one on a CPU. Saved "
        "and peak: MiB kept for backward besides the parameters, and allocated at the step's worst moment.",
        [*columns, "saved MiB", "peak MiB", "timed by"],
        lines,
    )


def host_table(rows: list[dict]) -> Table:
    lines = [
        [
            row["variant"],
            spread_text(row),
            f"{row['ratio_to_frozen']:.2f}",
            "–" if row["ratio_to_peft"] is None else f"{row['ratio_to_peft']:.2f}",
        ]
        for row in sorted(rows, key=lambda row: row["median_us"])
    ]
    note = "Forward + backward of one layer where arithmetic is next to nothing"
    if rows:
        note += f": {case_label(rows[0])}. Per call, torch on one thread; {rows[0]['method']}."
    return Table("Host overhead", note, ["variant", "median (quartiles)", "/ frozen", "/ PEFT"], lines)


def model_table(rows: list[dict]) -> Table:
    counted = "tflops" in rows[0]  # not in reports of the first versions
    lines = [
        [
            row["variant"],
            row["pass"],
            spread_text(row),
            *([f"{row['tflops']:.3g}", f"{row['gbs']:.3g}", f"{row['share_of_peak']:.0%}"] if counted else []),
            f"{row['ratio_to_frozen']:.3f}",
            str(row["launches"]) if row.get("launches") else "–",
            mib(row.get("saved_bytes")),
            mib(row.get("peak_bytes")),
        ]
        for row in rows
    ]
    first = rows[0]
    note = first.get("note")
    if note is None:
        batch = f"batch {first['batch']} × {first['length']} tokens"
        note = f"{first['layers']} layer(s), {batch}, R {first['r']}, {first['dtype']}."
    rates = ["TFLOP/s", "GB/s", "of peak"] if counted else []
    columns = ["variant", "pass", "median (quartiles)", *rates, "/ frozen", "launches", "saved MiB", "peak MiB"]
    return Table(first["name"], note, columns, lines)


def missing_table(missing: dict[str, list[str]]) -> Table:
    lines = [[name, "; ".join(reasons)] for name, reasons in missing.items()]
    return Table("Not measured", "Variants that some or all cases lack, and why.", ["variant", "reason"], lines)


def report_tables(report: dict) -> list[Table]:
    """All tables of a report, in reading order."""
    tables = []
    if report["layer"]:
        tables += [ratio_table(report["layer"], which) for which in ("step", "forward", "backward")]
    if report["host"]:
        tables.append(host_table(report["host"]))
    tables += [model_table(report[section]) for section in ("decoder", "finetune") if report[section]]
    for section in ("experts", "batches"):
        for case in unique((row["name"], row["note"]) for row in report.get(section, ())):
            tables.append(model_table([row for row in report[section] if (row["name"], row["note"]) == case]))
    if report["layer"]:
        tables.append(layer_details(report["layer"]))
    if report["missing"]:
        tables.append(missing_table(report["missing"]))
    return tables
