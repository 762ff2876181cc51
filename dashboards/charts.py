"""What is in each figure: the score over time, learning curves, comparisons, attributes.

A figure is a list of panels, and a panel is a list of series. dashboards/render.py draws them, on a page
or into a file. Nothing here reads the database.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dashboards.predictions import Judgement
from dashboards.wilson import wilson
from storage.curves import Curve, EndPoint
from storage.status import State
from storage.words import counted

# Readable on white and on near-black, and distinct with the common kinds of colour blindness.
PALETTE = (
    *("#3b82f6", "#ea7317", "#0f9d8a", "#d6498f", "#8b5cf6"),
    *("#b58900", "#06a5c9", "#a0674b", "#6b9e28", "#e0483e"),
)
GREY = "#8a94a6"

Style = Literal["line", "dashed", "points", "rings", "steps", "bars"]


@dataclass
class Series:
    """A line, a cloud of points or a row of bars."""

    label: str
    x: list[Any]
    y: list[float]
    color: str
    style: Style = "line"
    faint: bool = False
    cut: bool = False  # ends with a cross, as a paused or pruned trial does
    notes: list[str] | None = None  # a text for each point, shown under the pointer
    errors: tuple[list[float], list[float]] | None = None  # below and above each bar
    colors: list[str] | None = None  # of each bar


@dataclass
class Matrix:
    """Counts by true attribute (rows) and predicted attribute (columns)."""

    names: list[str]
    counts: list[list[int]]

    @property
    def shares(self) -> list[list[float]]:
        """The counts as shares of their row; 0 in a row without any."""
        totals = [max(sum(row), 1) for row in self.counts]
        return [[count / total for count in row] for row, total in zip(self.counts, totals, strict=True)]


@dataclass
class Panel:
    """A pair of axes."""

    title: str
    x: str
    y: str
    series: list[Series] = field(default_factory=list)
    note: str = ""
    range: tuple[float, float] | None = None  # of the y axis
    epochs: int = 0  # the last epoch, if the x axis has epochs, which begin at 1
    percent: bool = False  # the y axis has fractions, shown in percent
    tall: bool = False
    matrix: Matrix | None = None  # instead of series
    picture: bytes | None = None  # a JPEG instead of axes, with the note's lines below it


@dataclass
class Figure:
    """Panels, and what their colours and line styles mean."""

    panels: list[Panel]
    legend: list[tuple[str, str]] = field(default_factory=list)  # (label, colour)
    strokes: str = ""


def history(ends: list[EndPoint]) -> Figure:
    """The scores of the ended trials and the best score so far, over time and over GPU-hours."""
    panels = [
        _scores("Score over time", "hours since the first claim", ends, lambda end: end.hours),
        _scores("Score over GPU-hours", "GPU-hours used", ends, lambda end: end.gpu_hours),
    ]
    legend = [("complete", PALETTE[0]), ("pruned, at its last epoch", GREY), ("best so far", PALETTE[1])]
    return Figure(panels, legend)


def _scores(title: str, axis: str, ends: list[EndPoint], place: Callable[[EndPoint], float]) -> Panel:
    panel = Panel(title, axis, "score", percent=True)
    values: list[float] = []
    kinds: list[tuple[str, str, Style]] = [
        ("pruned", GREY, "rings"),
        ("complete", PALETTE[0], "points"),
    ]
    for outcome, color, style in kinds:
        scored = [end for end in ends if end.outcome == outcome and end.value is not None]
        values = [end.value or 0.0 for end in scored]
        x, notes = [place(end) for end in scored], [f"trial {end.trial}" for end in scored]
        panel.series.append(Series(outcome, x, values, color, style, notes=notes))
    best = list(itertools.accumulate(values, max))  # of the complete trials, which are the last kind
    panel.series.append(Series("best so far", x, best, PALETTE[1], "steps"))
    return panel


def curves(curves: list[Curve], categories: list[str], smooth: float = 0.0) -> Figure:
    """Loss, accuracy and learning rate of several trials, and the accuracy of each category.

    `smooth` in [0, 1) is the weight of the past in an exponential mean. The raw curve stays, faintly.
    """
    panels = [
        _training("Average per-class accuracy", "accuracy", curves, smooth, percent=True),
        _training("Loss", "loss", curves, smooth),
        Panel(
            "Learning rate",
            "epoch",
            "lr",
            [_line(c, c.metrics["lr"], number) for number, c in enumerate(curves)],
        ),
    ]
    for index, name in enumerate(categories):
        panel = Panel(f"{name.capitalize()}: accuracy", "epoch", "accuracy", percent=True)
        for number, curve in enumerate(curves):
            values = [row[index] for row in curve.categories]
            panel.series += _smoothed(curve, values, number, smooth, "line")
        panels.append(panel)
    for panel in panels:
        panel.epochs = _last(curves)
    legend = [
        (_name(curve) + (f", {curve.trial.state}" if _is_cut(curve) else ""), _color(number))
        for number, curve in enumerate(curves)
    ]
    return Figure(panels, legend, "solid: validation; dashed: training; cross: paused or pruned")


def _last(curves: list[Curve]) -> int:
    return max((curve.epochs[-1] + 1 for curve in curves if curve.epochs), default=0)


def _training(title: str, kind: str, curves: list[Curve], smooth: float, percent: bool = False) -> Panel:
    panel = Panel(title, "epoch", kind, percent=percent)
    for number, curve in enumerate(curves):
        panel.series += _smoothed(curve, curve.metrics[f"train_{kind}"], number, smooth, "dashed")
        panel.series += _smoothed(curve, curve.metrics[f"val_{kind}"], number, smooth, "line")
    return panel


def _smoothed(
    curve: Curve, values: list[float], number: int, smooth: float, style: Style
) -> list[Series]:
    raw = _line(curve, values, number, style)
    if not smooth:
        return [raw]
    raw.faint, raw.cut = True, False
    return [raw, _line(curve, _exponential_mean(values, smooth), number, style)]


def _line(curve: Curve, values: list[float], number: int, style: Style = "line") -> Series:
    # People count epochs from 1.
    line = Series(_name(curve), [e + 1 for e in curve.epochs], values, _color(number), style)
    line.cut = _is_cut(curve) and bool(values)
    return line


def _exponential_mean(values: list[float], weight: float) -> list[float]:
    """The exponential mean, with the bias correction that Adam's means have."""
    means, mean = [], 0.0
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        means.append(mean / (1 - weight**count))
    return means


