"""A trained network as one .safetensors file: weights of trunk and tail, configuration, attributes."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator
from torch import nn

from trainer.checkpoint import CheckpointError, State
from trainer.config import Lengthening, TrainConfig
from trainer.dataset import Dataset, Split
from trainer.files import write_atomically
from trainer.images import READER, ImageError
from trainer.kind import SAFETENSORS, kind_of
from trainer.metrics import EpochResult
from trainer.model import ModelError, as_saved, make_head, saved_names
from trainer.run import Run
from trainer.runtime import Runtime
from trainer.saving import Snapshot, Write
from trainer.stream import BLOCK, of_each, prepared, prepared_images, read_images
from trainer.torch_file import reason, said
from trainer.weights import KEY, not_finite

FORMAT = 1
# The most probable attribute of each category, by its name, with the probability.
Attributes = dict[str, tuple[str, float]]


class Description(BaseModel):
    """The metadata of a model file, as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: TrainConfig
    epoch: int  # from 0; the weights are those at its end
    val_accuracy: float | None  # of that epoch; None without validation
    attributes: list[str]
    categories: list[str]
    sizes: list[PositiveInt]  # attributes of each category
    format: int = FORMAT
    reader: int = 1  # version of the image reader that the network learned with
    val_hits: list[int] = []  # correctly predicted images of each attribute; earlier versions kept none
    facts: dict[str, Any] = {}  # what the run's maker says of it; earlier versions kept nothing
    init: str | None = None  # digest of the model file that the run began with
    lengthened: list[Lengthening] = []

    @model_validator(mode="after")
    def _each_attribute_has_a_category(self) -> Self:
        if sum(self.sizes) != len(self.attributes) or len(self.sizes) != len(self.categories):
            raise ValueError("attributes, categories and sizes are not of the same network")
        return self


class ModelFiles:
    """best.safetensors and last.safetensors of a run, in its folder.

    Give `keep` to trainer.loop.train, which asks it after each epoch. The best epoch has the highest
    average per-class accuracy. A run without validation has only last.safetensors. The files keep
    `facts`, which are as in JSON, as they are given.
    """

    def __init__(self, folder: Path, dataset: Dataset, facts: Mapping[str, Any] | None = None) -> None:
        self._folder, self._dataset, self._facts = folder, dataset, dict(facts or {})

    def keep(self, run: Run, result: EpochResult) -> Write | None:
        """What writes the files that this epoch changes. A network that has diverged changes none."""
        if not result.finite:
            return None
        earlier = [past.val_accuracy for past in run.history if past.epoch < result.epoch]
        is_best = result.validated and result.val_accuracy > max(earlier, default=-1.0)
        is_changed = {"best": is_best, "last": result.epoch + 1 == run.config.epochs}
        names = [name for name, changed in is_changed.items() if changed]

        def write(snapshot: Snapshot) -> None:
            self._folder.mkdir(parents=True, exist_ok=True)
            data = self._bytes(run, snapshot.state, result)
            for name in names:
                write_atomically(self._folder / f"{name}.safetensors", data)

        return write if names else None

    def check(self, run: Run) -> None:
        """Check that no file is of a later epoch by another schedule. Raises CheckpointError.

        A run that is killed after it has written a file, and before its checkpoint, trains that epoch
        again. By another schedule the epoch would be another, and the best model would be of none.
        """
        for name in ("best", "last"):
            path = self._folder / f"{name}.safetensors"
            with suppress(ModelError):  # absent, or damaged, which is no matter
                found = _read(path, with_tensors=False)[0]
                epochs, done = found.config.epochs, len(run.history)
                if found.epoch >= done and epochs != run.config.epochs:
                    raise CheckpointError(
                        f"{path}: is of epoch {found.epoch + 1} of {epochs}, and no checkpoint has "
                        f"more than {done}; first go on with --epochs {epochs} past that epoch, or give "
                        "another --run"
                    )

    def _bytes(self, run: Run, state: State, result: EpochResult) -> bytes:
        description = Description(
            config=run.config,
            epoch=result.epoch,
            val_accuracy=result.val_accuracy if result.validated else None,
            attributes=list(self._dataset.attributes),
            categories=list(self._dataset.categories),
            sizes=list(self._dataset.sizes),
            reader=READER,
            val_hits=list(result.val_hits),
            facts=self._facts,
            init=run.init,
            lengthened=run.lengthened,
        )
        trunk = state["trunk"] or run.trunk.state_dict()  # which is the run's own, or never changes
        named = as_saved(trunk, state["tail"])
        tensors = {name: tensor.cpu().contiguous() for name, tensor in named.items()}
        return safetensors.torch.save(tensors, {KEY: json.dumps(description.model_dump())})


