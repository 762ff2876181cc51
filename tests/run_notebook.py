"""Runs a notebook's code cells in a plain Python process; with --write their outputs go into the file.

    python -m tests.run_notebook docs/notebook.ipynb --write

Prints the kinds of each cell's outputs, and fails as a cell fails. Nothing of Jupyter's is needed.
--write needs Chromium, which draws Plotly's figures as .png.
"""

import ast
import base64
import contextlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

COLORS, WIDTH = 64, 900  # of a figure; the width in pixels


def outputs(source, names, number, draw):
    """What Jupyter would show of a code cell: what it prints, and its last expression."""
    body = ast.parse(source).body
    last = ast.Expression(body.pop().value) if isinstance(body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), f"cell {number}", "exec"), names)
        if last is not None:
            value = eval(compile(last, f"cell {number}", "eval"), names)
    if printed.getvalue():
        yield {"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())}
    if value is not None:
        data = {"text/plain": lines(repr(value))}
        if hasattr(value, "to_plotly_json"):
            data = {"image/png": draw(value), "text/plain": ["a figure of Plotly's"]}
        elif hasattr(value, "_repr_html_"):
            data |= {"text/html": lines(value._repr_html_())}
        yield {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data}


def lines(text):
    return text.splitlines(keepends=True)


def png(figure):
    """A Plotly figure as Chromium draws it, in base64."""
    with tempfile.TemporaryDirectory() as folder:
        page, picture = Path(folder, "figure.html"), Path(folder, "figure.png")
        figure.write_html(page)
        command = [shutil.which("chromium"), "--headless", "--no-sandbox", "--virtual-time-budget=9000"]
        size = f"--window-size={WIDTH},{figure.layout.height + 20}"
        command += [size, "--hide-scrollbars", f"--screenshot={picture}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        small = io.BytesIO()
        Image.open(picture).convert("RGB").quantize(COLORS).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main(path, write=False):
    notebook, names = json.loads(path.read_text("utf-8")), {}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        shown = [*outputs("".join(cell["source"]), names, number, png if write else lambda _: "")]
        cell |= {"execution_count": number, "outputs": shown}
        print(json.dumps([sorted(one.get("data", {"stdout": 0})) for one in shown]), flush=True)
    if write:
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--write" in sys.argv)
