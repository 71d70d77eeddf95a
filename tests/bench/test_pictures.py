"""The benchmark's pictures and its result in a sentence: what they show is what was measured."""

import json
import re
from dataclasses import asdict

import pytest

from benchmarks import ROOT
from fastlora.bench import plots
from fastlora.bench.cases import preset_cases
from fastlora.bench.names import SECTIONS
from fastlora.bench.report import environment_lines, write_report
from fastlora.bench.verdict import headline_case, means_over_cases, verdict

MEASURED = ROOT / "benchmarks" / "results" / "cpu" / "bench.json"


def row(variant, m, ratio, which="step", **other):
    """A frozen layer that takes 10 µs, and a variant whose quartiles are 1 µs from its median."""
    case = {"m": m, "n": 1, "k": 1, "r": 1, "dropout": 0.0, "dtype": "float32"}
    median = 10.0 * ratio
    times = {"median_us": median, "q25_us": median - 1, "q75_us": median + 1, "ratio_to_frozen": ratio}
    return {"variant": variant, "pass": which, **case, **times, "saved_bytes": 1, "peak_bytes": 2, **other}


ROWS = [
    row("frozen", 1, 1.0), row("frozen", 2, 1.0), row("fastlora", 1, 1.5), row("fastlora", 2, 1.2), row("peft", 1, 4.0),
    row("peft", 2, 1.4), row("slow", 2, 9.0), row("fast", 1, 0.5, "forward"), row("quick", 2, 0.9),
]  # fmt: skip


@pytest.fixture
def figures(monkeypatch):
    """What would have been saved, by file name."""
    found = {}

    def keep(figure, path):
        found[path.name] = figure
        return path

    monkeypatch.setattr(plots, "_save", keep)
    yield found
    for figure in found.values():
        plots.plt.close(figure)


def texts(axes):
    return [text.get_text().strip() for text in axes.texts]


def bars(axes):
    """Name -> where the bar starts and ends. Panels share the names of the first."""
    names = [label.get_text() for label in axes.figure.axes[0].get_yticklabels()]
    ends = {round(bar.get_y() + bar.get_height() / 2): bar for bar in axes.patches}
    return {names[place]: (bar.get_x(), bar.get_x() + bar.get_width()) for place, bar in ends.items()}


def test_bars_start_at_the_frozen_layer_and_end_at_each_ratio(tmp_path, figures):
    plots.ratio_bars(ROWS, "a CPU", tmp_path / "variants.png")
    headline, means = figures["variants.png"].axes
    assert bars(headline) == {
        name: (pytest.approx(1.0), pytest.approx(ratio))
        for name, ratio in (("quick", 0.9), ("frozen", 1.0), ("fastlora", 1.2), ("peft", 1.4), ("slow", 9.0))
    }
    assert list(bars(headline)) == ["quick", "frozen", "fastlora", "peft", "slow"]  # the fastest on top
    assert headline.yaxis_inverted() and "M 2, " in headline.get_title()
    assert texts(headline) == ["0.90", "1.00", "1.20", "1.40", "9.00"]
    assert texts(means) == ["not in every case", "1.00", "1.34", "2.37", "not in every case"]
    assert {name: end for name, (_, end) in bars(means).items()} == pytest.approx(
        {"frozen": 1.0, "fastlora": (1.5 * 1.2) ** 0.5, "peft": (4.0 * 1.4) ** 0.5}
    )
    title = figures["variants.png"].get_suptitle()
    assert "fastlora +20.0%, peft +40.0%" in title and "a CPU" in title
    assert all("lower is better" in axes.get_xlabel() for axes in (headline, means))
    spreads = [line for line in headline.lines if len(set(line.get_ydata())) == 1]
    assert [tuple(line.get_xdata()) for line in spreads] == [
        pytest.approx(((10 * ratio - 1) / 10, (10 * ratio + 1) / 10)) for ratio in (0.9, 1.0, 1.2, 1.4, 9.0)
    ]


