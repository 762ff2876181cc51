"""Load a network's weights from a file, whatever the file wraps them in.

A tensor's name is its path through the file's dicts, joined by dots. So every wrapper becomes a prefix
of the names, such as `state_dict.` or `module.`. The tensors are taken from the prefix that has every
tensor of the network in the right shape.
"""

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch

from trainer.kind import SAFETENSORS, kind_of, not_weights
from trainer.torch_file import StandIn, TorchFileError, load_content, reason

log = logging.getLogger(__name__)

ANEW = "with: torch.save(model.state_dict(), FILE)"
KEY = "atelier"  # in the metadata of our model files, with JSON as its value
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DEEPEST = 12  # levels of nested dicts
CHECKPOINT_KEYS = {"tail", "trunk", "optimizer", "history"}  # which every run's checkpoint has
BACKBONE_KEYS = ("backbone", "arch", "architecture", "model_name")  # ours and those of other programs

Tensors = Mapping[str, torch.Tensor]


class WeightsError(ValueError):
    """A file has no weights for a network. The message is one line, to go after the file's name."""


def load_weights(
    path: Path, backbone: str, spellings: Sequence[Tensors], usual_names: Collection[str]
) -> None:
    """Fill a network's tensors with those of a file. Raises WeightsError.

    After an error some tensors may be filled. Each spelling gives other names to the same tensors of the
    network, and a file uses one of the spellings. Tensors of integers may be absent.

    The log says what was taken and what is not the backbone's. It says nothing about a file in the first
    spelling whose other names are all in `usual_names`.
    """
    try:
        if problem := not_weights(path):
            raise WeightsError(problem)
        file = _read_safetensors(path) if kind_of(path) == SAFETENSORS else _read_torch(path)
    except OSError as error:
        raise WeightsError(
            f"cannot be read ({error.strerror or error}); mend that, or give another file"
        ) from None
    if file.is_ours and file.is_of_another(backbone):
        raise WeightsError(f"is from a run with {_few([file.of_what])}; give weights of {backbone}")
    candidates = [c for spelling in spellings for c in _candidates(file.tensors, spelling)]
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        raise WeightsError(_why_nothing_fits(file, backbone, candidates))
    taken = fitting[0]
    if different := [candidate for candidate in fitting if not candidate.equals(taken)]:
        places = " and ".join(candidate.place for candidate in [taken, *different][:4])
        raise WeightsError(
            f"has weights that fit {places}, and they differ; save those that you mean in a file of "
            "their own"
        )
    taken.fill()
    unused = [name.removeprefix(taken.prefix) for name in file.tensors if name not in taken.used]
    if taken.prefix or taken.spelling is not spellings[0] or not set(unused) <= set(usual_names):
        of = f" (the file names {_few([file.of_what])})" if file.is_of_another(backbone) else ""
        rest = f"; not of the backbone: {_few(unused)}" if unused else ""
        log.info("weights = %r%s: the backbone's are %s%s", str(path), of, taken.place, rest)


def not_finite(tensors: Tensors) -> str | None:
    """Say in a few words which values are NaN or infinite. None if all are finite."""
    wrong = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if not wrong:
        return None
    first = tensors[wrong[0]]
    count = first.numel() - int(first.isfinite().sum())
    more = f", and some of {len(wrong) - 1} more tensors" if len(wrong) > 1 else ""
    return f"{count} of the {first.numel()} values of {wrong[0]}{more} are NaN or infinite"


@dataclass
class _File:
    """What is in a file of weights."""

    about: object  # what it says about itself, if that is a dict
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)  # classes of whole networks
    is_a_model: bool = False  # written by a run of ours
    _seen: set[int] = field(default_factory=set)  # by id: a dict can be there twice, or inside itself

    def gather(self, value: object, prefix: str = "", depth: int = DEEPEST) -> None:
        """Add the tensors of a part of the content. Raises WeightsError."""
        if isinstance(value, torch.Tensor):
            name = prefix.removesuffix(".")
            if name in self.tensors:
                raise WeightsError(
                    f"has two tensors by the name {_few([name])}; save the one that you mean"
                )
            if not value.is_nested:  # a nested tensor has no shape
                self.tensors[name] = value
        elif isinstance(value, StandIn) and "_modules" in value.entries:
            self.modules.append(type(value).__name__)
        elif depth and id(value) not in self._seen:
            self._seen.add(id(value))
            for key, inner in _items(value):
                if isinstance(key, str | int):
                    self.gather(inner, f"{prefix}{key}.", depth - 1)

    @property
    def is_a_checkpoint(self) -> bool:
        return isinstance(self.about, dict) and self.about.keys() >= CHECKPOINT_KEYS

    @property
    def _config(self) -> object:
        return self.about.get("config") if isinstance(self.about, dict) else None

    @property
    def is_ours(self) -> bool:
        """Whether a run of ours wrote it: a model or a checkpoint."""
        return isinstance(self.about, dict) and (self.is_a_model or self.is_a_checkpoint)

    @property
    def of_what(self) -> str:
        """The backbone that the file names as its own. Empty if it names none."""
        config = self._config
        places = [place for place in (config, self.about) if isinstance(place, dict)]
        values = (place.get(key) for key in BACKBONE_KEYS for place in places)
        return next((value for value in values if isinstance(value, str)), "")

    def is_of_another(self, backbone: str) -> bool:
        """Whether the file names a backbone other than this."""
        bases = {name.partition(".")[0] for name in (self.of_what, backbone)}
        return bool(self.of_what) and len(bases) > 1


