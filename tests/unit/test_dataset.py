"""What `atelier data check` finds, and what a dataset needs for what is to be done with it."""

import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from search.cli import app
from trainer.check import check_dataset, summary
from trainer.dataset import DatasetError, read_dataset
from trainer.demo import write_demo
from trainer.division import absent_attributes, attribute_table, divide


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "data"
    write_demo(folder, 40, 20, 10)
    return folder


@pytest.fixture
def data(small, tmp_path):
    """A dataset of one's own."""
    return shutil.copytree(small, tmp_path / "data")


def check(folder, code):
    """The lines that `data check` prints."""
    result = CliRunner().invoke(app, ["data", "check", str(folder)])
    assert result.exit_code == code, result.output
    return result.output.replace(f"{folder}/split/", "").splitlines()


def rewrite(path, change):
    lines = path.read_text().splitlines()
    change(lines)
    path.write_text("".join(f"{line}\n" for line in lines))


def put(number, line):
    return lambda lines: lines.__setitem__(number - 1, line)


def drop(number):
    return lambda lines: lines.pop(number - 1)


def swap(one, other):
    def change(lines):
        lines[one - 1], lines[other - 1] = lines[other - 1], lines[one - 1]

    return change


LISTS = {
    "a number that is not that of the rows": (put(1, "20"), "1: says 20 attributes, but 26 follow"),
    "a row that is missing": (drop(20), "1: says 26 attributes, but 25 follow"),
    "a row too many": (lambda lines: lines.append("silk 6"), "1: says 26 attributes, but 27 follow"),
    "no number": (
        drop(1),
        "1: found 'attribute_name attribute_type', allowed is the number of attributes",
    ),
    "no head": (drop(2), "2: found 'floral 1', allowed is the head"),
    "neither": (lambda lines: lines.__delitem__(slice(2)), "1: found 'floral 1', allowed is the number"),
    "another head": (
        put(2, "attribute_type attribute_name"),
        "2: found 'attribute_type attribute_name'",
    ),
    "a word for a number": (put(1, "many"), "1: found 'many', allowed is the number of attributes"),
    "no type": (put(5, "striped"), "5: found 'striped', allowed is a name and the number of its type"),
    "a word for a type": (
        put(5, "striped texture"),
        "5: found 'striped texture', allowed is a name and",
    ),
    "an attribute twice": (put(5, "floral 1"), "5: floral of type 1 stands in line 3 already"),
    "types that are mixed": (swap(5, 10), "6: type 1 after type 2; sort them"),
    "the last type first": (lambda lines: lines.insert(2, lines.pop()), "4: type 1 after type 6; sort"),
    "nothing": (lambda lines: lines.clear(), "1: no attributes in it"),
    "nothing but a head": (lambda lines: lines.__delitem__(slice(2, 99)), "2: no attributes in it"),
    "too many of a type": (
        lambda lines: lines.extend(f"a{number} 6" for number in range(260)),
        "281: more than 255 attributes of type 6",
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_an_attribute_list_is_what_it_says(name, data):
    change, expected = LISTS[name]
    rewrite(data / "split" / "list_attr_cloth.txt", change)
    assert any(f"list_attr_cloth.txt:{expected}" in line for line in check(data, 2))
    with pytest.raises(DatasetError, match="list_attr_cloth"):
        read_dataset(data)


def test_an_attribute_list_may_be_written_in_other_ways(data):
    plain = read_dataset(data)
    path = data / "split" / "list_attr_cloth.txt"
    text = path.read_text().replace("attribute_name   attribute_type", "Name\tType")
    path.write_text(text.replace(" 1\n", "\t01\n").replace("floral", "all  over floral"))
    other = read_dataset(data)
    assert other.attributes[:2] == ("all over floral", "graphic")
    assert (other.categories, other.sizes) == (plain.categories, plain.sizes)


def images(data, split):
    return (data / "split" / f"{split}.txt").read_text().splitlines()


def repeat_a_row(data):
    """Row 3 of train once more, as row 7; with the same labels."""
    for name in ("train.txt", "train_attr.txt"):
        rewrite(data / "split" / name, lambda lines: lines.__setitem__(6, lines[2]))


def repeat_otherwise(data):
    rewrite(data / "split" / "train.txt", lambda lines: lines.__setitem__(6, f"img/../{lines[2]}"))
    rewrite(data / "split" / "train_attr.txt", put(3, "0 0 0 0 0 0"))
    rewrite(data / "split" / "train_attr.txt", put(7, "0 1 0 0 0 0"))


def copy_an_image(data):
    train = images(data, "train")
    shutil.copy(data / train[0], data / train[4])
    rewrite(data / "split" / "train_attr.txt", lambda lines: lines.__setitem__(4, lines[0]))


def list_in_both(data):
    rewrite(data / "split" / "val.txt", put(2, images(data, "train")[0]))
    rewrite(data / "split" / "val_attr.txt", put(2, "6 2 2 3 5 2"))
    rewrite(data / "split" / "train_attr.txt", put(1, "6 2 2 3 5 0"))


def copy_into_test(data):
    shutil.copy(data / images(data, "val")[3], data / images(data, "test")[5])


def take_an_attribute_from_val(data):
    def change(lines):
        lines[:] = [line if line[0] != "6" else "5" + line[1:] for line in lines]

    rewrite(data / "split" / "val_attr.txt", change)


def take_an_attribute_from_both(data):
    take_an_attribute_from_val(data)
    rewrite(
        data / "split" / "train_attr.txt",
        lambda lines: lines.__setitem__(slice(None), ["5" + line[1:] for line in lines]),
    )


NOTED = {
    "an image that is listed twice": (
        repeat_a_row,
        ["train.txt:7: listed in train.txt:3 already"],
        {"images listed twice": 1},
    ),
    "with labels that contradict each other": (
        repeat_otherwise,
        [
            "train_attr.txt:7: other labels than train.txt:3, the same image: short_sleeve, not long",
            "train.txt:7: ",
        ],
        {"contradicting labels": 1},
    ),
    "two files with the same image": (
        copy_an_image,
        ["train.txt:5: the same image as train.txt:1, byte for byte, under another name"],
        {"equal images": 1},
    ),
    "an image in train and in val": (
        list_in_both,
        [
            "val.txt:2: the image of train.txt:1 too, so val is not unseen",
            "val_attr.txt:2: other labels than train.txt:1, the same image: conventional, not tight",
        ],
        {"images in two splits": 1, "contradicting labels": 1},
    ),
    "an image of val in test": (
        copy_into_test,
        ["test.txt:6: the image of val.txt:4 too, so test is not unseen"],
        {"images in two splits": 1},
    ),
    "an attribute that val has not": (
        take_an_attribute_from_val,
        ["list_attr_cloth.txt:9: no image of val has lattice"],
        {"attributes without images": 1},
    ),
    "attributes that neither has": (
        take_an_attribute_from_both,
        [
            "list_attr_cloth.txt:9: no image of train and val has lattice",
            "list_attr_cloth.txt:3: no image of train has floral",
        ],
        {},
    ),
}


@pytest.mark.parametrize("name", NOTED)
def test_rows_are_compared(name, data):
    change, expected, kinds = NOTED[name]
    change(data)
    lines = check(data, 0)
    for one in expected:
        assert any(line.startswith(f"warning: {one}") for line in lines), lines
    assert "no errors" in lines[-1]
    for kind, count in kinds.items():
        assert f"{kind}: {count}" in lines[-1]
    read_dataset(data)  # it can be used


def test_a_warning_hides_no_other(data):
    copy_an_image(data)
    take_an_attribute_from_val(data)
    assert "2 warnings (attributes without images: 1, equal images: 1)" in check(data, 0)[-1]


def test_of_test_a_search_needs_nothing(data):
    (data / images(data, "test")[0]).unlink()
    lines = check(data, 0)
    assert lines[0].startswith("warning: test.txt:1: no such image")
    assert "no errors, 1 warning (missing images: 1)" in lines[-1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Pillow leaves it open
def test_a_file_that_is_no_file_is_found(data):
    path = data / images(data, "val")[2]
    path.unlink()
    path.symlink_to("/proc/self/mem")  # there, and not to be read
    assert any(line.startswith("error: val.txt:3: ") for line in check(data, 2))


def test_errors_stand_apart_from_warnings(data):
    repeat_a_row(data)
    (data / images(data, "val")[0]).unlink()
    (data / images(data, "val")[1]).write_bytes(b"")
    lines = check(data, 2)
    assert [line.split(":")[0] for line in lines] == ["error", "error", "warning", "error"]
    assert lines[-1].startswith(
        f"error: {data} has 2 errors (missing images: 1, broken images: 1), 1 warning"
    )


def test_nothing_is_found_in_a_dataset_that_is_right(small):
    dataset, findings = check_dataset(small)
    assert not findings
    assert summary(findings) == "no errors, no warnings"
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 40,
        "val": 20,
        "test": 10,
    }


def test_what_is_found_in_the_real_data_is_right(real_data):
    """Against the files' bytes and labels, read by other means."""
    lines = [line for line in check(real_data, 0) if line.startswith("warning")]
    paths = images(real_data, "train") + images(real_data, "val")
    contents = [(real_data / path).read_bytes() for path in paths]
    again, seen = set(), {}
    for number, content in enumerate(contents, 1):
        first = seen.setdefault(content, number)
        if first != number:
            again.add((number, first))
    labels = (real_data / "split" / "train_attr.txt").read_text().splitlines()
    contradicting = {(a, b) for a, b in again if labels[a - 1] != labels[b - 1]}
    assert (len(again), len(contradicting)) == (5, 2)
    found = Counter()
    for a, b in again:
        found["equal"] += sum(
            f"train.txt:{a}: the same image as train.txt:{b}," in line for line in lines
        )
    for a, b in contradicting:
        found["labels"] += sum(
            f"train_attr.txt:{a}: other labels than train.txt:{b}," in line for line in lines
        )
    assert found == {"equal": 5, "labels": 2}
    assert len(lines) == 7


def remove(*names):
    def change(data):
        for name in names:
            (data / "split" / name).unlink()

    return change


def remove_images(split):
    def change(data):
        for path in images(data, split):
            (data / path).unlink()

    return change


def spoil(name):
    return lambda data: (data / "split" / name).write_text("spoilt")


NO_LABELS = remove("train_attr.txt", "val_attr.txt")
ENOUGH = {  # what is not there, and what is to be done all the same
    "predict test, of test alone": (
        remove("train.txt", "train_attr.txt", "val.txt", "val_attr.txt"),
        (["test"], False),
    ),
    "predict test, without the images of train": (remove_images("train"), (["test"], False)),
    "predict val, without its labels": (remove("val_attr.txt"), (["val"], False)),
    "predict val, with labels of train that are broken": (spoil("train_attr.txt"), (["val"], False)),
    "predict train, without any labels": (NO_LABELS, (["train"], False)),
    "predict both, without test": (remove("test.txt"), (["train", "val"], False)),
    "search, without the images of test": (remove_images("test"), (["train", "val"], True)),
    "search, with a list of test that is broken": (spoil("test.txt"), (["train", "val"], True)),
}


@pytest.mark.parametrize("name", ENOUGH)
def test_only_what_is_needed_is_asked_for(name, data):
    change, (splits, labelled) = ENOUGH[name]
    change(data)
    dataset = read_dataset(data, splits, labelled)
    assert [*dataset.splits] == splits
    assert all((split.labels is not None) == labelled for split in dataset.splits.values())


@pytest.mark.parametrize(
    ("change", "able"),
    [
        (remove("train.txt", "train_attr.txt", "val.txt", "val_attr.txt"), ["test"]),
        (NO_LABELS, ["train", "val", "test"]),
        (lambda data: (NO_LABELS(data), remove("test.txt", "val.txt")(data)), ["train"]),
    ],
)
def test_a_folder_without_labels_says_what_it_is_good_for(change, able, data):
    change(data)
    with pytest.raises(DatasetError) as caught:
        read_dataset(data)
    use = f"without it the folder is only good for: atelier predict --split {' or '.join(able)}"
    assert str(caught.value).endswith(f".txt: no such file; {use}")
    lines = check(data, 0)
    assert lines[-1] == f"without labels it is good for: atelier predict --split {' or '.join(able)}"


def test_the_folder_around_it_or_inside_it_is_not_the_dataset(data):
    for folder in (data.parent, data / "img", data / "split"):
        with pytest.raises(DatasetError) as caught:
            read_dataset(folder)
        assert f"did you mean {data}?" in str(caught.value)


def test_the_test_split_is_no_part_of_what_is_learned(data):
    before = read_dataset(data).fingerprint
    Image.new("RGB", (9, 9)).save(data / images(data, "test")[0])
    assert read_dataset(data).fingerprint == before
    rewrite(data / "split" / "val_attr.txt", put(1, "0 0 0 0 0 0"))
    assert read_dataset(data).fingerprint != before


def test_prepared_images_are_told_apart_by_what_they_show(data):
    dataset = read_dataset(data)
    own = {name: dataset.images_digest(split) for name, split in dataset.splits.items()}
    assert dataset.images_digest(dataset.split("train+val")) == f"{own['train']}+{own['val']}"
    rewrite(data / "split" / "train_attr.txt", put(1, "0 0 0 0 0 0"))
    assert read_dataset(data).images_digest(dataset.split("train")) == own["train"]
    rewrite(data / "split" / "train.txt", swap(1, 2))
    assert read_dataset(data).images_digest(dataset.split("train")) != own["train"]


def test_attributes_that_a_run_does_not_see_are_named(real_data, tiny):
    dataset = read_dataset(real_data)
    some = tiny.model_copy(update={"data": str(real_data), "train_images": 60})
    rows = divide(dataset, some).train
    columns = dataset.splits["train"].labels[rows]
    missing = [
        name
        for column, names in zip(columns.T, dataset.names, strict=True)
        for value, name in enumerate(names)
        if value not in column
    ]
    assert missing
    table = attribute_table(dataset, some)
    assert absent_attributes(table) == [
        f"no training image has {', '.join(missing)}: no network can learn it"
    ]
    assert absent_attributes(attribute_table(dataset, tiny)) == []
    assert np.sum([row["train_images"] for row in table]) == 60 * 6
