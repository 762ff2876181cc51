"""Draws a figure as one object of Plotly's, for notebooks."""

import base64
import html
import math
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dashboards.charts import Figure, Panel
from dashboards.render import plotly

HEIGHT, BETWEEN = 320, 130  # pixels: of a panel, and of the titles between two
PICTURE = 200  # pixels: the height of a photograph
LETTERS, SMALL = 12, 9  # pixels: of a panel's title, and of a photograph's


def plotly_figure(figure: Figure, title: str) -> go.Figure:
    """The panels side by side, as many in a row as fit, below a title and beside a legend."""
    pictures = figure.panels[0].picture is not None
    columns = min(len(figure.panels), 4 if pictures else 2)
    rows = math.ceil(len(figure.panels) / columns)
    drawings = [_picture(panel.picture) if panel.picture else plotly(panel) for panel in figure.panels]
    height = rows * (max(one["layout"].get("height", HEIGHT) for one in drawings) + BETWEEN)
    drawn = make_subplots(
        rows,
        columns,
        subplot_titles=[*map(_title, figure.panels)],
        vertical_spacing=BETWEEN / height,
        horizontal_spacing=0.3 / columns,  # of a row
    )
    for number, drawing in enumerate(drawings):
        place = {"row": number // columns + 1, "col": number % columns + 1}
        for trace in drawing["data"]:
            drawn.add_trace(trace, **place)
        drawn.update_xaxes(drawing["layout"]["xaxis"], **place)
        drawn.update_yaxes(drawing["layout"]["yaxis"], **place)
    if figure.legend:
        drawn.update_traces(showlegend=False)  # a line for each label follows
    for label, color in figure.legend:
        line = {"mode": "lines", "x": [None], "y": [None], "line": {"color": color, "width": 3}}
        drawn.add_trace({"type": "scatter", "name": html.escape(label, quote=False), **line})
    drawn.update_annotations(font_size=SMALL if pictures else LETTERS)
    drawn.update_layout(
        title={"text": html.escape(title, quote=False), "subtitle": {"text": figure.strokes}},
        template="plotly_white",
        height=height,
        margin={"t": BETWEEN + 50},
        showlegend=bool(figure.legend),
        hovermode="closest",
    )
    return drawn


def _title(panel: Panel) -> str:
    text = "\n".join(filter(None, (panel.title, panel.note)))
    return html.escape(text, quote=False).replace("\n", "<br>")


def _picture(jpeg: bytes) -> dict[str, Any]:
    source = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    hidden = {"visible": False}
    return {
        "data": [{"type": "image", "source": source, "hoverinfo": "skip"}],
        "layout": {"xaxis": hidden, "yaxis": hidden, "height": PICTURE},
    }
