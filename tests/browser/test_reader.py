"""What a page leaves to the person who reads it, and the browser's own ways."""

import csv
import json
import shutil
from random import Random

import pytest
import sqlalchemy as sa
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from storage import optuna_storage
from tests import studies
from tests.browser.conftest import SCREENSHOTS, ask_again, browsing, drawn, log_in, wait_until
from tests.conftest import PASSWORD
from tests.studies import fill

STATES = ["complete", "complete", "failed", "running", "waiting"] + ["complete", "pruned"] * 8
LINE = (
    "2026-01-01 10:00:{:02}+0000 INFO trial 0: {}, a line that is longer than a small screen is wide\n"
)
A4 = 703  # pixels, between the margins


class Live:
    """A study that goes on when it is told to."""

    def __init__(self, site):
        self.log = site.home / "slurm" / "7_1.log"
        self.log.parent.mkdir(exist_ok=True)
        self.log.write_text("".join(LINE.format(second, "a step") for second in range(60)))
        self.id = fill(site.engine, STATES, name="live", log=str(self.log))
        self.page = f"{site.base}/atelier/studies/{self.id}"
        self._engine, self._turn = site.engine, 0

    def go_on(self, page):
        """Trial 0 becomes the best of all, or the last, and the log a line longer. The page follows."""
        self._turn += 1
        accuracy = 0.5 + self._turn / 1000 if self._turn % 2 else 0.01 + self._turn / 1000
        with self._engine.begin() as connection:
            it = "trial_id = (SELECT trial_id FROM trials WHERE study_id = :study AND number = 0)"
            for statement in (
                f"UPDATE trial_values SET value = :value WHERE {it}",
                f"UPDATE atelier.epoch SET val_accuracy = :value WHERE epoch = 29 AND {it}",
                "UPDATE atelier.attempt SET renewed = renewed - interval '1 s' WHERE released IS NULL",
            ):
                connection.execute(sa.text(statement), {"value": 2 * accuracy, "study": self.id})
        with self.log.open("a") as file:
            file.write(LINE.format(self._turn, "another step"))
        ask_again(page)


@pytest.fixture(scope="module")
def live(site):
    return Live(site)


@pytest.fixture
def plain(seen):
    """A page without the script that draws, which takes longer than all the rest."""
    seen.route("**/plotly.js", lambda route: route.abort())
    return seen


SELECTED = "getSelection().toString()"
SELECT = "(first, last = first) => getSelection().setBaseAndExtent(first, 0, last, last.length)"

# (page, what the reader does, how it is seen)
READERS = {
    "the focus of a link in a row that moves": (
        "",
        "document.querySelector('#trial-0 a').focus()",
        "document.activeElement.closest('tr')?.id",
    ),
    "the focus of the link to the best": (
        "",
        "document.querySelector('#facts a').focus()",
        "document.activeElement.closest('#facts') !== null",
    ),
    "a selection in a row that moves": (
        "",
        f"({SELECT})(document.querySelector('#trial-0 a').firstChild)",
        f"{SELECTED} + getSelection().anchorNode.parentNode.closest('tr')?.id",
    ),
    "a selection over rows that stay": (
        "",
        f"({SELECT})(...[5, 11].map((n) => document.querySelector(`#trial-${{n}} a`).firstChild))",
        "['anchorNode', 'focusNode'].map((end) => getSelection()[end].parentNode.closest('tr')?.id)",
    ),
    "a selection beside what changes": (
        "",
        f"({SELECT})(document.querySelector('#workers td').firstChild)",
        SELECTED,
    ),
    "how far the page is scrolled": ("", "scrollTo(0, 700)", "scrollY > 500 && scrollY"),
    "how far a table is scrolled": (
        "",
        "document.querySelector('#trials .scroll').scrollLeft = 123",
        "document.querySelector('#trials .scroll').scrollLeft",
    ),
    "a box that is ticked and not sent": (
        "",
        "document.querySelector('[value=failed]').click()",
        "document.querySelector('[value=failed]').checked",
    ),
    "what is being typed, and its selection": (
        "/curves",
        "(() => { const field = document.querySelector('[name=trials]'); field.focus();"
        " field.value = '3, 5-9'; field.setSelectionRange(2, 5); })()",
        "['name', 'value', 'selectionStart', 'selectionEnd'].map((key) => document.activeElement[key])",
    ),
    "a slider that was moved": (
        "/curves",
        "document.querySelector('[name=smooth]').value = 35",
        "document.querySelector('[name=smooth]').value",
    ),
    "the focus of a trial that is drawn": (
        "/curves",
        "document.querySelector('#chosen a:nth-child(3)').focus()",
        "document.activeElement.id",
    ),
    "a parameter that is chosen and not sent": (
        "/compare",
        "document.querySelector('[name=by]').value = 'lr'",
        "document.querySelector('[name=by]').value",
    ),
    "settings that are unfolded": (
        "/trials/0",
        "document.querySelector('#settings').open = true",
        "document.querySelector('#settings').open",
    ),
    "a reason that is unfolded": (
        "/trials/2",
        "document.querySelector('#attempt-1 details').open = true",
        "document.querySelector('#attempt-1 details').open",
    ),
    "a selection in a log that goes on": (
        "/trials/0",
        "(() => { const log = document.querySelector('.log').firstChild;"
        " const end = log.data.lastIndexOf('INFO');"
        " getSelection().setBaseAndExtent(log, end - 100, log, end); })()",
        SELECTED,
    ),
    "how far a log is scrolled": (
        "/trials/0",
        "document.querySelector('.log').scrollLeft = 99",
        "document.querySelector('.log').scrollLeft",
    ),
    "the focus of a log": (
        "/trials/0",
        "document.querySelector('.log').focus()",
        "document.activeElement.className",
    ),
}


