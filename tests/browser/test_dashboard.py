"""What people see and do in the dashboard."""

import os
import re
import signal
import ssl
import subprocess

import optuna
import psycopg2
import pytest
from axe_playwright_python.sync_playwright import Axe

from dashboards.note import leave_note
from search import forking
from search.cli.searching import work
from search.exit_codes import ExitCode
from search.study import open_study
from search.toml_file import load_study_file
from storage import optuna_storage, studies
from storage.status import read_status
from tests.browser.conftest import PATIENCE, SCREENSHOTS, ask_again, drawn, log_in, wait_until
from tests.conftest import PASSWORD, STUDY
from tests.studies import fill, predict
from trainer.dataset import read_dataset

MIXED = ["complete", "pruned", "failed", "running", "waiting"] + ["complete", "pruned"] * 12


def points(page, plot):
    """How many points the last line of a plot has."""
    return page.evaluate(f"document.getElementById('{plot}').data.at(-1).x.length")


def test_a_viewer_logs_in_and_cannot_delete(dashboard, page, engine):
    study = fill(engine, ["complete"])
    page.goto(f"{dashboard.base}/dashboard/studies/{study}")
    assert page.url.startswith(f"{dashboard.base}/login")
    log_in(page, dashboard, "vera", "wrong password")
    assert "Wrong name or password" in page.inner_text("[role=alert]")
    log_in(page, dashboard, "vera")
    page.wait_for_url(f"{dashboard.base}/atelier/")
    status = page.evaluate(
        f"fetch('/api/studies/{study}', {{method: 'DELETE', body: '{{}}'}}).then((r) => r.status)"
    )
    assert status == 403
    assert studies.study_entry(engine, "filled") is not None
    page.click("text=filled")
    drawn(page)
    page.click("text=Log out")
    page.wait_for_url(f"{dashboard.base}/login")
    page.goto(f"{dashboard.base}/atelier/")
    assert "/login" in page.url


def test_optuna_dashboards_own_delete_button_is_refused(dashboard, page, engine):
    fill(engine, ["complete"], name="precious")
    log_in(page, dashboard, "vera")
    page.goto(f"{dashboard.base}/dashboard")
    page.locator("button:has([data-testid=DeleteIcon])").first.click()
    page.get_by_role("button", name="Yes").click()
    page.get_by_text("Failed to delete study").wait_for()
    assert studies.study_entry(engine, "precious") is not None


def test_optuna_dashboards_study_page_opens_through_the_login(dashboard, page, engine):
    study = fill(engine, MIXED, name="linked")
    storage = optuna_storage.optuna_storage(engine)
    leave_note(optuna.load_study(study_name="linked", storage=storage))
    log_in(page, dashboard, "vera")
    page.goto(f"{dashboard.base}/dashboard/studies/{study}")
    page.get_by_text("Hyperparameter Importance").first.wait_for()
    page.screenshot(path=SCREENSHOTS / "optuna-dashboard.png")
    page.goto(f"{dashboard.base}/dashboard/studies/{study}/note")
    page.get_by_role("link", name="curves").click()
    page.wait_for_url(f"{dashboard.base}/atelier/studies/{study}/curves")
    page.goto(f"{dashboard.base}/dashboard")
    page.get_by_role("link", name="Atelier’s pages").click()
    page.wait_for_url(f"{dashboard.base}/atelier/")


# Every page of ours, with the plots that it has: as it is, empty, and with what it says of an address.
PAGES = {
    "login": ("/login", 0),
    "studies": ("/atelier/", 0),
    "study": ("/atelier/studies/{study}", 2),
    "empty": ("/atelier/studies/{empty}", 0),
    "unknown-filter": ("/atelier/studies/{study}?state=failled", 2),
    "curves": ("/atelier/studies/{study}/curves?smooth=40", 9),
    "no-curves": ("/atelier/studies/{empty}/curves", 0),
    "absent-trials": ("/atelier/studies/{study}/curves?trials=0-2,99", 9),
    "compare": ("/atelier/studies/{study}/compare?by=dropout", 4),
    "trial": ("/atelier/studies/{study}/trials/0", 10),
    "failed-trial": ("/atelier/studies/{study}/trials/2", 10),
    "images": ("/atelier/studies/{study}/images", 0),
    "differing-images": ("/atelier/studies/{study}/images?trial=0&against=5&category=fit", 0),
    "no-images": ("/atelier/studies/{empty}/images", 0),
    "error": ("/atelier/nowhere", 0),
}
AUDITED = [(1440, "light"), (390, "dark")]
SHOWN = {"studies", "study", "curves", "compare", "trial", "images"}  # in every way


