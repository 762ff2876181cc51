"""Read files of torch.save safely: somebody else may have written them."""

import io
import re
import textwrap
import warnings
import zipfile
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

LEGACY_PICKLES = 4  # before the tensors' data in a file of the older format; the last is the content
MOST_CLASSES = 1000  # in one file; torch looks each of them up many times
# Sentences in torch's messages that help a programmer, not our user.
ADVICE = re.compile(
    r"(Weights only load failed|In PyTorch 2\.6|Re-running|Do it only|This file can still"
    r"|\(\d\) |Please |Alternatively|Check the documentation|Search for|For debugging|Compile with"
    r"|CUDA kernel errors|Exception raised from|frame #)"
)
UNPRINTABLE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]| at 0x[0-9a-fA-F]+")  # colours, and addresses in memory


class TorchFileError(ValueError):
    """The file cannot be read as a file of torch.save. The message is one line."""


class _Inert(type):
    """The class of StandIn, equal to `dict`. torch puts items only into what equals that."""

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is dict

    __hash__ = type.__hash__


class StandIn(list[Any], metaclass=_Inert):
    """Replaces an object whose class torch does not know. It keeps its entries and runs no code.

    It is a list, because torch appends only to lists.
    """

    entries: dict[Any, Any]  # attributes, and items of a dict

    def __new__(cls, *_: object) -> "StandIn":
        """Take any arguments, and ignore them."""
        stand_in = super().__new__(cls)
        stand_in.entries = {}
        return stand_in

    def __init__(self, *_: object) -> None:
        pass  # a list would take the arguments for its items

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.entries.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, item: object) -> None:
        pass

    def extend(self, items: object) -> None:
        pass

    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a dict's key


def load_state(data: bytes) -> dict[str, Any]:
    """Load a state dict with its tensors on the CPU. Runs no code of the file. Raises TorchFileError."""
    state = _load(data)
    if not isinstance(state, dict):
        raise TorchFileError(f"it holds no state, but a {type(state).__name__}")
    return state


def load_content(data: bytes) -> Any:
    """Load whatever was saved, with its tensors on the CPU.

    A StandIn replaces each object whose class torch does not know. Runs no code of the file or of such a
    class. Raises TorchFileError.
    """
    return _load(data, stand_in=True)


def _load(data: bytes, stand_in: bool = False) -> Any:
    try:
        _refuse_what_swells(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error says all that matters
            names = _unknown_classes(data) if stand_in else set()
            if len(names) > MOST_CLASSES:
                raise ValueError(f"it has objects of {len(names)} classes")
            with safe_globals([(_Inert(name, (StandIn,), {}), name) for name in names]):
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise TorchFileError(reason(error)) from error


def _unknown_classes(data: bytes) -> set[str]:
    """The classes in the file that torch may not know, as MODULE.NAME. Unpickles nothing."""
    if data.startswith(b"PK"):
        return set(get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
    from torch._weights_only_unpickler import get_globals_in_pkl  # late: private to torch, it may move

    file = io.BytesIO(data)
    return {name for _ in range(LEGACY_PICKLES) for name in get_globals_in_pkl(file)}


def reason(error: Exception) -> str:
    """An error of torch in one line, with its type and without torch's advice."""
    return textwrap.shorten(f"{type(error).__name__}: {said(error)}", 300)


def said(error: Exception) -> str:
    """An error of torch in one line, without its type and without torch's advice."""
    text = UNPRINTABLE.sub("", str(error))
    sentences = re.split(r"\n\s*|(?<=\.)\s+|WeightsUnpickler error:\s*", text)
    kept = " ".join(part for part in sentences if part and not ADVICE.match(part))
    return textwrap.shorten(kept, 300).removesuffix(".") or type(error).__name__


def _refuse_what_swells(data: bytes) -> None:
    """Refuse a short file that could fill the memory. torch.save writes none. Raises ValueError."""
    if b"bytearray" in data:  # torch.load allows this name, and it takes any length
        raise ValueError("it makes a bytearray")
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed")