def _is_cut(curve: Curve) -> bool:
    """Whether the curve ends early, at least for now."""
    return curve.trial.state in (State.PAUSED, State.PRUNED)


def _name(curve: Curve) -> str:
    return f"trial {curve.trial.number}"


def _color(number: int) -> str:
    return PALETTE[number % len(PALETTE)]


def compare(curves: list[Curve], by: str, groups: int = 4) -> Figure:
    """Accuracy curves in one panel per value of a hyperparameter, all on the same scale.

    If there are more values than `groups`, each panel has a range of values with as many trials as the
    others. A panel's note has the score and the gap of its best trial. The gap is the training minus the
    validation accuracy at the last epoch.
    """
    drawable = [curve for curve in curves if by in curve.trial.params and curve.epochs]
    lines: list[tuple[str, str, Style]] = [
        ("train_accuracy", PALETTE[1], "dashed"),
        ("val_accuracy", PALETTE[0], "line"),
    ]
    panels = []
    for label, members in _groups(drawable, by, groups):
        panel = Panel(f"{_word(by)} {label}", "epoch", "accuracy", percent=True)
        best = max(members, key=lambda curve: curve.trial.worth)
        for kind, color, style in lines:
            for curve in [*(c for c in members if c is not best), best]:
                x, y = [e + 1 for e in curve.epochs], curve.metrics[kind]
                panel.series.append(Series(_name(curve), x, y, color, style, faint=curve is not best))
        panel.note = (
            f"{counted(len(members), 'trial')}; best: trial {best.trial.number}, "
            f"{'so far' if best.trial.value is None else 'score'} {best.trial.worth:.1%}"
        )
        if best.gap is not None:
            panel.note += f", gap {100 * best.gap:+.1f} points"
        panels.append(panel)
    values = [y for panel in panels for series in panel.series for y in series.y if math.isfinite(y)]
    for panel in panels:
        panel.range = (min(values) - 0.02, max(values) + 0.02) if values else None
        panel.epochs = _last(drawable)
    legend = [("validation", PALETTE[0]), ("training", PALETTE[1])]
    return Figure(panels, legend, "thick: the best trial of each panel")


