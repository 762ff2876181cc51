"""What is known of a run: kept in its model files, and told in the card of an exported model."""

from pathlib import Path
from typing import Any

import jinja2
from pydantic import BaseModel, ValidationError

from dashboards.terminal import printable
from search.confirm.intervals import of_counts
from search.errors import InputError
from search.export import Bundle, Origin, in_words
from storage.words import counted
from trainer.config import TrainConfig
from trainer.dataset import Dataset
from trainer.division import attribute_table
from trainer.model_file import Description, SavedModel
from trainer.run import MOVABLE


class Attribute(BaseModel):
    """One attribute, and how many images of the dataset have it."""

    name: str
    category: str
    images: int  # of the validation
    train_images: int


class Facts(BaseModel):
    """What a run's model files keep of it. All is empty if an earlier version wrote them."""

    dataset: str = ""  # its fingerprint
    attributes: list[Attribute] = []
    origin: Origin | None = None  # None if the configuration is no export of a search
    searched: dict[str, Any] = {}  # the settings in that export


def facts_of(bundle: Bundle, config: TrainConfig, dataset: Dataset) -> Facts:
    """The facts of a run that begins."""
    return Facts.model_validate(
        {
            "dataset": dataset.fingerprint,
            "attributes": attribute_table(dataset, config),
            "origin": bundle.origin or None,
            "searched": bundle.config.model_dump(),
        }
    )


def read_facts(path: Path, values: dict[str, Any]) -> Facts:
    """The facts in a model file. Raises InputError."""
    try:
        return Facts(**values)
    except ValidationError as error:
        what = printable(error.errors()[0]["msg"])
        raise InputError(
            f"{path}: what it says of its training cannot be read ({what}); give a run of: atelier train"
        ) from None


def model_card(
    model: SavedModel, facts: Facts, hub_config: dict[str, Any], is_best: bool, files: list[str]
) -> str:
    """The card, in Markdown behind YAML, as model hubs read it."""
    config, description = model.config, model.description
    loader = jinja2.PackageLoader("search")
    names = {key: Path(getattr(config, key)).name for key in ("data", "weights")}
    base = config.backbone if config.weights == "timm" and "." in config.backbone else None
    settings = config.model_dump() | names  # without paths of this machine
    if description.init is not None:
        settings["weights"] = f"of another run, {description.init}"
    templates = jinja2.Environment(loader=loader, autoescape=False, trim_blocks=True)
    templates.filters["counted"] = counted
    return templates.get_template("model_card.md").render(
        hub=hub_config,
        data=names["data"],
        base=base,
        settings=settings,
        description=description,
        is_best=is_best,
        score=_score(description, facts),
        facts=facts,
        accuracy=_known(facts),
        changes=_changes(facts, config),
        files=files,
    )


def _score(description: Description, facts: Facts) -> str | None:
    """The run's own accuracy, with an interval if the images are known. None without one."""
    value = description.val_accuracy
    if value is None or not (facts.attributes and description.val_hits):
        return None if value is None else f"{100 * value:.2f} %"
    counts = [attribute.images for attribute in facts.attributes]
    interval = of_counts(description.val_hits, counts, description.sizes)
    return in_words(vars(interval) | {"noise": "images"})


def _known(facts: Facts) -> str | None:
    """The accuracy of the configuration that the search exported. None if it is not known."""
    accuracy = facts.origin.accuracy if facts.origin else None
    return None if accuracy is None else in_words(accuracy.model_dump())


def _changes(facts: Facts, config: TrainConfig) -> list[str]:
    """What the run does differently than the search did, as in "epochs = 120 instead of 30"."""
    return [
        f"{key} = {value} instead of {facts.searched[key]}"
        for key, value in config.model_dump().items()
        if key not in MOVABLE and facts.searched.get(key, value) != value
    ]
