"""The page of images, its thumbnails and its figures: what complete trials got right and wrong."""

import csv
import io
import re
import shutil
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix
from typer.testing import CliRunner

from dashboards import charts, render
from dashboards.plot import surest_errors
from dashboards.predictions import ALL, RIGHT, SHOWN, SURE, WRONG, Judgement
from dashboards.thumbnails import PicturesError
from dashboards.web.app import make_app
from dashboards.web.server import connect_roles
from search.cli import app as cli
from storage import database
from storage.paths import home as home_folder
from storage.studies import study_entry
from tests.conftest import copied_database, give_accounts
from tests.integration.test_dashboard import Client, log_in
from tests.studies import fill, predict
from trainer.dataset import read_dataset
from trainer.predictions import UNKNOWN, Predictions

runner = CliRunner()


class Judged(NamedTuple):
    """A viewer before a study of three trials, of which two are complete."""

    client: Any
    stranger: Any
    engine: Any
    entry: Any
    data: Any  # the data folder
    predictions: dict

    def get(self, path="", **query):
        """A page of the study's images."""
        return self.client.get(
            f"/atelier/studies/{self.entry.study_id}/images{path}", query_string=query
        )


@pytest.fixture(scope="module")
def judged(server, template, demo, tmp_path_factory):
    data = tmp_path_factory.mktemp("own") / "demo"
    shutil.copytree(demo, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATELIER_HOME", str(tmp_path_factory.mktemp("judged")))
        patch.setenv("ATELIER_DATABASE_URL", copied_database(server, "judged", template))
        accounts, engine = give_accounts(home_folder(), patch), database.connect()
        study = fill(engine, ["complete", "pruned", "complete"], name="judged", data=data)
        entry, dataset = study_entry(engine, study), read_dataset(data)
        connections = connect_roles()
        app = make_app(connections, accounts, b"k" * 32)
        app.test_client_class = Client
        yield Judged(
            log_in(app, "vera"),
            app.test_client(),
            engine,
            entry,
            data,
            {trial: predict(entry, trial, dataset, seed=trial) for trial in (0, 2)},
        )
    for one in (engine, *(role.engine for role in connections.values())):
        one.dispose()


def numbers(page):
    """The images that a page shows, in their order."""
    assert page.status_code == 200, page.text
    return [int(number) for number in re.findall(r'id="garment-(\d+)"', page.text)]


def rows(answer):
    assert answer.status_code == 200, answer.text
    return list(csv.DictReader(io.StringIO(answer.text.lstrip("\ufeff"))))


def test_a_confusion_matrix_is_that_of_scikit_learn(judged):
    judgement, predictions = Judgement.of_trial(judged.entry, 2), judged.predictions[2]
    table = rows(judged.get("/confusion.csv", trial=2))
    for column, (category, names) in enumerate(judgement.names.items()):
        true, predicted = predictions.labels[:, column], predictions.classes[-1, :, column]
        expected = confusion_matrix(true, predicted, labels=range(len(names)))
        assert np.array_equal(judgement.confusion(category), expected)
        counts = [int(row["images"]) for row in table if row["category"] == category]
        assert counts == expected.flatten().tolist()


def test_who_asks_for_mistakes_gets_the_surest_first(judged):
    predictions = judged.predictions[2]
    wrong = predictions.classes[-1] != predictions.labels
    column = [*Judgement.of_trial(judged.entry, 2).names].index("texture")
    by_probability = sorted(
        np.flatnonzero(wrong[:, column]), key=lambda image: predictions.log_probs[-1, image, column]
    )
    assert numbers(judged.get(trial=2, category="texture")) == by_probability[:24]
    assert len(by_probability) > 24
    assert numbers(judged.get(trial=2, category="texture", page=2)) == by_probability[24:48]
    assert numbers(judged.get(trial=2, category="texture", show="wrong")) == sorted(by_probability)[:24]
    assert (
        numbers(judged.get(trial=2, category="texture", show="right"))[0]
        == np.flatnonzero(~wrong[:, column]).min()
    )
    assert numbers(judged.get(trial=2, show="all")) == [*range(24)]


def test_a_cell_of_the_matrix_leads_to_its_images(judged):
    page = judged.get(trial=2).text
    links = re.findall(r'href="([^"]+images\?[^"]+)#garments">(\d+)</a>', page)
    assert len(links) > 40
    for link, count in links[:5]:
        shown = judged.client.get(link.replace("&amp;", "&")).text
        assert f"{count} of 80 validation images" in shown


def test_two_trials_and_the_images_on_which_they_differ(judged):
    first, second = (judged.predictions[trial].classes[-1] for trial in (0, 2))
    texture = np.flatnonzero(first[:, 0] != second[:, 0])
    assert numbers(judged.get(trial=0, against=2, category="texture")) == texture[:24].tolist()
    table = rows(judged.get("/images.csv", trial=0, against=2, category="texture"))
    assert len(table) == len(texture) * 2 * 6
    assert {row["trial"] for row in table} == {"0", "2"}
    assert table[0]["file"].startswith("img/")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"trial": "1"}, "no complete trial 1"),
        ({"trial": "9" * 30}, "write a whole number"),
        ({"true": "fit_0", "predicted": "texture_1"}, "choose from one category"),
        ({"category": "colour"}, "allowed are texture"),
        ({"trial": "2", "against": "2"}, "choose another one"),
        ({"show": "wrongest"}, f"allowed are {', '.join(SHOWN)}"),
        ({"page": "0"}, "from 1"),
        ({"smooth": "3"}, "no such filter"),
    ],
)
def test_what_an_address_asks_for_wrongly_is_said(judged, query, words):
    for path in ("", "/images.csv") if "page" not in query else ("",):
        answer = judged.get(path, **query)
        assert answer.status_code == 400
        assert words in answer.text


