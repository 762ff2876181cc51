"""What the figures show, against independent references, and that they can be drawn."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import binomtest

from dashboards import charts, render
from dashboards.web.app import pages
from storage.curves import METRICS, Curve, EndPoint, top
from storage.status import TrialRow


def curve(number, accuracies, params=None, state="complete", gap=0.1):
    made = Curve(TrialRow(number, state, params or {}, epochs=len(accuracies)))
    for epoch, accuracy in enumerate(accuracies):
        row = dict.fromkeys(METRICS, 1.0) | {"train_accuracy": accuracy + gap, "val_accuracy": accuracy}
        made.add(row | {"epoch": epoch, "val_category": [accuracy, 0.5], "val_hits": [1, 2]})
    return made


def test_smoothing_is_pandas_exponential_mean():
    values = [0.3, 0.5, 0.4, 0.6, 0.1]
    [panel, *_] = charts.curves([curve(0, values)], [], smooth=0.7).panels
    expected = pd.Series(values).ewm(alpha=0.3, adjust=True).mean()
    assert panel.series[-1].y == pytest.approx(expected.tolist())
    assert panel.series[-2].y == values  # the raw curve stays
    assert panel.series[-2].faint


def test_a_pruned_curve_ends_with_a_cross_and_says_so():
    drawn = charts.curves([curve(3, [0.3, 0.4], state="pruned"), curve(4, [0.5])], ["fit", "length"])
    assert [label for label, _ in drawn.legend] == ["trial 3, pruned", "trial 4"]
    sizes = render.plotly(drawn.panels[0])["data"][1]["marker"]
    assert (sizes["symbol"], sizes["size"]) == ("x", [0, 7])
    assert drawn.panels[0].series[0].x == [1, 2]  # people count epochs from 1
    assert [panel.title for panel in drawn.panels[3:]] == ["Fit: accuracy", "Length: accuracy"]


def test_groups_of_a_list_are_its_values_and_of_a_range_have_as_many_trials_each():
    some = [
        curve(n, [0.3, 0.4], {"batch_size": 64 * 2 ** (n % 3), "lr": 0.001 * (n + 1)}) for n in range(8)
    ]
    titles = [panel.title for panel in charts.compare(some, "batch_size").panels]
    assert titles == ["batch size = 64", "batch size = 128", "batch size = 256"]
    panels = charts.compare(some, "lr", groups=4).panels
    assert [panel.title for panel in panels] == [
        "lr 0.001 to 0.002",
        "lr 0.003 to 0.004",
        "lr 0.005 to 0.006",
        "lr 0.007 to 0.008",
    ]
    assert len({panel.range for panel in panels}) == 1
    assert charts.compare(some, "dropout").panels == []


def test_the_best_trial_of_a_group_stands_out_with_its_own_gap():
    some = [curve(0, [0.2, 0.4], {"lr": 1.0}, gap=0.05), curve(1, [0.5, 0.6], {"lr": 1.0}, gap=0.25)]
    some += [curve(2, [0.3], {"lr": 1.0})]
    for each in some:
        each.trial.value = each.metrics["val_accuracy"][-1]
    [panel] = charts.compare(some, "lr").panels
    assert panel.note == "3 trials; best: trial 1, score 60.0%, gap +25.0 points"
    assert [series.label for series in panel.series if not series.faint] == ["trial 1", "trial 1"]
    assert panel.epochs == 2  # all panels have the same axes
    assert not panel.series[-1].faint  # it is drawn last, above the others


def test_best_so_far_counts_only_complete_trials():
    ends = [
        EndPoint(0, "complete", 0.5, 1.0, 2.0),
        EndPoint(1, "pruned", 0.9, 2.0, 3.0),
        EndPoint(2, "failed", None, 2.5, 3.5),
        EndPoint(3, "complete", 0.4, 3.0, 5.0),
        EndPoint(4, "complete", 0.6, 4.0, 7.0),
    ]
    over_time, over_cost = charts.history(ends).panels
    assert (over_time.series[-1].x, over_time.series[-1].y) == ([1.0, 3.0, 4.0], [0.5, 0.5, 0.6])
    assert over_cost.series[-1].x == [2.0, 5.0, 7.0]
    assert over_time.series[0].notes == ["trial 1"]


def test_bars_have_wilsons_interval_and_leave_out_what_does_not_occur():
    table = [
        {"name": "maxi_length", "category": "length", "images": 9},
        {"name": "no_dress", "category": "length", "images": 0},
        {"name": "tight", "category": "fit", "images": 400},
    ]
    [panel] = charts.attributes([3, 0, 400], table).panels
    [bars] = panel.series
    assert bars.x == ["maxi length (9)", "tight (400)"]
    assert bars.y == [3 / 9, 1.0]
    # By hand, from Wilson's formula with z = 1.959964.
    z2 = 1.959964**2
    centre, half = (3 + z2 / 2) / (9 + z2), math.sqrt(z2) * math.sqrt(3 * 6 / 9 + z2 / 4) / (9 + z2)
    assert bars.errors[0][0] == pytest.approx(3 / 9 - (centre - half), abs=1e-5)
    assert bars.errors[1][0] == pytest.approx(centre + half - 3 / 9, abs=1e-5)
    assert bars.errors[1][1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("hits", "images"), [(0, 1), (1, 1), (0, 2), (2, 2), (1, 2), (0, 999), (999, 999)]
)
def test_bars_have_a_width_inside_the_panel_and_can_be_drawn(hits, images, tmp_path):
    drawn = charts.attributes([hits], [{"name": "a", "category": "fit", "images": images}])
    [bars] = drawn.panels[0].series
    ((below,), (above,)), (value,) = bars.errors, bars.y
    assert min(below, above) >= 0
    assert 0 <= value - below < value + above <= 1
    known = binomtest(hits, images).proportion_ci(0.95, method="wilson")
    assert (value - below, value + above) == pytest.approx(known, abs=1e-12)
    render.save(drawn, "title", tmp_path / "a.png")  # Matplotlib refuses a bar that is below 0


def test_the_top_is_by_score_then_accuracy_and_nan_comes_last():
    rows = [
        TrialRow(0, "complete", epochs=2, accuracy=0.9, value=0.5),
        TrialRow(1, "running", epochs=1, accuracy=0.7),
        TrialRow(2, "waiting"),
        TrialRow(3, "pruned", epochs=1, accuracy=math.nan),
    ]
    assert [row.number for row in top(rows, 9)] == [1, 0, 3]
    assert [row.number for row in top(rows, 9, {"complete"})] == [0]


def test_what_is_not_finite_becomes_a_gap():
    drawn = charts.curves([curve(0, [0.3, math.nan, math.inf])], [])
    for panel in drawn.panels:
        json.dumps(render.plotly(panel), allow_nan=False)
    [panel] = charts.compare([curve(0, [math.nan], {"lr": 1.0})], "lr").panels
    assert panel.note == "1 trial; best: trial 0, so far 0.0%"  # no gap that is not known
    assert pages.percent(math.nan) == pages.percent(None) == "–"


@pytest.fixture
def figure():
    some = [curve(n, [0.3, 0.35, 0.5], {"lr": 0.1}, "pruned" if n else "complete") for n in range(3)]
    return charts.curves(some, ["<b>fit</b>", "length"])


def test_a_png_is_a_picture_with_the_curves_colours(figure, tmp_path):
    render.save(figure, "title", tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).reshape(-1, 3)
    for color in charts.PALETTE[:3]:
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels.astype(int) - wanted).max(axis=1) < 12).any(), color
    assert list(tmp_path.iterdir()) == [tmp_path / "a.png"]


@pytest.mark.parametrize("path", ["f.svg", "f.html"])
def test_names_are_drawn_as_they_are(path, tmp_path, caplog):
    row = {"name": "<b>$\\frac_1$", "category": "a $x$ & <i>漢", "images": 4}
    drawn = charts.attributes([2], [row])
    render.save(drawn, "lr 1e-3 ($2 vs $\\frac)", tmp_path / path)
    [panel] = drawn.panels
    assert render.plotly(panel)["data"][0]["y"] == ["&lt;b&gt;$\\frac 1$ (4)"]
    lacking = ["the font of .png and .svg lacks letters of these names; an .html file shows them"]
    assert caplog.messages == (lacking if path == "f.svg" else [])


def test_an_svg_is_xml_with_the_titles_in_it(figure, tmp_path):
    render.save(figure, "a <title> & more", tmp_path / "a.svg")
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def test_an_html_file_needs_nothing_else(figure, tmp_path):
    render.save(figure, "a <title>", tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert "a &lt;title&gt;" in text
    assert "<b>fit" not in text.lower()
    assert not re.search(r"""<(?:script|link|img)[^>]+(?:src|href)=["']?http""", text)
    [drawings] = re.findall(r"const drawings = (.*);", text)
    assert json.loads(drawings)[0]["data"][1]["y"] == [0.3, 0.35, 0.5]
