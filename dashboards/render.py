"""Draws figures: as data for Plotly's script on our pages, and into .png, .svg and .html files."""

import html
import logging
import math
import os
import warnings
from pathlib import Path
from typing import Any

import jinja2

from dashboards.charts import GREY, Figure, Panel, Series

log = logging.getLogger(__name__)

FORMATS = (".png", ".svg", ".html")


def plotly(panel: Panel) -> dict[str, Any]:
    """A panel for Plotly's script: data and layout. The page adds the colours of its theme."""
    axis = {"automargin": True, "zeroline": False}
    value_axis: dict[str, Any] = {**axis, "title": {"text": panel.y}}
    if panel.percent:
        value_axis["tickformat"] = ".1~%"
    if panel.range:
        value_axis["range"] = list(panel.range)
    x_axis: dict[str, Any] = {**axis, "title": {"text": panel.x}}
    if panel.epochs > 1:
        step = {"dtick": 1} if panel.epochs <= 10 else {}
        x_axis |= {"range": [1, panel.epochs], "tickformat": "d", **step}
    elif not panel.epochs:
        x_axis["rangemode"] = "tozero"
    if panel.tall:  # bars lie, so that their names can be read
        x_axis, value_axis = value_axis, {**axis, "autorange": "reversed"}
    return {
        "data": [_trace(series, panel) for series in panel.series],
        "layout": {
            "xaxis": x_axis,
            "yaxis": value_axis,
            "showlegend": False,
            "hovermode": "closest",
            "uirevision": "kept",  # an update keeps the zoom
            "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
            **({"height": 26 * len(panel.series[0].x) + 60} if panel.tall else {}),
        },
    }


def _trace(series: Series, panel: Panel) -> dict[str, Any]:
    # JSON has no NaN; more digits nobody sees.
    y = [round(value, 6) if math.isfinite(value) else None for value in series.y]
    if series.style == "bars":
        assert series.errors is not None
        below, above = series.errors
        bounds = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
        return {
            "type": "bar",
            "orientation": "h",
            "x": y,
            "y": [html.escape(name, quote=False) for name in series.x],  # Plotly reads tags
            "error_x": bounds | {"thickness": 1.2, "width": 3, "color": GREY},
            "marker": {"color": series.colors},
            "hovertemplate": "%{y}: %{x:.1%}<extra></extra>",
        }
    label = html.escape(series.label, quote=False)
    number = "%{y:.1%}" if panel.percent else "%{y:.4~g}"
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": series.label,
        "x": series.x,
        "y": y,
        "opacity": 0.3 if series.faint else 1,
        "hovertemplate": f"{label}<br>{panel.x} %{{x:.4~g}}<br>{number}<extra></extra>",
    }
    if series.style in ("points", "rings"):
        hollow = "-open" if series.style == "rings" else ""
        trace["mode"] = "markers"
        trace["marker"] = {"color": series.color, "size": 8, "symbol": f"circle{hollow}"}
        trace["text"] = series.notes
        trace["hovertemplate"] = f"%{{text}}: {number}<extra></extra>"
    else:
        trace["mode"] = "lines+markers" if len(y) == 1 or series.cut else "lines"
        if series.cut:
            trace["marker"] = {"symbol": "x", "size": [0] * (len(y) - 1) + [7], "color": series.color}
        trace["line"] = {
            "color": series.color,
            "width": 1.2 if series.faint else 2.2,
            "dash": "dash" if series.style == "dashed" else "solid",
            "shape": "hv" if series.style == "steps" else "linear",
        }
    return trace


def save(figure: Figure, title: str, path: Path, source: str = "") -> None:
    """Draw a figure into a file; its ending says how. The file is whole or not there. Raises OSError.

    `source` is where it comes from, which the file says unseen.
    """
    new = path.with_name(f".{path.name}.new{path.suffix}")
    try:
        if path.suffix == ".html":
            new.write_text(_page(figure, title, source), encoding="utf-8")
        else:
            _draw_plainly(figure, title, new, source)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _page(figure: Figure, title: str, source: str) -> str:
    """One file that any browser shows, with Plotly's script in it."""
    from plotly.offline import get_plotlyjs

    templates = jinja2.Environment(loader=jinja2.PackageLoader("dashboards"), autoescape=True)
    return templates.get_template("file.html").render(
        title=title,
        source=source,
        figure=figure,
        drawings=[plotly(panel) for panel in figure.panels],
        script=get_plotlyjs(),
    )


def _draw_plainly(figure: Figure, title: str, path: Path, source: str) -> None:
    """With names as they are: none is mathematics, and the font need not have all letters."""
    from matplotlib import rc_context

    with warnings.catch_warnings(record=True) as caught, rc_context({"text.parse_math": False}):
        warnings.filterwarnings("always", "Glyph")
        _draw_file(figure, title, path, source)
    if caught:
        log.warning("the font of .png and .svg lacks letters of these names; an .html file shows them")


def _draw_file(figure: Figure, title: str, path: Path, source: str) -> None:
    """With Matplotlib, which needs no browser."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    columns = 2 if len(figure.panels) == 4 else min(len(figure.panels), 3)
    rows = math.ceil(len(figure.panels) / columns)
    tall = any(panel.tall for panel in figure.panels)
    canvas = Canvas(
        figsize=(4.6 * columns + 0.4, (7.0 if tall else 3.2) * rows + 1.1), layout="constrained"
    )
    FigureCanvasAgg(canvas)
    canvas.suptitle(title, fontweight="bold")
    for number, panel in enumerate(figure.panels, 1):
        axes = canvas.add_subplot(rows, columns, number)
        axes.set_title(panel.title + (f"\n{panel.note}" if panel.note else ""), fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for series in panel.series:
            _draw(axes, series)
        if panel.epochs:
            axes.set_xlim(0.5, panel.epochs + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        elif not panel.tall:
            axes.set_xlim(left=0)
        value_axis = axes.xaxis if panel.tall else axes.yaxis
        axes.set_xlabel(panel.y if panel.tall else panel.x)
        axes.set_ylabel("" if panel.tall else panel.y)
        if panel.percent:
            value_axis.set_major_formatter(PercentFormatter(1.0))
        if panel.range:
            (axes.set_xlim if panel.tall else axes.set_ylim)(*panel.range)
    handles = [Line2D([], [], color=color, lw=3, label=label) for label, color in figure.legend]
    if handles:
        canvas.legend(
            handles=handles,
            title=figure.strokes or None,
            loc="outside lower center",
            ncols=min(len(handles), 3 * columns),
            fontsize=8,
            title_fontsize=8,
            frameon=False,
        )
    canvas.savefig(path, dpi=150, metadata={"Source": source} if source else None)


def _draw(axes: Any, series: Series) -> None:
    if series.style == "bars":
        axes.barh(series.x, series.y, xerr=series.errors, color=series.colors, ecolor=GREY)
        axes.invert_yaxis()
        axes.tick_params("y", labelsize=7)
    elif series.style in ("points", "rings"):
        face = "none" if series.style == "rings" else series.color
        axes.scatter(series.x, series.y, s=22, facecolors=face, edgecolors=series.color)
    else:
        axes.plot(
            series.x,
            series.y,
            color=series.color,
            linestyle="--" if series.style == "dashed" else "-",
            drawstyle="steps-post" if series.style == "steps" else "default",
            linewidth=0.8 if series.faint else 1.6,
            alpha=0.3 if series.faint else 1.0,
            marker="x" if series.cut else "o" if len(series.x) == 1 else None,
            markevery=[-1] if series.cut else None,
        )
