"""The page of images: what a trial got right and wrong, image by image, and its confusion matrices."""

from dataclasses import asdict, fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from flask import Blueprint, Response, abort, request

from dashboards.arguments import ArgumentError, read_choice, read_count
from dashboards.predictions import (
    ALL,
    SHOWN,
    SURE,
    Judgement,
    PredictionsError,
    Verdict,
    attribute_names,
)
from dashboards.thumbnails import PicturesError, file_names, find_pictures, thumbnail
from dashboards.web.filters import Filters
from dashboards.web.pages import find_entry, open_study
from storage.studies import StudyEntry

blueprint = Blueprint("images", __name__, url_prefix="/atelier/studies/<int:study_id>/images")

FILTERS = ("trial", "against", "category", "true", "predicted", "show")
SHOWN_AT_ONCE, MOST_PAGES = 24, 100_000
MOST_ATTRIBUTES = 40  # of a category whose confusion matrix is on the page


class Choice(NamedTuple):
    """What the address asks for. Empty texts stand for all."""

    trial: int | None  # None if no trial is complete
    against: int | None  # a second trial
    category: str
    true: str
    predicted: str
    show: str


class Shown(NamedTuple):
    """One image, and what was said of it."""

    number: int  # in the list of the split, from 0
    verdicts: list[Verdict]
    others: list[Verdict]  # of the second trial; empty without one


class Reading:
    """What an address asks for, and the predictions of its one or two trials.

    There are none if no trial is complete, if they are not here, and after a problem with the address.
    """

    def __init__(self, study_id: int, filters: Filters) -> None:
        self.entry, self.status = open_study(study_id)
        self._names = attribute_names(self.entry)
        self.choice = self._choice(filters)
        self.missing: str | None = None  # why nothing, or no picture, can be shown
        self.judgements = [] if filters.problems else self._judgements()
        self.images = self._images() if self.judgements else []

    def _choice(self, filters: Filters) -> Choice:
        category_of = {one: category for category, some in self._names.items() for one in some}
        complete = [row.number for row in self.status.completed()]
        trial = partial(_read_trial, complete=complete)
        attribute = partial(read_choice, allowed=category_of)
        choice = Choice(
            trial=filters.one("trial", trial, complete[0] if complete else None),
            against=filters.one("against", trial, None),
            category=filters.one("category", partial(read_choice, allowed=self._names), ""),
            true=filters.one("true", attribute, ""),
            predicted=filters.one("predicted", attribute, ""),
            show=filters.one("show", partial(read_choice, allowed=SHOWN), ""),
        )
        asked = {choice.category, *(category_of.get(one, "") for one in (choice.true, choice.predicted))}
        if len(asked - {""}) > 1:
            filters.problems.append(f"{', '.join(sorted(asked - {''}))}: choose from one category")
        if choice.against is not None and choice.against == choice.trial:
            filters.problems.append(f"against: trial {choice.trial} itself; choose another one")
        # Who asks for an attribute, or for differences, wants all of it, right or wrong.
        is_narrow = choice.true or choice.predicted or choice.against is not None
        return choice._replace(category=max(asked), show=choice.show or (ALL if is_narrow else SURE))

    def _judgements(self) -> list[Judgement]:
        numbers = [n for n in (self.choice.trial, self.choice.against) if n is not None]
        try:
            judgements = [Judgement.of_trial(self.entry, number) for number in numbers]
            for judgement in judgements:
                find_pictures(_folder(self.entry), judgement)
        except PredictionsError as error:
            self.missing = str(error)
            return []
        except PicturesError as error:
            self.missing = str(error)
        return judgements

    def _images(self) -> list[int]:
        """The images that are asked for, in their order: their places among those judged."""
        first, *rest = self.judgements
        choice, other = self.choice, rest[0] if rest else None
        try:
            chosen = first.choose(choice.show, choice.category, choice.true, choice.predicted, other)
        except PredictionsError as error:
            self.missing = str(error)
            return []
        return [int(image) for image in chosen]

    def shown(self, image: int) -> Shown:
        """One of them."""
        verdicts = [judgement.of(image) for judgement in self.judgements]
        number = int(self.judgements[0].images[image])
        return Shown(number, verdicts[0], verdicts[1] if len(verdicts) > 1 else [])

    def matrices(self) -> dict[str, np.ndarray]:
        """The first trial's confusion matrices, of the categories that a page can show."""
        small = [name for name, some in self._names.items() if len(some) <= MOST_ATTRIBUTES]
        return {name: one.confusion(name) for one in self.judgements[:1] for name in small}