def _items(value: object) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, StandIn):
        return value.entries.items()
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list | tuple) else ()


def _read_safetensors(path: Path) -> _File:
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise WeightsError(f"cannot be read ({reason(error)}); get the file again") from None
    try:
        about = json.loads(metadata.get(KEY, "{}"))
    except (RecursionError, ValueError):
        about = None
    return _File(about, tensors, is_a_model=KEY in metadata)


def _read_torch(path: Path) -> _File:
    try:
        content = load_content(path.read_bytes())
    except TorchFileError as error:
        if "persistent_load" in str(error):  # the older format's way to save a network's class
            raise WeightsError(f"holds a whole network, not its weights; save them {ANEW}") from None
        raise WeightsError(
            f"cannot be read ({error}); get the file again, or save it anew {ANEW}"
        ) from None
    file = _File(content)
    file.gather(content)
    return file


@dataclass(frozen=True)
class _Candidate:
    """A file's tensors under one prefix, matched with the tensors of one spelling."""

    tensors: Tensors  # of the file
    prefix: str
    spelling: Tensors
    needed: Tensors  # those of the spelling that the file must have

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needed if self.prefix + name not in self.tensors]

    @property
    def unfit(self) -> list[str]:
        """The names whose tensors have another shape in the file."""
        present = self.needed.keys() - self.missing
        return [n for n in self.needed if n in present and self.in_file(n).shape != self.needed[n].shape]

    @property
    def fits(self) -> bool:
        return not self.missing and not self.unfit

    @property
    def place(self) -> str:
        return f"under '{_few([self.prefix])}'" if self.prefix else "at the top"

    @property
    def used(self) -> set[str]:
        return {self.prefix + name for name in self.spelling}

    def in_file(self, name: str) -> torch.Tensor:
        """The file's tensor for a tensor of the network, by its name in the spelling."""
        return self.tensors[self.prefix + name]

    def equals(self, other: "_Candidate") -> bool:
        """Whether another candidate that fits gives the network the same values."""
        others = {id(target): other.in_file(name) for name, target in other.needed.items()}
        pairs = ((self.in_file(name), others[id(target)]) for name, target in self.needed.items())
        return all(
            a is b or (a.dtype == b.dtype and _is_plain(a) and torch.equal(a, b)) for a, b in pairs
        )

    def fill(self) -> None:
        """Copy the file's values into the network. Raises WeightsError."""
        for name in self.needed:
            tensor = self.in_file(name)
            if tensor.dtype not in DTYPES or not _is_plain(tensor):
                allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
                what = f"{_few([self.prefix + name])} is {_kind(tensor)}"
                raise WeightsError(f"{what}; allowed are dense tensors of {allowed}")
        with torch.no_grad():
            for name, target in self.spelling.items():
                source = self.tensors.get(self.prefix + name)
                if source is not None and source.shape == target.shape and _is_plain(source):
                    target.copy_(source)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is dense, real and unquantized, with its values on the CPU."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return plain and not tensor.is_quantized and not tensor.is_complex()


def _kind(tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        return "without values"
    what = tensor.dtype if tensor.layout == torch.strided else tensor.layout
    return f"of {str(what).removeprefix('torch.')}"


def _candidates(tensors: Tensors, spelling: Tensors) -> Iterator[_Candidate]:
    """The candidates of one spelling: those under the prefixes that have the most of its names."""
    needed = {name: tensor for name, tensor in spelling.items() if tensor.is_floating_point()}
    names_by_prefix: Counter[str] = Counter()
    for name in tensors:
        start, dots = 0, name.count(".")
        for _ in range(dots + 1):
            if name[start:] in needed:
                names_by_prefix[name[:start]] += 1
            start = name.find(".", start) + 1
    most = max(names_by_prefix.values(), default=0)
    for prefix, count in names_by_prefix.items():
        if count == most:
            yield _Candidate(tensors, prefix, spelling, needed)


def _why_nothing_fits(file: _File, backbone: str, candidates: list[_Candidate]) -> str:
    if file.modules:
        return f"holds a whole {_few(file.modules[:1])}, not its weights; save them {ANEW}"
    if file.is_a_checkpoint and not file.is_of_another(backbone):
        return "is a checkpoint and has only a run's trained part; give the run's best.safetensors"
    of = f"names {_few([file.of_what])} as its backbone, and " if file.is_of_another(backbone) else ""
    return f"{of}{_miss(file, candidates)}; give weights of {backbone}"


def _miss(file: _File, candidates: list[_Candidate]) -> str:
    """What the candidate that comes nearest lacks."""
    if not file.tensors:
        return "holds no tensors"
    if not candidates:
        names = _few(list(file.tensors)) or "a tensor without a name"
        return f"has none of the backbone's tensors, but {names}"
    nearest = min(candidates, key=lambda candidate: len(candidate.missing) + len(candidate.unfit))
    if nearest.missing:
        lacking, needed = len(nearest.missing), len(nearest.needed)
        return f"lacks {lacking} of the backbone's {needed} tensors: {_few(nearest.missing)}"
    first = nearest.unfit[0]
    name = _few([nearest.prefix + first])
    shape, needed_shape = (
        list(tensor.shape) for tensor in (nearest.in_file(first), nearest.needed[first])
    )
    return f"{name} is of shape {shape}, and the backbone's of {needed_shape}"


def _few(names: list[str]) -> str:
    """Some of a file's names, shortened for a message."""
    shown = ", ".join(repr(name)[1:-1][:80] for name in names[:2])
    return shown + (f" and {len(names) - 2} more" if len(names) > 2 else "")
