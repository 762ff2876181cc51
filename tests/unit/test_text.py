"""Text files as editors and systems leave them: whatever reads one takes it for the plain file."""

import codecs
import shutil
import unicodedata

import numpy as np
import pytest
from typer.testing import CliRunner

from search.cli import app
from search.errors import InputError
from search.export import load_bundle
from search.toml_file import load_study_file
from storage.paths import home
from trainer.config import TrainConfig
from trainer.dataset import read_dataset, read_labels
from trainer.demo import write_demo
from trainer.text import TextError, read_lines, read_text

PLAIN = "one\ntwo é\n\nfour\n"
WRITTEN = {
    "a mark": codecs.BOM_UTF8 + PLAIN.encode(),
    "UTF-16 of Windows": PLAIN.encode("utf-16"),
    "UTF-16, big end first": codecs.BOM_UTF16_BE + PLAIN.encode("utf-16-be"),
    "UTF-32": PLAIN.encode("utf-32"),
    "ends of Windows": PLAIN.replace("\n", "\r\n").encode(),
    "ends of old Macs": PLAIN.replace("\n", "\r").encode(),
    "mixed ends": PLAIN.replace("\n", "\r\n", 1).encode(),
    "no end": PLAIN.rstrip("\n").encode(),
    "blank lines": (PLAIN + "\n \n\t\n").encode(),
    "blanks around": PLAIN.replace("two é", "\ttwo é \t").encode(),
    "marks of joined files": (PLAIN[:4] + "\ufeff" + PLAIN[4:]).encode(),
    "accents apart": unicodedata.normalize("NFD", PLAIN).encode(),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_lines_are_read(name, tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes(WRITTEN[name])
    assert read_lines(path) == ["one", "two é", "", "four"]


def test_a_line_ends_where_an_editor_ends_it(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("a\x0bb\x0cc\x85d\u2028e\n")
    assert read_lines(path) == ["a\x0bb\x0cc\x85d\u2028e"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            "one\nDüsseldorf\n".encode("latin-1"),
            "file.txt:2: byte 0xfc is no UTF-8; save the file as UTF-8",
        ),
        (b"\xef\xbb\xbf\n\n\xff", "file.txt:3: byte 0xff is no UTF-8"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid x\n",
            "is a Git LFS pointer (run: git lfs pull)",
        ),
        ("0 1\n".encode("utf-16-le"), "file.txt: has NUL bytes, as UTF-16 without a mark has"),
        (b"\x1f\x8b\x08\xff", "file.txt: is a gzip file (unpack it first); give a text file"),
        (b"\x89PNG\r\n\x1a\n\xff", "file.txt: is a PNG image; give a text file"),
        (b"\xff\xfea\x00\n", "file.txt:1: byte 0x0a is no UTF-16-LE"),
    ],
)
def test_what_is_no_text_is_told_with_its_line(data, expected, tmp_path):
    (tmp_path / "file.txt").write_bytes(data)
    with pytest.raises(TextError) as caught:
        read_text(tmp_path / "file.txt")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(TextError, match="is a folder; give a text file"):
        read_text(tmp_path)


def test_a_path_may_be_written_otherwise_than_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    apart, joined = (unicodedata.normalize(form, "Größe") for form in ("NFD", "NFC"))
    assert apart != joined
    (tmp_path / apart).mkdir()
    for data in (f"~/{apart}", f"~/{joined}", str(tmp_path / joined), str(tmp_path / apart)):
        assert TrainConfig(data=data).data == str(tmp_path / apart)
    assert TrainConfig(data="x", weights="~/w.pth").weights == str(tmp_path / "w.pth")
    assert TrainConfig(data="x", weights="timm").weights == "timm"
    monkeypatch.setenv("ATELIER_HOME", "~/state")
    assert home() == tmp_path / "state"


STUDY = """
[study]
name = "Zoë's"
max_trials = 2
[space]
lr = { low = 1e-3, high = 2e-3 }
[train]
data = "data"
epochs = 7
"""
EDITED = {
    "a mark": lambda data: codecs.BOM_UTF8 + data,
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "ends of Windows": lambda data: data.replace(b"\n", b"\r\n"),
    "ends of old Macs": lambda data: data.replace(b"\n", b"\r"),
    "blank lines": lambda data: data + b"\n\n",
    "blanks": lambda data: data.replace(b"\n", b" \t\n"),
    "accents apart": lambda data: unicodedata.normalize("NFD", data.decode()).encode(),
}


@pytest.mark.parametrize("edit", EDITED.values(), ids=EDITED)
def test_whatever_an_editor_did_a_file_says_the_same(edit, demo, tmp_path):
    study, config, labels = tmp_path / "s.toml", tmp_path / "c.toml", tmp_path / "labels.txt"
    study.write_bytes(edit(STUDY.encode()))
    assert load_study_file(study).study.name == "Zoë's"
    config.write_bytes(edit(b'[train]\ndata = "data"\nepochs = 7\n'))
    assert load_bundle(config).config.epochs == 7
    labels.write_bytes(edit(b"0 1\n1 0\n"))
    assert read_labels(labels, 2, (2, 2)).tolist() == [[0, 1], [1, 0]]
    data = tmp_path / "data"
    shutil.copytree(demo / "split", data / "split")
    (data / "img").symlink_to(demo / "img")
    for path in (data / "split").iterdir():
        path.write_bytes(edit(path.read_bytes()))
    plain, edited = read_dataset(demo), read_dataset(data)
    assert edited.fingerprint == plain.fingerprint
    assert (edited.splits["val"].labels == plain.splits["val"].labels).all()


def test_a_password_is_the_file_s_first_line(accounts, tmp_path):
    path = tmp_path / "password"
    path.write_bytes("a pässword of Windows\r\n".encode("utf-16"))
    result = CliRunner().invoke(app, ["user", "add", "zoe", "--password-file", str(path)])
    assert result.exit_code == 0, result.output
    for form in ("NFC", "NFD"):
        assert accounts.check("zoe", unicodedata.normalize(form, "a pässword of Windows"))


def test_listed_images_are_found_by_names_that_mean_them(tmp_path):
    data = tmp_path / "data"
    write_demo(data, 30, 10, 0)
    plain = read_dataset(data)
    listing = data / "split" / "train.txt"
    names = listing.read_text().splitlines()
    apart, joined = (unicodedata.normalize(form, "Kühl/Mädchen.jpg") for form in ("NFD", "NFC"))
    (data / apart).parent.mkdir()
    (data / names[0]).rename(data / apart)
    other = [
        joined.replace("K", "k"),
        names[1].replace("/", "\\"),
        names[2].replace(".jpg", ".JPG"),
        f"./{names[3]}",
    ]
    listing.write_text("\n".join([*other, *names[4:]]))
    split = read_dataset(data).splits["train"]
    assert split.paths[:3] == (apart, *names[1:3])
    assert (split.labels == plain.splits["train"].labels).all()
    assert np.array_equal(
        [(data / path).read_bytes() for path in split.paths[1:]],
        [(data / path).read_bytes() for path in names[1:]],
    )
    (data / names[2].replace(".jpg", ".Jpg")).write_bytes(b"")  # now two may be meant
    result = CliRunner().invoke(app, ["data", "check", str(data)])
    assert "train.txt:3: no such image" in result.output


def test_a_study_is_found_however_its_name_is_typed(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text(STUDY.replace("Zoë", unicodedata.normalize("NFD", "Zoë")))
    assert load_study_file(path).study.name == "Zoë's"
    path.write_bytes(b"\xff" + STUDY.encode())
    with pytest.raises(InputError, match=r"s\.toml:1: byte 0xff is no UTF-8"):
        load_study_file(path)
