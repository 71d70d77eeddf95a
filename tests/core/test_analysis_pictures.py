"""Pictures of adapters and of a study: their titles say what to see, and they show what the reports hold."""

import json
import math

import pytest

from benchmarks import ROOT

pytest.importorskip("matplotlib")
from fastlora.analysis import plots
from fastlora.study import pictures

STUDY = json.loads((ROOT / "benchmarks" / "results" / "study" / "study.json").read_text())


@pytest.fixture
def drawn(monkeypatch):
    """The figures, in the order in which they were drawn."""
    figures = []

    def keep(figure):
        figures.append(figure)
        return b"\x89PNG"

    for module in (plots, pictures):
        monkeypatch.setattr(module, "png_bytes", keep)
    return figures


def layer(kind, number, spectrum=(1.0,), **amplification):
    row = {"type": kind, "path": f"layers.{number}.{kind}", "layer": number, "spectrum": list(spectrum)}
    return {**row, "amplification": amplification} if amplification else row


def points(axes):
    return [list(line.get_ydata()) for line in axes.lines]


class TestSpectra:
    @pytest.mark.parametrize("types", [1, 2, 3, 4, 5, 7, 8, 9])
    def test_every_panel_shows_a_type(self, drawn, types):
        rows = [layer(f"t{i}", number, (1.0, 0.5)) for i in range(types) for number in (0, 1)]
        plots.spectra_png("title", rows)
        panels = [axes for axes in drawn[0].axes if axes.get_label() != "<colorbar>"]
        assert [axes.get_title() for axes in panels] == [f"t{i}" for i in range(types)]
        assert all(len(axes.lines) == 2 for axes in panels)

    def test_all_panels_have_one_scale(self, drawn):
        plots.spectra_png("title", [layer("q", 0, (1000.0, 1.0)), layer("v", 0, (0.5, 0.1))])
        q, v = drawn[0].axes
        assert q.get_ylim() == v.get_ylim() and q.get_ylim()[0] < 0.1 and q.get_ylim()[1] > 1000

    def test_rounding_and_zeros_do_not_stretch_it(self, drawn):
        plots.spectra_png("title", [layer("q", 0, (1.0, 0.1, 1e-9, 0.0))])
        (axes,) = drawn[0].axes
        assert axes.get_ylim()[0] > 0.01 and [math.isnan(y) for y in points(axes)[0]] == [False, False, True, True]

    def test_an_untrained_adapter_has_a_picture(self, drawn):
        plots.spectra_png("title", [layer("q", 0, (0.0, 0.0))])
        drawn[0].canvas.draw()

    def test_the_title_says_what_to_see(self, drawn):
        plots.spectra_png("a $ of others", [layer("q", 0)])
        assert drawn[0].get_suptitle().startswith(r"a \$ of others") and "lower rank" in drawn[0].get_suptitle()


class TestAmplification:
    ROWS = [
        layer("q", i, delta_projection=0.5, weight_projection=4.0, random_projection=0.0, factor=factor)
        for i, factor in enumerate((0.25, 20.0, math.inf))
    ]

    def test_factors_are_written_beside_their_points(self, drawn):
        plots.amplification_png("title", self.ROWS)
        norms, factors = drawn[0].axes
        assert [text.get_text() for text in factors.texts] == ["0.25", "20"] and "0.25 to 20" in factors.get_title()
        assert points(factors)[0][:2] == [0.25, 20.0] and points(factors)[1] == [1.0, 1.0]
        assert factors.get_yscale() == norms.get_yscale() == "log"
        assert points(norms)[:2] == [[4.0] * 3, [0.5] * 3] and all(map(math.isnan, points(norms)[2]))
        assert "above 1" in drawn[0].get_suptitle()

    def test_types_have_one_scale(self, drawn):
        larger = [{**row, "type": "v", "amplification": {**row["amplification"], "factor": 1e4}} for row in self.ROWS]
        plots.amplification_png("title", self.ROWS + larger)
        limits = [axes.get_ylim() for axes in drawn[0].axes]
        assert limits[0] == limits[2] and limits[1] == limits[3] and limits[1][1] > 1e4

    def test_many_layers_have_no_labels(self, drawn):
        plots.amplification_png("title", self.ROWS * 10)
        assert not drawn[0].axes[1].texts

    def test_none_is_a_number(self, drawn):
        plots.amplification_png("title", self.ROWS[2:])
        assert drawn[0].axes[1].get_title().endswith("is –")


def test_maps_say_what_to_see_and_the_first_value_of_each(drawn):
    plots.similarity_png("title", [("A", [[0.25, 1.0], [0.5, 0.75]]), ("B", [[math.nan, 1.0]])])
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert "A: φ(1, 1) = 0.25" in titles and "B: φ(1, 1) = –" in titles
    assert "bright" in drawn[0].get_suptitle() and "dark" in drawn[0].get_suptitle()


class TestStudy:
    def test_budget_has_the_untrained_line_and_the_lowest(self, drawn):
        pictures.budget_png(STUDY)
        (axes,) = drawn[0].axes
        entries = STUDY["experiments"]["budget"]
        levels = [ys[0] for ys in points(axes) if len(ys) == 2 and ys[0] == ys[1]]
        assert STUDY["base_loss"] in levels and all(entry["mean"] in levels for entry in entries)
        assert axes.get_ylim()[1] > STUDY["base_loss"] and "lower is better" in axes.get_ylabel()
        assert f"untrained: {STUDY['base_loss']:.3f}" in [text.get_text() for text in axes.get_legend().get_texts()]
        best = min(entries, key=lambda entry: entry["mean"])
        assert f"lowest loss on {best['label']}\n" in axes.get_title()
        assert [text.get_text() for text in axes.texts] == [f"{entry['mean']:.3f}" for entry in entries]

    def test_a_study_that_diverged_has_its_pictures(self, drawn):
        report = json.loads(json.dumps(STUDY))
        for name in ("budget", "ranks"):
            for entry in report["experiments"][name]:
                entry.update(mean=None, spread=None, losses={}, diverged=3)
        pictures.budget_png(report)
        pictures.ranks_png(report)
        assert all(report["base_loss"] in points(figure.axes[0])[-1] for figure in drawn)

    def test_ranks_say_which_way_is_better(self, drawn):
        pictures.ranks_png(STUDY)
        (axes,) = drawn[0].axes
        assert "lower is better" in axes.get_ylabel() and [STUDY["base_loss"]] * 2 in points(axes)

    def test_what_is_committed_is_drawn_by_this_code(self, drawn):
        folder = ROOT / "benchmarks" / "results" / "study"
        committed = {path.name: path.stat().st_size for path in folder.glob("*.png")}
        assert set(pictures.study_pictures(STUDY)) == set(committed) and max(committed.values()) < 150_000
