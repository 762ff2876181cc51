"""Files of torch.save, which somebody else may have written."""

import io
import textwrap
import zipfile
from typing import Any

import torch


class TorchFileError(ValueError):
    """The bytes are none that torch.save writes of a state; the message is one line."""


def load_state(data: bytes) -> dict[str, Any]:
    """A state with its tensors on the CPU. No code of the file is run. Raises TorchFileError."""
    try:
        _refuse_what_swells(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise TorchFileError(reason(error)) from error
    if not isinstance(state, dict):
        raise TorchFileError(f"it holds no state, but a {type(state).__name__}")
    return state


def reason(error: Exception) -> str:
    """What torch says, in one line and without its advice."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


def _refuse_what_swells(data: bytes) -> None:
    """Raises ValueError for what makes gigabytes of a short file. torch.save writes neither."""
    if b"bytearray" in data:  # one of the few names that torch.load allows, and it takes any length
        raise ValueError("it makes a bytearray")
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
                raise ValueError("it is compressed")
