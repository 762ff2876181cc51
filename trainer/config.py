"""The settings of one training run. Imports no torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from trainer.text import as_on_disk


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):  # Python takes True for 1 and False for 0
        raise PydanticKnownError("float_type")
    return value


# Numbers that a user types. True and False are refused.
Whole = Annotated[int, BeforeValidator(_no_boolean)]
Real = Annotated[float, BeforeValidator(_no_boolean)]
Number = Annotated[float | int, BeforeValidator(_no_boolean)]  # keeps its type


ALL_LABELLED = "train+val"
MOST_FOLDS = 100


class TrainConfig(BaseModel):
    """Every setting of one run. The defaults are those of the report's search.

    `lr`, `batch_size`, `weight_decay`, `dropout` and `epsilon` are the five that a study tunes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    data: str  # folder of the dataset
    backbone: str = "seresnext50_32x4d.gluon_in1k"  # timm name, ResNet or EfficientNet family
    weights: str = "timm"  # "timm" for those of the name's tag, a file's path, or "none"
    trainable: str = "layer4"  # the first trained stage, or "head"
    frozen_batchnorm: Literal["eval", "train"] = "eval"  # "train": batch statistics below `trainable`
    image_size: Whole = Field(224, ge=32, le=1024)  # pixels, square
    augment: Literal["report", "none"] = "report"  # the random part of the training transform
    train_images: Whole | None = Field(None, ge=1)  # use only so many training images
    train_on: Literal["train", "train+val"] = "train"  # "train+val": the last run, not validated
    folds: Whole | None = Field(None, ge=2, le=MOST_FOLDS)  # cut train and val together into so many
    fold: Whole = Field(0, ge=0)  # of these: validate on this one, and train on the others
    unknown_labels: StrictBool = False  # labels may be -1: then the image is left out of that category

    epochs: Whole = Field(30, ge=1, le=1_000_000)
    warmup_epochs: Whole = Field(5, ge=0, le=1_000_000)  # learning rate rises linearly from 0 in these
    seed: Whole = Field(0, ge=0, lt=2**32)

    lr: Real = Field(0.005, gt=0)
    batch_size: Whole = Field(128, ge=1, le=1_000_000)
    weight_decay: Real = Field(0.0008, ge=0)  # Adam's coupled L2 term
    dropout: Real = Field(0.5, ge=0, lt=1)
    epsilon: Real = Field(0.01, ge=0, lt=1)  # label smoothing
    smoothing: Literal["report", "uniform"] = "report"

    precision: Literal["auto", "fp32", "bf16"] = "auto"  # "auto": bf16 autocast on CUDA, else fp32
    allow_tf32: StrictBool = True
    # "auto" compiles the augmentation where that saves time, and on a GPU the trunk.
    compile: Literal["auto", "none"] = "auto"
    # With "auto" a step is a CUDA graph on a GPU, which changes no number.
    graphs: Literal["auto", "none"] = "auto"

    @property
    def validates(self) -> bool:
        """Whether the run leaves images out of its training, to validate on them."""
        return self.train_on == "train"

    @property
    def train_split(self) -> str:
        """The split, or the joined splits, that has all training images."""
        return ALL_LABELLED if self.folds else self.train_on

    @property
    def val_split(self) -> str:
        """The split, or the joined splits, that has all validation images."""
        return ALL_LABELLED if self.folds else "val"

    @field_validator("data", "weights")
    @classmethod
    def _can_be_a_path(cls, path: str) -> str:
        if "\0" in path:
            raise ValueError("has a NUL character, which no path can hold; remove it")
        return path if path.isascii() and path[:1] != "~" else str(as_on_disk(Path(path)))

    @model_validator(mode="after")
    def _fold_exists(self) -> "TrainConfig":
        if self.fold >= (self.folds or 1):
            allowed = f"allowed is 0 to {self.folds - 1}" if self.folds else "give folds too"
            raise ValueError(f"fold = {self.fold} of folds = {self.folds}; {allowed}")
        if self.folds and not (self.validates and self.train_images is None):
            raise ValueError(
                f"folds = {self.folds} takes all images of train and val; leave out train_on and "
                "train_images"
            )
        return self

    @model_validator(mode="after")
    def _warmup_leaves_epochs(self) -> "TrainConfig":
        if self.warmup_epochs >= self.epochs and self.epochs > 1:
            raise ValueError(
                f"warmup_epochs = {self.warmup_epochs} leaves nothing of epochs = {self.epochs}; "
                f"allowed is 0 to {self.epochs - 1}"
            )
        return self


class Lengthening(BaseModel):
    """A run got a longer schedule than it had begun with, and goes on in that at the same position."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    before: int  # epochs of its schedule until then
    epochs: int  # from then on
    position: float  # where that was, in epochs from the start


# Changes with whatever changes a bit of a curve. Studies and checkpoints of another version are refused.
ARITHMETIC = 2
CHECKPOINT_SECONDS = 20.0  # of work that may be unsaved, where epochs are shorter
TUNABLE = ("lr", "batch_size", "weight_decay", "dropout", "epsilon")
