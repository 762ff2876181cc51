"""Draws a figure as a .png or .svg file, with Matplotlib, which needs no browser."""

import io
import logging
import math
import warnings
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from dashboards.charts import GREY, Figure, Matrix, Panel, Series

log = logging.getLogger(__name__)

MOST_NUMBERS = 40  # attributes of a category whose matrix has its numbers written into it
DARK = 0.6  # share of a matrix's row from which its cell is too dark for black letters


def draw(figure: Figure, title: str, path: Path, source: str) -> None:
    """Draw into a .png or .svg file. `source`, unless it is empty, goes into the file's metadata.

    Names are not read as mathematics. A letter that the font lacks becomes a box, with a warning.
    """
    with warnings.catch_warnings(record=True) as caught, rc_context({"text.parse_math": False}):
        warnings.filterwarnings("always", "Glyph")
        _draw_file(figure, title, path, source)
    if caught:
        log.warning("the font of .png and .svg lacks letters of these names; an .html file shows them")


def _draw_file(figure: Figure, title: str, path: Path, source: str) -> None:
    columns = 2 if len(figure.panels) == 4 else min(len(figure.panels), 3)
    width, height = 4.6, 7.0 if any(panel.tall for panel in figure.panels) else 3.2  # inches, of a panel
    if any(panel.picture for panel in figure.panels):
        columns, width, height = min(len(figure.panels), 6), 2.2, 3.6
    rows = math.ceil(len(figure.panels) / columns)
    canvas = Canvas(figsize=(width * columns + 0.4, height * rows + 1.1), layout="constrained")
    FigureCanvasAgg(canvas)
    canvas.suptitle(title, fontweight="bold")
    for number, panel in enumerate(figure.panels, 1):
        _draw_panel(canvas.add_subplot(rows, columns, number), panel)
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


def _draw_panel(axes: Any, panel: Panel) -> None:
    text = panel.title + (f"\n{panel.note}" if panel.note else "")
    if panel.picture is not None:
        axes.imshow(Image.open(io.BytesIO(panel.picture)))
        axes.set_axis_off()
        axes.set_title(text, fontsize=7, y=-0.05, va="top")
        return
    axes.set_title(text, fontsize=10)
    if panel.matrix is not None:
        _draw_matrix(axes, panel, panel.matrix)
        return
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for series in panel.series:
        _draw_series(axes, series)
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


def _draw_matrix(axes: Any, panel: Panel, matrix: Matrix) -> None:
    shares = matrix.shares
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    places = range(len(matrix.names))
    axes.set_xticks(places, matrix.names, rotation=45, ha="right", fontsize=7)
    axes.set_yticks(places, matrix.names, fontsize=7)
    axes.set(xlabel=panel.x, ylabel=panel.y)
    for i, row in enumerate(matrix.counts if len(matrix.names) <= MOST_NUMBERS else []):
        for j, count in enumerate(row):
            color = "white" if shares[i][j] > DARK else "black"
            axes.text(j, i, count, ha="center", va="center", fontsize=7, color=color)


def _draw_series(axes: Any, series: Series) -> None:
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