@pytest.mark.parametrize("path", list(dict.fromkeys(path for path, _, _ in READERS.values())))
def test_a_page_that_follows_the_workers_leaves_the_reader_his_own(request, live, path):
    page = request.getfixturevalue("plain" if path else "seen")
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(live.page + path)
    if not path:
        drawn(page)
    page.evaluate("window.sameDocument = true")
    for name, (_, act, look) in READERS.items():
        if READERS[name][0] != path:
            continue
        page.evaluate(f"{act}; 0")
        before = page.evaluate(look)
        assert before, name
        texts = {page.inner_text("main")}
        for _ in range(2):
            live.go_on(page)
            texts.add(page.inner_text("main"))
        assert len(texts) > 1, name
        assert page.evaluate(look) == before, name
    assert page.evaluate("window.sameDocument")


def test_what_is_mended_is_what_was_sent(plain, live):
    """Any page becomes like any other: parts with ids and without come, go, move and change."""
    random = Random(0)

    def part(depth):
        name = random.choice(["p", "div", "section", "details"])
        marks = random.choice(["", "", " class=note", " title=x", " class=state hidden"])
        words = random.choice(["", " ", "one\ntwo\n", "two\nthree\n"])
        parts = [part(random.randrange(depth)) for _ in "123"] if depth else []
        return f"<{name}{marks}>{words.join(['', *parts, ''])}</{name}>"

    def tree():
        rows = random.sample(range(8), random.randint(0, 8))
        some = [f"<div id=row-{row}>{part(1)}</div>" for row in rows] + [part(2) for _ in "12"]
        random.shuffle(some)
        return "".join(some)

    pairs = [[tree(), tree()] for _ in range(300)]
    plain.goto(f"{live.page}/compare")
    wrong = plain.evaluate(
        """(pairs) => pairs.filter(([old, fresh]) => {
            const parse = (text) => new DOMParser().parseFromString(text, 'text/html').body;
            const [one, other] = [parse(old), parse(fresh)];
            mend(one, other);
            one.normalize();
            return one.innerHTML !== other.innerHTML;
        })""",
        pairs,
    )
    assert wrong == []


def test_parts_that_come_and_go_need_no_reload(seen, site):
    """A study's figure appears with its first end, its workers go, a filtered row leaves."""
    study = fill(site.engine, ["running", "waiting"], name="coming")
    seen.goto(f"{site.base}/atelier/studies/{study}?state=running")
    seen.evaluate("window.sameDocument = true")
    seen.locator("#trials button").focus()
    assert seen.locator(".plot").count() == 0
    storage = optuna_storage.optuna_storage(site.engine)
    with site.engine.begin() as connection:
        connection.execute(
            sa.text(
                "UPDATE atelier.attempt SET outcome = 'failed', released = now() WHERE study_id = :id"
            ),
            {"id": study},
        )
    for trial in storage.get_all_trials(study):
        storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    ask_again(seen)
    assert drawn(seen) == 2
    assert "No worker is at work now" in seen.inner_text("#workers")
    assert "No trial in these states" in seen.inner_text("#trials")
    storage.delete_study(study)
    ask_again(seen)
    assert "no such study" in seen.inner_text("#trouble")
    assert drawn(seen) == 2  # what was there can still be read
    assert seen.evaluate("window.sameDocument && document.activeElement.textContent") == "Show"


