"""Turns a figure into a file of any kind, or into data that Plotly's script draws on a page."""

import base64
import html
import importlib.resources
import math
import os
import uuid
from pathlib import Path
from typing import Any

import jinja2

from dashboards.charts import GREY, PALETTE, Figure, Matrix, Panel, Series

FORMATS = (".png", ".svg", ".html")


def plotly(panel: Panel) -> dict[str, Any]:
    """A panel as data and layout for Plotly's script. The page adds the colours of its theme."""
    if panel.matrix is not None:
        return _heatmap(panel, panel.matrix)
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
    if panel.tall:  # horizontal bars, so that their names can be read
        x_axis, value_axis = value_axis, {**axis, "autorange": "reversed"}
    return {
        "data": [_trace(series, panel) for series in panel.series],
        "layout": {
            "xaxis": x_axis,
            "yaxis": value_axis,
            "showlegend": False,
            "hovermode": "closest",
            "uirevision": "kept",  # so that an update keeps the zoom
            "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
            **({"height": 26 * len(panel.series[0].x) + 60} if panel.tall else {}),
        },
    }


def _heatmap(panel: Panel, matrix: Matrix) -> dict[str, Any]:
    names = [html.escape(name, quote=False) for name in matrix.names]
    axis = {"automargin": True, "showgrid": False, "zeroline": False}
    trace = {
        "type": "heatmap",
        "x": names,
        "y": names,
        "z": matrix.shares,
        "zmin": 0,
        "zmax": 1,
        "text": matrix.counts,
        "texttemplate": "%{text}",
        "colorscale": [[0, "#f6f7f9"], [1, PALETTE[0]]],
        "showscale": False,
        "hovertemplate": "%{y}, said %{x}: %{text}, %{z:.0%}<extra></extra>",
    }
    return {
        "data": [trace],
        "layout": {
            "xaxis": {**axis, "title": {"text": panel.x}},
            "yaxis": {**axis, "title": {"text": panel.y}, "autorange": "reversed"},
            "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        },
    }


def _trace(series: Series, panel: Panel) -> dict[str, Any]:
    # JSON has no NaN. Nobody sees more than six digits.
    y = [round(value, 6) if math.isfinite(value) else None for value in series.y]
    if series.style == "bars":
        assert series.errors is not None
        below, above = series.errors
        bounds = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
        return {
            "type": "bar",
            "orientation": "h",
            "x": y,
            "y": [html.escape(name, quote=False) for name in series.x],  # Plotly interprets tags
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


def save(figure: Figure, title: str, path: Path, source: str = "", suffix: str = "") -> None:
    """Draw a figure into a file of one of FORMATS. The file appears only when it is whole.

    `source` is hidden in the file and says which study it comes from. `suffix` says the format if the
    path does not. Raises OSError.
    """
    suffix = suffix or path.suffix
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}{suffix}")
    try:
        if suffix == ".html":
            new.write_text(_page(figure, title, source), encoding="utf-8")
        else:
            from dashboards import picture  # late: Matplotlib takes half a second, and pages need none

            picture.draw(figure, title, new, source)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _page(figure: Figure, title: str, source: str) -> str:
    """The figure as a single HTML file, which has Plotly's script in it."""
    templates = jinja2.Environment(loader=jinja2.PackageLoader("dashboards"), autoescape=True)
    templates.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return templates.get_template("file.html").render(
        title=title,
        source=source,
        figure=figure,
        drawings=[plotly(panel) for panel in figure.panels if panel.picture is None],
        script=plotly_script().decode(),
    )


def plotly_script() -> bytes:
    """The script that draws what `plotly` returns, from Plotly's Python package."""
    return (importlib.resources.files("plotly") / "package_data" / "plotly.min.js").read_bytes()
