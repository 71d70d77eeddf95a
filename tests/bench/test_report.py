"""The report's files come from its JSON alone, show every row, and need nothing else to be read."""

import json
import os
import re
import sys

import pytest
import torch

from benchmarks import readme_tables, saved_bytes
from fastlora.bench import run
from fastlora.bench.cases import LayerCase
from fastlora.bench.models import ModelCase
from fastlora.bench.peers import STORED_S, Peer
from fastlora.bench.report import load_report, write_report
from fastlora.bench.run import BenchOptions, Unfinished, run_bench, steps_of
from fastlora.bench.tables import model_table, ratio_table, report_tables
from fastlora.tables import Table, time_text


def absent(case, tensors):
    raise ImportError("No module named <absent> | here")


@pytest.fixture(scope="module")
def report():
    labels: list = []
    options = BenchOptions(
        preset="cases",
        device="cpu",
        sections=("layer", "host"),
        seconds=0.0,
        peers=(STORED_S, Peer("absent", absent, "package")),
        cases=(LayerCase(8, 6, 10, 2, 0.0, "float32"), LayerCase(4, 6, 10, 2, 0.1, "float32")),
        command="fastlora bench --case …",
        on_progress=labels.append,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastlora.bench.peaks.MATMUL_SIZE", {"cpu": 64})
        patch.setattr("fastlora.bench.peaks.COPY_BYTES", {"cpu": 1 << 20})
        patch.setattr("fastlora.bench.layer.CPU_CACHE_BYTES", 1)
        patch.setattr("fastlora.bench.host.CALLS", 2)
        found = run_bench(options)
    assert len(labels) == steps_of(options) == 4
    return found


def test_a_report_carries_what_judges_it(report):
    env = report["environment"]
    for key in ("device_name", "cpu_threads", "python", "versions", "commit", "date"):
        assert key in env
    assert env["versions"]["torch"]
    assert report["peaks"]["copy_gbs"] > 0 and report["peaks"]["matmul_tflops"]["float32"] > 0
    assert report["command"] == "fastlora bench --case …"
    for row in report["layer"]:
        peaks = report["peaks"]
        shares = (row["tflops"] / peaks["matmul_tflops"]["float32"], row["gbs"] / peaks["copy_gbs"])
        assert row["share_of_peak"] == max(shares)


def test_missing_variants_are_listed_with_their_reasons(report):
    assert report["missing"] == {
        "absent": ["not installed: No module named <absent> | here"],
        "autograd.Function": ["no dropout"],
    }
    variants = {row["variant"] for row in report["host"] if row["kind"] != "floor"}
    assert variants == {"frozen", "fastlora", "autograd.Function"}
    assert sum(row["kind"] == "floor" for row in report["host"]) == 2
    assert all(row["ratio_to_peft"] is None for row in report["host"])


def test_files_are_made_from_the_json_alone(report, tmp_path):
    first = write_report(report, tmp_path / "a")
    again = write_report(load_report(first[0]), tmp_path / "b")
    assert [path.name for path in first] == [path.name for path in again]
    names = [path.name for path in first if path.name != "roofline.png"]  # which depends on the peaks of the machine
    assert names == ["bench.json", "bench.md", "bench.html", "variants.png", "memory.png"]
    for ours, theirs in zip(first[:2], again[:2], strict=True):
        assert ours.read_text() == theirs.read_text()


def test_the_page_stands_alone_and_shows_every_number(report, tmp_path):
    files = write_report(report, tmp_path)
    page = files[2].read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == sum(path.suffix == ".png" for path in files)
    assert "&lt;absent&gt;" in page and "<absent>" not in page
    for table in report_tables(report):
        for row in table.rows:
            for cell in row:
                assert cell.replace("<", "&lt;").replace(">", "&gt;") in page


def test_markdown_cells_cannot_break_the_table():
    text = Table("t", "n", ["a|b"], [["c|d"]]).to_markdown()
    assert "| a\\|b |" in text and "| c\\|d |" in text


def row(variant, m, median, frozen, which="step"):
    case = {"m": m, "n": 1, "k": 1, "r": 1, "dropout": 0.0, "dtype": "float32"}
    return {"variant": variant, "pass": which, **case, "median_us": median, "ratio_to_frozen": median / frozen}


def test_means_are_geometric_and_over_the_cases_a_variant_serves():
    rows = [row("frozen", m, 10.0, 10.0) for m in (1, 2)]
    rows += [
        row("a", 1, 20.0, 10.0),
        row("a", 2, 5.0, 10.0),
        row("b", 1, 30.0, 10.0),
        row("a", 1, 99.0, 1.0, "forward"),
    ]
    table = ratio_table(rows, "step")
    assert table.columns == ["case", "frozen", "a", "b"]
    assert [line[2:] for line in table.rows] == [["2.000", "3.000"], ["0.500", "–"], ["1.000", "3.000"]]


def test_models_are_held_against_the_peaks_of_their_dtype(monkeypatch):
    """Whatever dtype the layers have; and reports from before that are still shown."""
    pytest.importorskip("transformers")
    monkeypatch.setattr("fastlora.bench.peaks.MATMUL_SIZE", {"cpu": 64})
    monkeypatch.setattr("fastlora.bench.peaks.COPY_BYTES", {"cpu": 1 << 20})
    tiny = ModelCase("tiny", 16, 24, 4, 2, 1, 32, 2, 6, 3, torch.float32)
    monkeypatch.setattr(run, "decoder_case", lambda device: tiny)
    cases = (LayerCase(8, 6, 10, 2, 0.0, "bfloat16"),)
    found = run_bench(BenchOptions("cases", "cpu", ("decoder",), 0.0, (), cases))
    assert set(found["peaks"]["matmul_tflops"]) == {"bfloat16", "float32"}
    table = model_table(found["decoder"])
    assert all(entry["share_of_peak"] > 0 for entry in found["decoder"]) and "of peak" in table.columns
    assert {len(line) for line in table.rows} == {len(table.columns)}
    for entry in found["decoder"]:
        del entry["tflops"], entry["gbs"], entry["share_of_peak"]
    older = model_table(found["decoder"])
    assert "of peak" not in older.columns and {len(line) for line in older.rows} == {len(older.columns)}


def test_times_have_units():
    assert time_text(12.345) == "12.3 µs"
    assert time_text(12345.0) == "12.35 ms"


def test_the_measurements_are_written_before_anything_that_may_fail(report, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no font")

    monkeypatch.setattr("fastlora.bench.plots.draw_all", fail)
    with pytest.raises(RuntimeError, match="no font"):
        write_report(report, tmp_path)
    assert load_report(tmp_path / "bench.json") == json.loads(json.dumps(report))


def test_a_failed_write_leaves_the_old_measurements(report, tmp_path, monkeypatch):
    write_report(report, tmp_path)
    before = (tmp_path / "bench.json").read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_report({**report, "preset": "other"}, tmp_path)
    assert (tmp_path / "bench.json").read_bytes() == before and not list(tmp_path.glob(".*"))


def test_without_matplotlib_there_are_no_pictures_and_the_page_says_so(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fastlora.bench.plots", raising=False)
    files = write_report(report, tmp_path)
    assert [path.name for path in files] == ["bench.json", "bench.md", "bench.html"]
    for path in files[1:]:
        assert "for want of matplotlib" in path.read_text() and "<img" not in path.read_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of luck")])
def test_what_was_measured_before_an_early_end_is_not_lost(error, monkeypatch, tmp_path):
    monkeypatch.setattr("fastlora.bench.peaks.MATMUL_SIZE", {"cpu": 64})
    monkeypatch.setattr("fastlora.bench.peaks.COPY_BYTES", {"cpu": 1 << 20})
    cases = [LayerCase(m, 6, 10, 2, 0.0, "float32") for m in (8, 9, 10)]
    measured = run.measure_layer

    def stopping(case, *arguments):
        if case == stop_at:
            raise error
        return measured(case, *arguments)

    monkeypatch.setattr(run, "measure_layer", stopping)
    options = BenchOptions("cases", "cpu", ("layer",), 0.0, (), tuple(cases))
    stop_at = cases[0]
    with pytest.raises(type(error)):
        run_bench(options)
    stop_at = cases[2]
    with pytest.raises(Unfinished) as ended:
        run_bench(options)
    assert ended.value.__cause__ is error
    found = ended.value.report
    assert {entry["m"] for entry in found["layer"]} == {8, 9} and all(r["share_of_peak"] > 0 for r in found["layer"])
    assert found["unfinished"].startswith("stopped at part 4 of 4, M=10 N=6 K=10 R=2 float32: ")
    page = write_report(found, tmp_path)[2].read_text()
    assert "Not finished: stopped at part 4 of 4" in page


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "layer": []}', '{"format": 1, "layer": []}'])
def test_a_file_that_is_no_report_is_refused(text, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bench\.json is not"):
        load_report(path)


def test_compiling_is_left_to_the_headline_on_a_cpu():
    compiled = Peer(run.COMPILED, absent, "package")
    small, headline = LayerCase(8, 8, 8, 2, 0.0, "float32"), run.CPU_HEADLINE[0]
    assert not run._worth_it(compiled, small, "cpu")
    assert run._worth_it(compiled, headline, "cpu") and run._worth_it(compiled, small, "cuda")


def test_json_is_readable_by_anyone(report, tmp_path):
    stored = json.loads(write_report(report, tmp_path)[0].read_text(), parse_constant=lambda name: pytest.fail(name))
    assert stored["format"] == 1


def test_readme_tables_come_from_the_files_they_name(report, tmp_path):
    write_report(report, tmp_path / "results")
    text = "before\n<!-- table: {} results/bench.json -->\nold\n<!-- end of table -->\nafter\n"
    filled = readme_tables.fill(text.format("step"), tmp_path)
    assert filled.startswith("before\n<!-- table: step results/bench.json -->\n**One layer, step")
    assert filled.endswith("<!-- end of table -->\nafter\n") and "old" not in filled
    assert report["command"] in filled and "M 8, N 6, K 10, R 2, float32" in filled
    assert readme_tables.fill(filled, tmp_path) == filled
    for kind in ("memory", "host"):
        assert "autograd.Function" in readme_tables.fill(text.format(kind), tmp_path)
    with pytest.raises(ValueError, match="unknown table 'loudness'"):
        readme_tables.fill(text.format("loudness"), tmp_path)
    with pytest.raises(ValueError, match="cannot read elsewhere.json"):
        readme_tables.fill(text.format("step").replace("results/bench", "elsewhere"), tmp_path)


def test_the_table_of_saved_bytes_is_what_is_counted_now():
    """PEFT's bytes are another project's business and may change with its version."""
    report = json.loads(saved_bytes.RESULT.read_text())
    assert [(row["base"], row["adapters"], row["dropout"]) for row in report["rows"]] == list(saved_bytes.KINDS)
    for kind, row in zip(saved_bytes.KINDS, report["rows"], strict=True):
        again = saved_bytes.count(*kind)
        assert (again["fastlora"], again["x_and_s"]) == (row["fastlora"], row["x_and_s"])
        assert row["fastlora"] <= row["x_and_s"] + 8 <= row["peft"] + 8  # and a seed


@pytest.mark.parametrize("page", readme_tables.PAGES)
def test_pages_show_what_is_in_the_results(page):
    text = (readme_tables.ROOT / page).read_text()
    assert readme_tables.fill(text, readme_tables.ROOT, os.path.dirname(page)) == text


def test_every_page_with_a_table_is_checked():
    pages = {path.relative_to(readme_tables.ROOT).as_posix() for path in readme_tables.ROOT.glob("*/**/*.md")}
    pages = {page for page in pages if readme_tables.BLOCK.search((readme_tables.ROOT / page).read_text())}
    assert pages and {page for page in pages if not page.startswith((".", "build"))} <= set(readme_tables.PAGES)