@pytest.fixture(scope="module")
def fashion(site, demo):
    """A study with a log, predictions and pictures, and an empty one."""
    log = site.home / "slurm" / "12_3.log"
    log.parent.mkdir(parents=True)
    log.write_text("2026-01-01 10:00:00+0000 INFO trial 0: attempt 1\n" * 9)
    study = fill(site.engine, MIXED, name="fashion", max_trials=60, log=str(log), data=demo)
    for trial in [number for number, state in enumerate(MIXED) if state == "complete"]:
        predict(studies.study_entry(site.engine, study), trial, read_dataset(demo), trial)
    return {"study": study, "empty": fill(site.engine, [], name="<b>empty</b> & more", max_trials=5)}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_our_pages_are_drawn_and_fit_and_are_accessible(site, seen, fashion, width, scheme):
    page = seen
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(f"{site.base}/atelier/")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", ground)[:3]))
    assert (brightness < 150) == (scheme == "dark")
    audited = (width, scheme) in AUDITED
    for name in PAGES if audited else SHOWN:
        path, plots = PAGES[name]
        page.goto(site.base + path.format(**fashion))
        assert drawn(page) == plots, name
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is too wide"
        assert page.locator("h1").count() == 1, name
        if audited:
            found = Axe().run(page).response["violations"]
            assert not found, (name, [(one["id"], one["nodes"][0]["html"]) for one in found])
        page.screenshot(path=SCREENSHOTS / f"{name}-{width}-{scheme}.png", full_page=True)


def test_filters_are_in_the_address(site, seen, fashion):
    page, study = seen, fashion["study"]
    page.goto(f"{site.base}/atelier/studies/{study}")
    page.check("label:has-text('failed') input")
    page.click("button:has-text('Show')")
    assert page.url.endswith("?state=failed")
    assert page.locator("#trials tbody tr").count() == 1
    page.goto(f"{site.base}/atelier/studies/{study}/curves")
    page.fill("input[name=trials]", "0, 1")
    page.click("button:has-text('Show')")
    assert drawn(page) == 9
    assert page.locator("#chosen a").count() == 2
    assert "trials=0%2C+1" in page.url


@pytest.fixture
def work_on(engine, home, demo, tmp_path):
    """Forks a real worker on a study that is open already. Returns its process."""
    path, log, workers = tmp_path / "study.toml", tmp_path / "worker.log", []

    def begin(text):
        text = text.replace("resnet10t", "test_resnet")  # timm's smallest
        path.write_text(text.replace("[train]", "[train]\ntrain_images = 64"))
        file = load_study_file(path)
        open_study(file, engine, optuna_storage.optuna_storage(engine), read_dataset(demo))

        def start():
            worker = forking.start(
                work, [str(path)], environment=os.environ | {"OMP_NUM_THREADS": "1"}, output=log
            )
            workers.append(worker)
            return worker

        return start

    yield begin
    for worker in workers:
        worker.kill()
        worker.join()


def end(worker):
    """As SLURM or a person does; it gives its trial back."""
    worker.terminate()
    worker.join(PATIENCE)
    assert worker.exitcode == ExitCode.STOPPED


def test_a_page_follows_a_worker_without_a_reload(dashboard, page, work_on, demo):
    start = work_on(STUDY.format(name="live", trials=1, size=32, epochs=5000, data=demo))
    log_in(page, dashboard, "vera")
    page.goto(f"{dashboard.base}/atelier/studies/1/curves")
    assert page.locator(".plot").count() == 0  # opened too early; it shows them by itself
    worker = start()
    page.locator("#curves-1 .main-svg").first.wait_for()
    page.goto(f"{dashboard.base}/atelier/studies/1/trials/0")
    drawn(page)
    page.evaluate("window.sameDocument = true")
    before = points(page, "curve-1")
    shown = page.inner_text("#head")
    wait_until(lambda: points(page, "curve-1") > before)
    assert page.evaluate("window.sameDocument")
    assert page.inner_text("#head") != shown
    end(worker)


def test_a_real_study_with_every_kind_of_trial(dashboard, page, engine, work_on, demo):
    text = STUDY.format(name="real", trials=12, size=32, epochs=30, data=demo)
    start = work_on(text.replace('strategy = "none"', 'strategy = "asha"\nrungs = [1]'))

    def counts():
        return read_status(engine, 1, "real").counts

    def has_every_kind():
        return all(counts()[state] for state in ("complete", "pruned", "running", "failed"))

    def stopped_with_every_kind():
        """Stops the worker when the time has come, so that it stays in work while we look."""
        if has_every_kind():
            os.kill(second.pid, signal.SIGSTOP)
            if has_every_kind():  # still
                return True
            os.kill(second.pid, signal.SIGCONT)
        return False

    first = start()
    wait_until(lambda: counts()["running"])
    end(first)
    assert counts()["waiting"] == 1
    # Nobody holds it, so an editor may give it up, in optuna-dashboard's way.
    log_in(page, dashboard, "ed")
    page.wait_for_url(f"{dashboard.base}/atelier/")
    tell = (
        "{method: 'POST', body: '{\"state\": \"Fail\"}', headers: {'Content-Type': 'application/json'}}"
    )
    assert page.evaluate(f"fetch('/api/trials/1/tell', {tell}).then((r) => r.status)") == 204
    second = start()
    wait_until(stopped_with_every_kind)
    assert counts()["failed"] == 1
    look_at_every_page(page, f"{dashboard.base}/atelier/studies/1", sum(counts().values()))
    os.kill(second.pid, signal.SIGCONT)
    end(second)


