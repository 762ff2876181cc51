"""The settings of one training run, and what one epoch of it reports. Imports no torch."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TrainConfig(BaseModel):
    """Every setting of one run; the values below are those of the report's search.

    `lr`, `batch_size`, `weight_decay`, `dropout` and `epsilon` are the five that a study tunes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    data: str  # folder of the dataset
    backbone: str = "seresnext50_32x4d.gluon_in1k"  # timm name, ResNet or EfficientNet family
    weights: str = "timm"  # "timm": by the name's tag; a .safetensors/.pth file; or "none"
    trainable: str = "layer4"  # the first trained stage, or "head"
    frozen_batchnorm: Literal["eval", "train"] = "eval"  # "train": batch statistics below `trainable`
    image_size: int = Field(224, ge=32, le=1024)  # pixels, square
    augment: Literal["report", "none"] = "report"  # random part of the training transform
    train_images: int | None = Field(None, ge=1)  # use only so many training images

    epochs: int = Field(30, ge=1)
    warmup_epochs: int = Field(5, ge=0)  # learning rate rises linearly from 0 in these
    seed: int = Field(0, ge=0, lt=2**32)

    lr: float = Field(0.005, gt=0)
    batch_size: int = Field(128, ge=1)
    weight_decay: float = Field(0.0008, ge=0)  # Adam's coupled L2 term
    dropout: float = Field(0.5, ge=0, lt=1)
    epsilon: float = Field(0.01, ge=0, lt=1)  # label smoothing
    smoothing: Literal["report", "uniform"] = "report"

    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on CUDA, else fp32
    allow_tf32: bool = True

    @model_validator(mode="after")
    def _warmup_leaves_epochs(self) -> "TrainConfig":
        if self.warmup_epochs >= self.epochs and self.epochs > 1:
            raise ValueError(
                f"warmup_epochs = {self.warmup_epochs} leaves nothing of epochs = {self.epochs}; "
                f"allowed is 0 to {self.epochs - 1}"
            )
        return self


TUNABLE = ("lr", "batch_size", "weight_decay", "dropout", "epsilon")


@dataclass(frozen=True)
class EpochResult:
    """What one finished epoch was like. Accuracies are fractions in [0, 1]."""

    epoch: int  # from 0
    lr: float  # of the epoch's last step
    train_loss: float
    val_loss: float
    train_accuracy: float  # average per-class accuracy, dropout and augmentation on
    val_accuracy: float  # average per-class accuracy over the whole split
    val_overall: float  # mean over categories of the plain accuracy
    val_category: tuple[float, ...]  # plain accuracy of each category
    val_hits: tuple[int, ...]  # images of each attribute that were predicted right
    seconds: float
    images: int  # training images seen
    peak_memory: int  # bytes, of the device where it counts them, else of the process

    @property
    def finite(self) -> bool:
        """False when the loss overflowed or became NaN: the trial cannot recover."""
        return abs(self.train_loss) < float("inf") and abs(self.val_loss) < float("inf")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EpochResult":
        # A checkpoint of an earlier version has no hits.
        tuples = {key: tuple(values.get(key, ())) for key in ("val_category", "val_hits")}
        return cls(**values | tuples)