def test_only_fastlora_is_in_its_colour(tmp_path, figures):
    plots.ratio_bars(ROWS, "a CPU", tmp_path / "variants.png")
    headline = figures["variants.png"].axes[0]
    colours = [bar.get_facecolor() for bar in headline.patches]
    assert colours.count(colours[2]) == 1 and len(set(colours)) == 2


def test_one_case_has_no_means(tmp_path, figures):
    plots.ratio_bars([each for each in ROWS if each["m"] == 2], "a CPU", tmp_path / "variants.png")
    assert len(figures["variants.png"].axes) == 1


def test_there_is_a_bar_only_beside_another(tmp_path):
    for rows in ([], [row("frozen", 1, 1.0)], [row("fastlora", 1, 1.0, "forward"), row("peft", 1, 1.0, "forward")]):
        assert plots.ratio_bars(rows, "a CPU", tmp_path / "variants.png") is None
    assert not list(tmp_path.iterdir())


def test_the_comparison_comes_first(tmp_path):
    report = json.loads(MEASURED.read_text())
    files = write_report(report, tmp_path)
    assert [path.name for path in files] == ["bench.json", "bench.md", "bench.html", "variants.png", "memory.png"]
    body = files[2].read_text().partition("<body>")[2]
    result = verdict(report)
    assert body.startswith(f'<p><strong>{result}</strong></p>\n<img alt="variants"')
    text = files[1].read_text().splitlines()
    assert [line for line in text if line][1:3] == [result, "![variants](variants.png)"]
    assert all(path.stat().st_size < 150_000 for path in files if path.suffix == ".png")


def test_the_page_says_how_busy_the_machine_was(tmp_path):
    report = json.loads(MEASURED.read_text())
    said = "The timed work had 37% of a CPU at worst"
    assert said not in "".join(environment_lines(report))
    for number, each in enumerate(report["layer"]):
        each["cpu_share"] = 0.37 if number == 5 else 1.0
    assert said in "".join(environment_lines(report))


def test_the_committed_report_is_written_by_this_code(tmp_path):
    """The pictures' bytes depend on fonts and on matplotlib; what is said beside them does not."""
    write_report(json.loads(MEASURED.read_text()), tmp_path)
    assert (MEASURED.parent / "bench.md").read_text() == (tmp_path / "bench.md").read_text()
    assert {path.name for path in MEASURED.parent.glob("*.png")} == {path.name for path in tmp_path.glob("*.png")}


class TestVerdict:
    def report(self, **sections):
        return {**{section: [] for section in SECTIONS}, **sections}

    def test_of_layers(self):
        assert verdict(self.report(layer=ROWS)) == (
            "A step of one layer (M 2, N 1, K 1, R 1, float32) takes fastlora 12.0 µs, +20.0% against the frozen layer "
            "(PEFT +40.0%); the fastest of 2 others is quick, -10.0%. Over 2 cases: fastlora +34.2%, PEFT +136.6% "
            "(geometric means)."
        )

    def test_of_one_layer_alone(self):
        rows = [each for each in ROWS if each["m"] == 1 and each["variant"] in ("frozen", "fastlora")]
        assert verdict(self.report(layer=rows)).endswith("takes fastlora 15.0 µs, +50.0% against the frozen layer.")

    def test_of_a_model(self):
        rows = [{**each, "name": "A decoder layer"} for each in ROWS if each["m"] == 2]
        said = "A step of A decoder layer takes fastlora 12.0 µs, +20.0% against the frozen layer (PEFT +40.0%)."
        assert verdict(self.report(decoder=rows)) == said

    def test_of_the_host(self):
        rows = [row("frozen", 1, 1.0), row("fastlora", 1, 2.5, ratio_to_peft=0.75)]
        said = "takes fastlora 25.0 µs of the CPU, 0.75 of PEFT's and 2.50 of the frozen layer's."
        assert verdict(self.report(host=rows)).endswith(said)

    @pytest.mark.parametrize("section", ["layer", "host", "decoder", "experts"])
    def test_of_nothing_of_ours(self, section):
        rows = [{**row("peft", 1, 2.0), "name": "A layer"}]
        assert verdict(self.report(**{section: rows})) == "Nothing was measured with fastlora in it."