def test_a_thumbnail_is_a_small_copy_that_only_people_who_log_in_get(judged):
    answer = judged.get("/2/7.jpg")
    small = Image.open(io.BytesIO(answer.data))
    assert (answer.mimetype, small.format, max(small.size)) == ("image/jpeg", "JPEG", 224)
    whole = Image.open(judged.data / (judged.data / "split" / "val.txt").read_text().split()[7])
    again = np.asarray(whole.convert("RGB").resize(small.size), float)
    assert np.abs(np.asarray(small, float) - again).mean() < 6
    assert len(list((home_folder() / "cache" / "thumbnails").iterdir())) >= 1
    address = f"/atelier/studies/{judged.entry.study_id}/images"
    assert judged.stranger.get(f"{address}/2/7.jpg").status_code in (302, 401)
    assert judged.stranger.get(address).status_code in (302, 401)
    assert judged.get("/2/80.jpg").status_code == 404
    assert judged.get("/2/99999999999999.jpg").status_code == 404


def test_nothing_outside_the_data_folder_is_served(judged, tmp_path):
    secret = tmp_path / "secret.jpg"
    Image.new("RGB", (9, 9), "red").save(secret)
    listed = (judged.data / "split" / "val.txt").read_text().split()
    picture = judged.data / listed[11]
    kept = picture.read_bytes()
    picture.unlink()
    picture.symlink_to(secret)
    answer = judged.get("/2/11.jpg")
    assert (answer.status_code, b"leads out of the data folder" in answer.data) == (404, True)
    picture.unlink()
    picture.symlink_to(picture)
    assert judged.get("/2/11.jpg").status_code == 404
    picture.unlink()
    picture.write_bytes(b"no picture")
    assert judged.get("/2/11.jpg").status_code == 404
    picture.write_bytes(kept)
    assert judged.get("/2/11.jpg").status_code == 200