class SavedModel:
    """A network from a file of `ModelFiles`, ready to predict. Raises ModelError."""

    def __init__(self, path: Path, device: torch.device | None = None) -> None:
        self.description, state = _read(path)
        self.config = self.description.config
        self._runtime = Runtime(
            self.config.model_copy(update={"weights": "none", "compile": "none"}), device
        )
        backbone = self._runtime.backbone
        self._trunk, stages = backbone.split(self.config.trainable)
        outputs = sum(self.description.sizes)
        head = make_head(backbone.features, outputs, self.config.dropout, torch.Generator())
        self._tail = nn.Sequential(stages, head)
        for name, module in (("trunk", self._trunk), ("tail", self._tail)):
            prefix = f"{name}."
            tensors = {
                key.removeprefix(prefix): tensor
                for key, tensor in state.items()
                if key.startswith(prefix)
            }
            try:
                module.load_state_dict(tensors)
            except RuntimeError as error:
                raise ModelError(
                    f"{path}: its tensors are not those of its configuration ({reason(error)}); give a "
                    "run of: atelier train"
                ) from None
            self._runtime.place(module).eval()
        if problem := not_finite(saved_names(self._trunk, self._tail)):
            raise ModelError(f"{path}: {problem}; give a run of: atelier train that did not diverge")
        self._frozen = self._runtime.freeze(self._trunk)

    @property
    def head(self) -> Mapping[str, torch.Tensor]:
        """The head's state dict."""
        return self._tail[1].state_dict()

    def check(self, dataset: Dataset) -> None:
        """Check that the dataset has the attributes that the network learned. Raises ModelError."""
        if dataset.attributes != tuple(self.description.attributes):
            raise ModelError(
                f"{dataset.folder} has other attributes than the run was trained on; give its dataset "
                "with --data"
            )

    def predict(self, dataset: Dataset, split: Split, cache: Path, flip: bool = False) -> np.ndarray:
        """Predict the attributes of a split's images, in file order: int64 [images, categories].

        With `flip`, the logits of an image and of its mirror image are averaged. Raises ImageError.
        """
        path = prepared_images(dataset, split, self.config.image_size, cache)
        parts = []
        for start in range(0, len(split), BLOCK):
            block = read_images(path, np.arange(start, min(start + BLOCK, len(split))))
            parts.append(self.logits(block, flip))
        slices = torch.split(torch.cat(parts), [*dataset.sizes], 1)
        return torch.stack([part.argmax(1) for part in slices], 1).numpy()

    def logits(self, images: torch.Tensor, flip: bool = False) -> torch.Tensor:
        """Logits of prepared images, uint8 [n, 3, size, size]: float [n, attributes], on the host.

        With `flip` they are averaged with those of the mirror images.
        """
        logits = self._logits(images)
        return (logits + self._logits(images.flip(3))) / 2 if flip else logits

    def look_at(self, pictures: Sequence[Path], flip: bool = False) -> Iterator[Attributes | ImageError]:
        """What each picture shows, or why it cannot be read. `flip` is that of `logits`."""
        for start in range(0, len(pictures), BLOCK):
            images = list(of_each(pictures[start : start + BLOCK], self._prepared))
            usable = [image for image in images if isinstance(image, torch.Tensor)]
            found = self._attributes(torch.stack(usable), flip) if usable else iter(())
            yield from (image if isinstance(image, ImageError) else next(found) for image in images)

    def as_timm(self) -> nn.Module:
        """timm's own model of the architecture, with our head in the place of its classifier.

        It shares the weights, and is in eval mode.
        """
        whole = self._runtime.backbone.whole
        classifier = str(whole.pretrained_cfg["classifier"])  # type: ignore[index]
        setattr(whole, classifier, self._tail[1])
        return whole.eval()

    def _prepared(self, picture: Path) -> torch.Tensor | ImageError:
        try:
            return prepared(picture, self.config.image_size)
        except ImageError as error:
            return error

    def _attributes(self, images: torch.Tensor, flip: bool) -> Iterator[Attributes]:
        description = self.description
        attributes = iter(description.attributes)
        names = [list(itertools.islice(attributes, size)) for size in description.sizes]
        slices = torch.split(self.logits(images, flip), description.sizes, 1)
        best = [part.softmax(1).max(1) for part in slices]
        for row in range(len(images)):
            yield {
                category: (of_category[int(indices[row])], float(shares[row]))
                for category, of_category, (shares, indices) in zip(
                    description.categories, names, best, strict=True
                )
            }

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = self._runtime.features(self._frozen, images)
            return self._runtime.logits(self._tail, features).cpu()


def _read(path: Path, with_tensors: bool = True) -> tuple[Description, dict[str, torch.Tensor]]:
    """A file's description, and its tensors if they are asked for. Raises ModelError."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
            names = file.keys() if with_tensors else []
            state = {name: file.get_tensor(name) for name in names}
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({said(error)}); give a run of: atelier train"
        ) from None
    except safetensors.SafetensorError as error:
        kind = kind_of(path)
        fault = f"is {kind}" if kind not in (None, SAFETENSORS) else f"cannot be read ({said(error)})"
        raise ModelError(f"{path}: {fault}; give a run of: atelier train") from None
    if text is None:
        raise ModelError(f"{path}: has no configuration inside; give a run of: atelier train")
    return _described(path, text), state


def _described(path: Path, text: str) -> Description:
    """Read the metadata. Raises ModelError."""
    try:
        values = json.loads(text)
        file_format = values["format"]
        if file_format == FORMAT:
            return Description(**values)
    except (LookupError, RecursionError, TypeError, ValueError) as error:  # ValueError: pydantic's too
        raise ModelError(
            f"{path}: its configuration cannot be read ({reason(error)}); give a run of: atelier train"
        ) from None
    raise ModelError(
        f"{path}: has format {file_format!r}, this version reads {FORMAT}; use the version that wrote it"
    )