def test_a_variant_that_lacks_a_case_has_no_mean():
    means, cases = means_over_cases(ROWS)
    assert cases == 2 and set(means) == {"frozen", "fastlora", "peft"}
    assert {each["m"] for each in headline_case(ROWS)} == {2}


@pytest.mark.parametrize("preset, lines", [("quick", 3), ("lorafusion", 3), ("llama8b", 16), ("full", 16)])
def test_the_picture_of_any_grid_has_lines_that_can_be_told_apart(preset, lines):
    cases = preset_cases(preset, "cuda")
    rows = [{"variant": "fastlora", "pass": "step", **asdict(case), "ratio_to_frozen": float(case.r)} for case in cases]
    found = plots.ratio_lines(rows)
    assert len(found) == lines
    assert {m for points in found.values() for m, _ in points} == {case.m for case in cases}
    for label, points in found.items():
        rank = int(re.search(r"R (\d+)", label)[1])
        assert [ratio for _, ratio in points] == pytest.approx([rank] * len(points))


def test_lines_of_one_picture_all_look_different(tmp_path, figures):
    rows = [{**row("fastlora", m, 1.0), "r": r} for r in range(1, plots.MAX_LINES + 1) for m in (1, 2)]
    plots.ratio_over_tokens(rows, "device", tmp_path / "ratio.png")
    drawn = figures["ratio.png"].axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == len(drawn) == plots.MAX_LINES + 1


def test_lines_are_geometric_means_over_what_their_label_leaves_out(monkeypatch):
    rows = [row("fastlora", m, ratio) for m in (2, 1) for ratio in (2.0, 8.0)]
    monkeypatch.setattr(plots, "MAX_LINES", 1)
    assert plots.ratio_lines(rows) == {"1×1 float32 R 1": [(1, pytest.approx(4.0)), (2, pytest.approx(4.0))]}


def test_a_picture_over_tokens_has_lines(tmp_path, figures):
    points = [row("fastlora", 1, 1.0), row("fastlora", 2, 1.0, r=2)]
    assert plots.ratio_over_tokens(points, "device", tmp_path / "ratio.png") is None
    assert plots.ratio_over_tokens([*points, row("fastlora", 4, 1.0)], "device", tmp_path / "ratio.png")


@pytest.mark.parametrize(
    "rates, drawn",
    [
        ([("float32", 1.0, 1.0), ("float32", 1.0, 100.0)], True),
        ([("float32", 1.0, 1.0), ("float32", 2.0, 1.0)], False),
        ([("float32", 1.0, 1.0), ("bfloat16", 1.0, 1.0)], False),  # on different sides, of different roofs
    ],
)
def test_a_roofline_is_drawn_where_there_is_one(rates, drawn, tmp_path, figures):
    """The corners are at 1/10 and 100/10 of TFLOP/s ÷ GB/s."""
    peaks = {"copy_gbs": 10.0, "matmul_tflops": {"float32": 1.0, "bfloat16": 100.0}}
    rows = [row("fastlora", 1, 1.0, "forward", dtype=t, tflops=f, gbs=b) for t, f, b in rates]
    assert bool(plots.roofline({"peaks": peaks, "layer": rows}, tmp_path / "roofline.png")) == drawn
    assert plots.roofline({"peaks": peaks, "layer": []}, tmp_path / "roofline.png") is None


def test_memory_says_what_is_kept_and_the_peak(tmp_path, figures):
    rows = [row("fastlora", 1, 1.0, saved_bytes=1 << 20, peak_bytes=3 << 20)]
    rows += [row("peft", 1, 1.0, saved_bytes=4 << 20, peak_bytes=5 << 20), row("old", 1, 1.0, saved_bytes=None)]
    plots.memory_bars(rows, tmp_path / "memory.png")
    axes = figures["memory.png"].axes[0]
    assert texts(axes) == ["1.0 / 3.0", "4.0 / 5.0"] and "fastlora 3.0, peft 5.0" in axes.get_title()
    assert [bar.get_width() for bar in axes.patches] == [3.0, 1.0, 5.0, 4.0]