def _read_trial(text: str, complete: list[int]) -> int:
    number = read_count(text, 0, 10**9 - 1)
    if number not in complete:
        raise ArgumentError(f"no complete trial {number}; only complete trials keep predictions")
    return number


def _folder(entry: StudyEntry) -> str:
    return entry.places.get("data", "")


@blueprint.get("")
def images(study_id: int) -> Any:
    filters = Filters(*FILTERS, "page")
    page = filters.count("page", 1, MOST_PAGES)
    reading = Reading(study_id, filters)
    found = reading.images
    return filters.page(
        "images.html",
        study_id=study_id,
        status=reading.status,
        choice=reading.choice,
        names=attribute_names(reading.entry),
        ways=SHOWN,
        shown=[
            reading.shown(image) for image in found[(page - 1) * SHOWN_AT_ONCE : page * SHOWN_AT_ONCE]
        ],
        found=len(found),
        images=sum(len(judgement) for judgement in reading.judgements[:1]),
        page=page,
        pages=-(-len(found) // SHOWN_AT_ONCE),
        matrices=reading.matrices(),
        missing=reading.missing,
    )


@blueprint.get("/<int:trial>/<int:image>.jpg")
def picture(study_id: int, trial: int, image: int) -> Response:
    """A small copy of an image, as long as the data folder has those that the trial was judged by."""
    entry = find_entry(study_id)
    folder = _folder(entry)
    try:
        judgement = Judgement.of_trial(entry, trial)
        pictures = dict(zip(judgement.images.tolist(), find_pictures(folder, judgement), strict=True))
        if image not in pictures:
            abort(404, f"Trial {trial} was not judged by image {image}; the list begins with 0.")
        response = Response(thumbnail(folder, pictures[image]), mimetype="image/jpeg")
    except (PicturesError, PredictionsError) as error:
        abort(404, str(error))
    response.add_etag()
    response.make_conditional(request)
    return response


@blueprint.get("/images.csv")
def images_table(study_id: int) -> Response:
    """What was said of all images that the address asks for, a row for each category and trial."""
    filters = Filters(*FILTERS)
    reading = Reading(study_id, filters)
    files = _files(reading)
    rows = [
        {
            "image": int(one.images[image]),
            "file": files.get(image, ""),
            "trial": one.number,
            **asdict(verdict),
        }
        for image in reading.images
        for one in reading.judgements
        for verdict in one.of(image)
    ]
    columns = ["image", "file", "trial", *(field.name for field in fields(Verdict))]
    return filters.table(f"{reading.entry.name} trial {reading.choice.trial} images", columns, rows)


def _files(reading: Reading) -> dict[int, str]:
    """The images' paths in the data folder, by place. Empty where no picture can be shown."""
    if reading.missing or not reading.judgements:
        return {}
    pictures = file_names(_folder(reading.entry), reading.judgements[0])
    return dict(enumerate(pictures))


@blueprint.get("/confusion.csv")
def confusion_table(study_id: int) -> Response:
    """The confusion matrices, a row for each pair of attributes."""
    filters = Filters(*FILTERS)
    reading = Reading(study_id, filters)
    names = attribute_names(reading.entry)
    rows = [
        {"category": category, "true": true, "predicted": predicted, "images": int(count)}
        for judgement in reading.judgements[:1]
        for category, some in names.items()
        for true, row in zip(some, judgement.confusion(category), strict=True)
        for predicted, count in zip(some, row, strict=True)
    ]
    columns = ["category", "true", "predicted", "images"]
    return filters.table(f"{reading.entry.name} trial {reading.choice.trial} confusion", columns, rows)