def test_a_page_asks_when_somebody_comes_back_to_it_and_not_while_he_presses(plain, live):
    plain.goto(live.page)
    assert plain.evaluate("(document.dispatchEvent(new Event('visibilitychange')), busy)")
    plain.mouse.move(300, 300)
    plain.mouse.down()
    wait_until(lambda: plain.evaluate("!busy"))
    assert not plain.evaluate("(follow(), busy)")
    plain.mouse.up()
    assert plain.evaluate("(follow(), busy)")


def test_an_older_page_learns_who_looks_now(chromium, site):
    with browsing(chromium, storage_state=site.cookies) as page:
        page.goto(f"{site.base}/atelier/")
        assert "vera, viewer" in page.inner_text("header")
        other = page.context.new_page()
        log_in(other, site, "ed")
        other.wait_for_url(f"{site.base}/atelier/")
        ask_again(page)
        assert "ed, editor" in page.inner_text("header")
        other.click("text=Log out")
        other.wait_for_url(f"{site.base}/login")
        ask_again(page)
        assert "session has ended" in page.inner_text("#trouble")


def test_a_plot_keeps_the_part_that_is_looked_at(seen, live):
    seen.goto(f"{live.page}/curves?trials=0-3")
    drawn(seen)
    box = seen.locator("#curves-1 .nsewdrag").first.bounding_box()
    x, y = box["x"], box["y"] + box["height"] / 2
    seen.mouse.move(x + 0.2 * box["width"], y)
    seen.mouse.down()
    seen.mouse.move(x + 0.5 * box["width"], y, steps=3)
    seen.mouse.up()
    look = "document.getElementById('curves-1').layout.xaxis.range"
    wait_until(lambda: seen.evaluate(look) != [1, 30])
    before = seen.evaluate(look)
    live.go_on(seen)
    assert seen.evaluate(look) == before


def is_in_view(page, place):
    box = page.locator(place).bounding_box()
    return box["y"] >= 0 and box["y"] + box["height"] <= page.viewport_size["height"]


def test_that_nobody_answers_is_in_view_wherever_one_reads(plain, live):
    plain.goto(live.page)
    for width in (1440, 390):
        plain.set_viewport_size({"width": width, "height": 700})
        plain.evaluate("scrollTo(0, document.body.scrollHeight)")
        plain.route(live.page, lambda route: route.abort())
        ask_again(plain)
        assert "does not answer" in plain.inner_text("#trouble")
        assert is_in_view(plain, "#trouble")
        plain.screenshot(path=SCREENSHOTS / f"no-answer-{width}.png")
        plain.unroute(live.page)
        ask_again(plain)
        assert "does not answer" not in plain.inner_text("#trouble")


def test_what_is_not_understood_or_absent_is_said_in_view(plain, live):
    for address in ("/curves?trials=x", "/compare?trials=0,99", "?state=failled"):
        plain.goto(live.page + address)
        for width in (1440, 390):
            plain.set_viewport_size({"width": width, "height": 700})
            assert is_in_view(plain, "#said"), address


# Page: what is set before the filter is sent, and how it is seen.
FILTERS = {
    "": (
        "document.querySelector('[value=failed]').click()",
        "[document.querySelector('[value=failed]').checked]",
    ),
    "/curves": (
        "document.querySelector('[name=smooth]').value = 35;"
        " document.querySelector('[name=trials]').value = '1-2'",
        "['smooth', 'trials'].map((name) => document.querySelector(`[name=${name}]`).value)",
    ),
    "/compare": (
        "document.querySelector('[name=by]').value = 'lr'",
        "[document.querySelector('[name=by]').value]",
    ),
}


def test_back_shows_the_filter_of_the_page_that_it_shows(plain, live):
    for path, (act, look) in FILTERS.items():
        plain.goto(live.page + path)
        before = plain.evaluate(look)
        plain.evaluate(f"{act}; 0")
        plain.click("button:has-text('Show')")
        plain.wait_for_url(f"{live.page}{path}?*")
        after = plain.evaluate(look)
        assert all(one != other for one, other in zip(before, after, strict=True))
        plain.go_back()
        assert (plain.url, plain.evaluate(look)) == (live.page + path, before)
        plain.go_forward()
        assert plain.evaluate(look) == after


def test_a_page_that_the_browser_kept_is_set_right_when_it_comes_back(plain, live):
    """As Firefox and Safari keep every page; this Chromium keeps none while it is driven."""
    plain.goto(live.page)
    plain.check("[value=failed]")
    plain.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))")
    assert not plain.is_checked("[value=failed]")