def look_at_every_page(page, study, trials):
    page.goto(study)
    shown = set(page.locator("#trials .state").all_inner_texts())
    assert {"running", "complete", "pruned", "failed"} <= shown
    for path, plots in (("", 2), ("/curves", 9), ("/compare?by=batch_size", None)):
        page.goto(study + path)
        assert drawn(page) == plots or plots is None
    for number in range(trials):
        page.goto(f"{study}/trials/{number}")
        drawn(page)
        if number == 1:
            assert page.locator(".plot").count() == 10  # with the bars of the attributes
    page.screenshot(path=SCREENSHOTS / "real-trial.png", full_page=True)


def test_a_page_says_when_its_study_is_gone_and_when_the_server_is(dashboard, page, engine):
    study = fill(engine, ["complete"])
    log_in(page, dashboard, "vera")
    page.goto(f"{dashboard.base}/atelier/studies/{study}")
    drawn(page)
    optuna_storage.optuna_storage(engine).delete_study(study)
    ask_again(page)
    page.get_by_text("There is no such study of Atelier's. It may have been deleted.").wait_for()
    page.goto(f"{dashboard.base}/atelier/")
    dashboard.stop()
    page.get_by_text("The dashboard does not answer").wait_for()


def test_a_page_of_an_error_asks_again_by_itself(dashboard, page, engine):
    study = fill(engine, ["complete"])
    log_in(page, dashboard, "vera")
    admin = psycopg2.connect(host=engine.url.query["host"], user="postgres", dbname="postgres")
    admin.autocommit = True
    cursor, name = admin.cursor(), engine.url.database
    try:
        cursor.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name]
        )
        page.goto(f"{dashboard.base}/atelier/studies/{study}")
        page.get_by_text("asks again by itself").wait_for()
    finally:
        cursor.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        admin.close()
    page.locator("#history-1 .main-svg").first.wait_for()


def test_the_first_start_prints_a_link_and_how_to_reach_it_on_a_cluster(page, start, engine, home):
    server = start()
    [link] = server.links
    assert re.search(r"ssh -N -L \d+:127\.0\.0\.1:\d+ \S+@\S+", server.log.read_text())
    page.goto(link)
    page.wait_for_url(f"{server.base}/atelier/")
    assert "by link, editor" in page.inner_text("header")
    page.context.clear_cookies()
    page.goto(link)
    assert "has been used" in page.inner_text("[role=alert]")
    page.goto(server.links[-1])
    page.wait_for_url(f"{server.base}/atelier/")


def test_everything_works_under_a_proxys_prefix(page, start, accounts, engine):
    """As Open OnDemand and JupyterHub serve it. Nothing may be asked for outside the prefix."""
    study = fill(engine, MIXED)
    server = start("--prefix", "/node/a-1/8080", prefix="/node/a-1/8080")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    log_in(page, server, "ed")
    page.wait_for_url(f"{server.base}/atelier/")
    page.goto(f"{server.base}/atelier/studies/{study}/trials/0")
    assert drawn(page) == 10
    page.get_by_role("link", name="optuna-dashboard").click()
    page.get_by_text("Hyperparameter Importance").first.wait_for()
    page.goto(f"{server.base}/dashboard/studies/{study}/trials")
    page.get_by_text("Trial 0").first.wait_for()
    page.goto(f"{server.base}/dashboard")
    page.get_by_text("filled").first.click()
    page.get_by_text("Hyperparameter Importance").first.wait_for()
    page.click("text=Atelier’s pages")
    page.click("text=Log out")
    page.wait_for_url(f"{server.base}/login")
    assert [url for url in asked if not url.startswith((server.base, "data:", "blob:"))] == []


def test_tls_by_certificate_files(page, start, accounts, engine, tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-nodes", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    server = start(
        "--certificate",
        str(certificate),
        "--key",
        str(key),
        context=ssl.create_default_context(cafile=str(certificate)),
        scheme="https",
    )
    log_in(page, server, "vera")
    page.wait_for_url(f"{server.base}/atelier/")
    [cookie] = page.context.cookies()
    assert cookie["secure"]
    assert PASSWORD not in server.log.read_text()
