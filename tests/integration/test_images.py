"""What a study says of its images: attributes that have none, and the version of their reader."""

import logging
import shutil
import zipfile

import pytest
from PIL import ExifTags, Image

from search import comparable
from search.errors import InputError
from search.study import open_study
from search.toml_file import load_study_file
from storage import optuna_storage, studies
from tests.studies import fill
from trainer.dataset import read_dataset
from trainer.images import load_image

ABSENT = "no training image has"


def only_to_predict(demo, folder, save):
    """A folder with the attribute list and the test split, whose images `save` has written."""
    (folder / "split").mkdir(parents=True)
    (folder / "img").mkdir()
    for name in ("list_attr_cloth.txt", "test.txt"):
        shutil.copy(demo / "split" / name, folder / "split")
    for path in (folder / "split" / "test.txt").read_text().splitlines():
        save(load_image(demo / path), folder / path)


def upright(image, path):
    image.save(path, "PNG")


def lying(image, path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(path, "PNG", exif=exif)


def grey(image, path):
    image.convert("L").save(path, "PNG")


def grey_in_colours(image, path):
    image.convert("L").convert("RGB").save(path, "WEBP", lossless=True)


def test_a_folder_with_nothing_but_the_lists_and_images_is_predicted(
    atelier, demo, finished_run, tmp_path
):
    found = {}
    for save in (upright, lying, grey, grey_in_colours):
        folder = tmp_path / save.__name__
        only_to_predict(demo, folder, save)
        atelier("predict", finished_run, "--data", folder, "-o", f"{save.__name__}.zip")
        with zipfile.ZipFile(f"{save.__name__}.zip") as archive:
            found[save] = archive.read("prediction.txt").decode().splitlines()
    assert found[upright] == found[lying]
    assert found[grey] == found[grey_in_colours]
    assert len(found[grey]) == 10


def test_attributes_without_images_are_named_at_the_start_and_in_the_report(
    atelier, tmp_path, caplog, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    few = ["--set", "train.train_images=8", "--set", "study.max_trials=1", "--workers", "1"]
    with caplog.at_level(logging.WARNING):
        atelier("search", "study.toml", *few)
    [said] = [record.getMessage() for record in caplog.records if ABSENT in record.getMessage()]
    atelier("report", "tiny")
    report = (tmp_path / "report" / "report.md").read_text()
    assert f"- {said.partition(': ')[2]}" in report
    trained = atelier("train", "best.toml", "--epochs", "2")
    assert f"note: {said.partition(': ')[2]}" in trained.stderr
    assert "can learn it" in said

    config = (tmp_path / "best.toml").read_text()
    assert "of the reader of images" not in trained.stderr
    of_old = config.replace("reader = 2\n", "").replace('dataset = "', 'dataset = "00')
    (tmp_path / "old.toml").write_text(of_old)  # whose fingerprint was of the test split too
    assert "had version 1 of the reader of images" in atelier("train", "old.toml").stderr


def test_a_study_goes_on_with_the_reader_of_images_that_it_was_made_with(
    engine, demo, atelier, tmp_path, monkeypatch
):
    file, dataset = load_study_file(tmp_path / "study.toml"), read_dataset(demo)
    storage = optuna_storage.optuna_storage(engine)
    _, entry = open_study(file, engine, storage, dataset, lead=True)
    assert entry.settings["images"] == {"reader": comparable.READER}
    monkeypatch.setattr(comparable, "READER", 99)
    with pytest.raises(InputError, match="with version 2 of the reader of images, this is 99"):
        open_study(file, engine, storage, dataset)
    for words in (["confirm", "tiny"], ["search", "study.toml"], ["worker", "tiny"]):
        assert "of the reader of images" in atelier(*words, code=2).stderr
    monkeypatch.undo()

    study_id = fill(engine, ["complete"], epochs=1, name="before")
    settings = studies.study_entry(engine, "before").settings
    del settings["images"]  # as of a study from when there was one reader only
    studies.update_study(engine, study_id, settings=settings)
    with pytest.raises(InputError, match="with version 1 of the reader of images"):
        comparable.check_versions(studies.study_entry(engine, "before"))