def test_pictures_or_predictions_that_are_not_here_are_said_in_one_line(judged):
    elsewhere = judged.data.with_name("elsewhere")
    judged.data.rename(elsewhere)
    page = judged.get(trial=2)
    assert page.status_code == 200
    assert "which this machine does not see" in page.text
    assert "<img" not in page.text
    assert 'id="confusion"' in page.text
    assert judged.get("/2/7.jpg").status_code == 404
    elsewhere.rename(judged.data)
    labels = judged.data / "split" / "val_attr.txt"
    kept = labels.read_text()
    labels.write_text(kept.replace(kept.splitlines()[0], "0 0 0 0 0 0", 1))
    assert "has other validation images or labels now" in judged.get(trial=2).text
    assert judged.get("/2/7.jpg").status_code == 404
    assert {row["file"] for row in rows(judged.get("/images.csv", trial=2))} == {""}
    labels.write_text(kept)
    assert "<img" in judged.get(trial=2).text
    study = fill(judged.engine, ["complete", "running"], name="without files", data=judged.data)
    page = judged.client.get(f"/atelier/studies/{study}/images")
    assert (page.status_code, "use the ATELIER_HOME" in page.text) == (200, True)
    study = fill(judged.engine, ["running"], name="young", data=judged.data)
    assert "No trial is complete yet" in judged.client.get(f"/atelier/studies/{study}/images").text


def test_the_same_is_drawn_into_files_and_reported(judged, tmp_path):
    for kind in ("confusion", "errors"):
        for suffix in (".png", ".svg", ".html"):
            output = tmp_path / f"{kind}{suffix}"
            done = runner.invoke(cli, ["plot", "judged", "--kind", kind, "-o", str(output)])
            assert done.exit_code == 0, done.output
            assert output.stat().st_size > 10_000
    assert (tmp_path / "errors.html").read_text().count('src="data:image/jpeg') == 24
    for trials, words in (("1", "no predictions of trial 1"), ("0,2", "give one trial")):
        done = runner.invoke(
            cli,
            ["plot", "judged", "--kind", "errors", "--trials", trials, "-o", str(tmp_path / "x.png")],
        )
        assert (done.exit_code, words in done.output) == (2, True)
    assert not (tmp_path / "x.png").exists()


def test_an_unknown_label_is_neither_right_nor_wrong(judged):
    found = judged.predictions[2]
    labels = found.labels.copy()
    labels[::2, 5] = UNKNOWN
    judgement = Judgement(replace(found, labels=labels), Judgement.of_trial(judged.entry, 2).names)
    verdicts = [judgement.of(image)[5] for image in range(80)]
    assert {verdict.true for verdict in verdicts[::2]} == {""}
    assert not any(verdict.is_wrong for verdict in verdicts[::2])
    assert judgement.confusion("fit").sum() == 40
    for shown in (SURE, WRONG, RIGHT):
        assert all(image % 2 for image in judgement.choose(shown, "fit"))
    assert len(judgement.choose(ALL, "fit")) == 80


def test_without_a_mistake_there_is_nothing_to_draw(judged):
    found = judged.predictions[2]
    right = replace(found, classes=found.labels[np.newaxis])
    names = Judgement.of_trial(judged.entry, 2).names
    with pytest.raises(PicturesError, match="no image is wrong"):
        surest_errors(str(judged.data), Judgement(right, names))


def test_a_matrix_of_many_attributes_is_drawn_without_numbers(tmp_path):
    names = [f"a{number}" for number in range(255)]
    labels = np.arange(255, dtype=np.uint8).reshape(-1, 1) % 255
    found = Predictions(
        labels,
        labels[np.newaxis],
        np.zeros((1, 255, 1), np.float16),
        np.ones(1, np.int32),
        np.arange(255, dtype=np.int32),
    )
    render.save(charts.confusion(Judgement(found, {"style": names})), "many", tmp_path / "many.svg")
    assert (tmp_path / "many.svg").stat().st_size > 10_000
