"""What `atelier doctor` asks of the study file: its weights and its dataset."""

from collections.abc import Iterator
from dataclasses import replace

from search.doctor.check import Check, State, ok, told
from search.errors import InputError
from search.slurm.site import absent_commands, has_cluster
from search.slurm.submit import check_weights, dataset_of
from search.study_config import StudyConfig


def weights(file: StudyConfig) -> Iterator[Check]:
    """Whether the weights are there, for jobs too, which may have no internet."""
    wanted = file.shared.weights
    try:
        check_weights(file.shared)
    except InputError as error:
        check = told("weights", str(error))
        # Without a cluster a worker gets them itself.
        downloads = wanted == "timm" and (absent_commands() or not has_cluster())
        yield replace(check, state=State.NOTE) if downloads else check
        return
    words = {"timm": f"{file.shared.backbone} is in the cache", "none": "none are wanted"}
    yield ok("weights", words.get(wanted, wanted))


def dataset(file: StudyConfig) -> Iterator[Check]:
    """Whether the dataset's lists can be read, and the first image of each."""
    found = dataset_of(file.shared)
    for split in found.splits.values():
        with (found.folder / split.paths[0]).open("rb") as image:
            image.read(1)
    images = ", ".join(f"{name} {len(split)}" for name, split in found.splits.items())
    yield ok("dataset", f"{found.folder}: {images} images")