def test_without_a_script_the_numbers_can_be_read(chromium, site, live):
    with browsing(chromium, storage_state=site.cookies, java_script_enabled=False) as page:
        for path in ("", "/curves", "/compare", "/trials/0"):
            page.goto(live.page + path)
            word = page.locator("noscript p").first
            assert word.is_visible()
            assert "drawn by a script, and this browser runs none" in word.inner_text()
            assert not page.locator(".plot").first.is_visible()
            assert page.get_by_role("link", name="Download as CSV").last.is_visible()
            page.screenshot(path=SCREENSHOTS / f"no-script{path.replace('/', '-')}.png", full_page=True)


def test_a_page_says_that_its_script_for_figures_did_not_arrive(plain, live):
    plain.goto(f"{live.page}/curves")
    assert "did not arrive" in plain.inner_text("#trouble")
    ask_again(plain)
    assert "did not arrive" in plain.inner_text("#trouble")


@pytest.fixture(scope="module")
def wide(site):
    """A study with more hyperparameters than a page is wide."""
    many = {f"a_parameter_with_a_name_{number}": FloatDistribution(0.001, 1000) for number in range(18)}
    log = site.home / "wide.log"
    log.write_text(LINE.format(1, "x" * 300))
    name = "a-study-with-a-rather-long-name-that-goes-on-and-on-and-on-until-it-is-too-wide"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "SPACE", studies.SPACE | many)
        study = fill(site.engine, ["complete", "failed", "running"] * 4, name=name, log=str(log))
    return f"{site.base}/atelier/studies/{study}"


@pytest.mark.parametrize("path", ["", "/curves", "/trials/2"])
def test_a_printed_page_has_everything_on_the_paper(seen, wide, path):
    seen.set_viewport_size({"width": 860, "height": 900})  # one plot a row, wider than the paper
    seen.goto(wide + path)
    drawn(seen)
    # At the moment when the browser lays it out for paper.
    seen.evaluate(
        "addEventListener('beforeprint', () => { window.plots = Math.max(0,"
        " ...[...document.querySelectorAll('.main-svg')].map((plot) => plot.clientWidth)) })"
    )
    paper = seen.pdf(format="A4", path=SCREENSHOTS / f"print{path.replace('/', '-')}.pdf")
    assert paper.startswith(b"%PDF")
    assert 0 < seen.evaluate("plots") <= A4
    drawn(seen)
    seen.set_viewport_size({"width": A4, "height": 1000})
    seen.emulate_media(media="print")
    right = seen.evaluate(
        "Math.max(...[...document.querySelectorAll('td, th, h1, pre, .note, .chips a')].map((one) =>"
        " one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).display !== 'inline'"
        " ? 9999 : one.getBoundingClientRect().right))"
    )
    assert right <= A4
    seen.screenshot(path=SCREENSHOTS / f"print{path.replace('/', '-')}.png", full_page=True)


def test_tables_are_saved_under_their_names(plain, site, live):
    plain.goto(live.page)
    with plain.expect_download() as download:
        plain.locator("#trials").get_by_role("link", name="Download as CSV").click()
    assert download.value.suggested_filename == "live-trials.csv"
    with open(download.value.path(), encoding="utf-8", newline="") as file:
        assert [int(row["number"]) for row in csv.DictReader(file)] == list(range(len(STATES)))
    study = fill(site.engine, ["complete"], name="größe 漢")
    with plain.expect_download() as download:
        plain.evaluate(f"location.href = '/csv/{study}'")
    assert download.value.suggested_filename == "größe-漢.csv"


def test_a_browser_that_keeps_no_cookies_is_told_so(site, live, chromium, tmp_path):
    """With Chromium's own setting, which belongs to a profile."""
    settings = tmp_path / "Default" / "Preferences"
    settings.parent.mkdir()
    settings.write_text(json.dumps({"profile": {"default_content_setting_values": {"cookies": 2}}}))
    context = chromium.browser_type.launch_persistent_context(
        tmp_path, executable_path=shutil.which("chromium"), args=["--no-sandbox"]
    )
    page = context.new_page()
    page.goto(live.page)
    page.fill("input[name=name]", "vera")
    page.fill("input[name=password]", PASSWORD)
    page.click("button")
    assert "this browser keeps no cookies of 127.0.0.1" in page.inner_text("[role=alert]")
    page.screenshot(path=SCREENSHOTS / "no-cookies.png")
    context.close()
