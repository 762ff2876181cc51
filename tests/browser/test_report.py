"""The report as a reader sees it."""

from search.report import write_report
from storage.studies import study_entry
from tests.browser.conftest import SCREENSHOTS
from tests.studies import fill


def test_the_report_is_one_readable_page(chromium, engine, home, tmp_path):
    name = "<b>bold</b><script>document.title='taken'</script>"
    fill(engine, ["complete", "pruned"] * 12, name=name)
    page_file = write_report(engine, study_entry(engine, name), tmp_path / "report")
    page = chromium.new_page(viewport={"width": 1100, "height": 900})
    page.goto(page_file.as_uri())
    assert page.title() == f"Study {name}"
    assert page.inner_text("h1") == f"Study {name}"
    images = page.evaluate("[...document.images].map((image) => image.naturalWidth)")
    assert len(images) == 5  # history, curves, three comparisons
    assert min(images) > 500
    headings = page.locator("h2").all_inner_texts()
    assert headings[0] == "Confirmation"
    assert headings[-1] == "Machines"
    cells = page.locator("td").all_inner_texts()
    assert {"learning rate", "label smoothing", "head", "node-1", "A100"} <= set(cells)
    assert "@" not in page.inner_text("body")
    page.screenshot(path=SCREENSHOTS / "report.png", full_page=True)
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()