def _word(name: str) -> str:
    return name.replace("_", " ")


def _groups(curves: list[Curve], by: str, groups: int) -> list[tuple[str, list[Curve]]]:
    ordered = sorted(curves, key=lambda curve: curve.trial.params[by])
    values = sorted({curve.trial.params[by] for curve in ordered})
    if len(values) <= groups:
        return [(f"= {v:g}", [c for c in ordered if c.trial.params[by] == v]) for v in values]
    cuts = [round(len(ordered) * part / groups) for part in range(groups + 1)]
    parts = [ordered[start:end] for start, end in itertools.pairwise(cuts) if start < end]
    return [
        (f"{part[0].trial.params[by]:.2g} to {part[-1].trial.params[by]:.2g}", part) for part in parts
    ]


@dataclass
class AttributeRow:
    """A trial's accuracy in one attribute."""

    attribute: str
    category: str
    images: int  # validation images that have the attribute
    hits: int
    accuracy: float
    low: float  # of the 95 % interval, which is wide if there are few images
    high: float


def attribute_rows(hits: Sequence[int], table: list[dict[str, Any]]) -> list[AttributeRow]:
    """The accuracy of each attribute that some validation image has.

    The other attributes have no accuracy, and are not in the score. `table` has the name, the category
    and the number of validation images of each attribute (storage.tables.Study).
    """
    rows = []
    for hit, row in zip(hits, table, strict=True):
        if count := row["images"]:
            interval = wilson(hit / count, count)
            rows.append(AttributeRow(row["name"], row["category"], count, hit, hit / count, *interval))
    return rows


def attributes(hits: Sequence[int], table: list[dict[str, Any]]) -> Figure:
    """A bar for each attribute's accuracy, with its 95 % interval: see `attribute_rows`."""
    categories = list(dict.fromkeys(row["category"] for row in table))
    rows = attribute_rows(hits, table)
    bars = Series(
        "accuracy",
        [f"{row.attribute.replace('_', ' ')} ({row.images})" for row in rows],
        [row.accuracy for row in rows],
        GREY,
        "bars",
        errors=([row.accuracy - row.low for row in rows], [row.high - row.accuracy for row in rows]),
        colors=[_color(categories.index(row.category)) for row in rows],
    )
    panel = Panel("Accuracy of each attribute (validation images)", "", "accuracy", [bars], tall=True)
    panel.range, panel.percent = (0.0, 1.0), True
    return Figure([panel], [(name, _color(number)) for number, name in enumerate(categories)])


def confusion(judgement: Judgement) -> Figure:
    """A trial's confusion matrix of each category."""
    panels = [
        Panel(
            category.capitalize(),
            "predicted",
            "true",
            matrix=Matrix([_word(name) for name in names], judgement.confusion(category).tolist()),
        )
        for category, names in judgement.names.items()
    ]
    return Figure(panels)


def errors(judgement: Judgement, pictures: dict[int, bytes]) -> Figure:
    """Images with what a trial got wrong in them. `pictures` are JPEGs, by the image's place."""
    panels = []
    for image, data in pictures.items():
        wrong = [verdict for verdict in judgement.of(image) if verdict.is_wrong]
        lines = [
            f"{_word(one.true)} {100 * one.probability_of_true:.0f} %, not {_word(one.predicted)}"
            for one in wrong
        ]
        title = f"Image {judgement.images[image]}"
        panels.append(Panel(title, "", "", note="\n".join(lines), picture=data))
    return Figure(panels, strokes="the share is the probability that the true attribute got")
