"""Meet what would stop every worker before one is started: dataset, images, device, network."""

from pathlib import Path

from search import forking
from search.slurm.granted import take_granted
from search.study_config import StudyConfig
from storage.paths import image_cache
from trainer.config import TrainConfig
from trainer.dataset import Dataset, read_dataset


def preflight(config: StudyConfig) -> Dataset:
    """Meet the errors of dataset, images, device and network before any worker does.

    Prepares the images and returns the dataset. Raises DatasetError, ModelError, DeviceError,
    UnknownDeviceError, FeaturesError and CallFailedError.
    """
    dataset = read_dataset(config.shared.data, unknown_labels=config.shared.unknown_labels)
    forking.start_server()  # it imports torch meanwhile; this process needs none
    import dashboards.note  # noqa: F401  # late: a new study needs it, and now its second is free

    forking.call(prepare_workspace, config.shared, config.batch_sizes, image_cache())
    return dataset


def prepare_workspace(config: TrainConfig, batch_sizes: set[int], cache: Path) -> None:
    """Prepare the images and build the network once. `preflight` calls it in a forked process."""
    from trainer.workspace import prepare_images  # late: the command itself needs no torch

    take_granted()  # the fork server's parent did so for itself only
    prepare_images(config, batch_sizes, cache)
