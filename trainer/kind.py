"""Tell what a file is by its bytes: people rename files, and downloads fail. Imports no torch."""

import zipfile
from pathlib import Path
from typing import BinaryIO

SAFETENSORS, TORCH = "a safetensors file", "a file of torch.save"
LONGEST_HEADER = 100_000_000  # bytes in a safetensors file's header
PROTOCOLS = (b"\2", b"\3", b"\4", b"\5")  # the protocols of pickle
TORCH_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # in torch.save's older format
UNPACK = "(unpack it first)"
POINTER = b"version https://git-lfs.github.com/"
PNG, JPEG, GIF, WEBP, AVIF = IMAGES = (
    "a PNG image",
    "a JPEG image",
    "a GIF image",
    "a WebP image",
    "an AVIF image",
)
# How to tell other files that people give by mistake: a sign's position, its bytes, the kind of file.
SIGNS = (
    (0, POINTER, "a Git LFS pointer (run: git lfs pull)"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"GGUF", "a GGUF model"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (0, b"\x1f\x8b", f"a gzip file {UNPACK}"),
    (0, b"BZh", f"a bzip2 file {UNPACK}"),
    (0, b"\xfd7zXZ\0", f"an xz file {UNPACK}"),
    (0, b"\x28\xb5\x2f\xfd", f"a zstd file {UNPACK}"),
    (0, b"7z\xbc\xaf\x27\x1c", f"a 7z archive {UNPACK}"),
    (0, b"Rar!", f"a RAR archive {UNPACK}"),
    (257, b"ustar", f"a tar archive {UNPACK}"),
    (0, b"\x89PNG\r\n", PNG),
    (0, b"\xff\xd8\xff", JPEG),
    (0, b"GIF8", GIF),
    (8, b"WEBP", WEBP),
    (4, b"ftypavif", AVIF),
    *((4, b"ftyp" + brand, "a HEIC image") for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")),
    (4, b"ftyp", "an MP4 video"),
    (0, b"%PDF", "a PDF document"),
)


def kind_of(path: Path) -> str | None:
    """What a file is by its bytes, not its name, such as "a Git LFS pointer (run: git lfs pull)".

    None for an unknown kind. Reads the first bytes, and a zip archive's list of members.
    Raises OSError.
    """
    with path.open("rb") as file:
        head = file.read(512)
        if head.startswith(b"PK\x03\x04"):
            return _kind_of_zip(file)
    if not head:
        return "an empty file (get it again)"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST_HEADER:
        return SAFETENSORS
    if head[:1] == b"\x80" and head[1:2] in PROTOCOLS:
        return TORCH if TORCH_MAGIC in head[:40] else "a pickle that is not of torch.save"
    for start, sign, kind in SIGNS:
        if head.startswith(sign, start):
            return kind
    # Its protobuf begins with the version and one of four texts.
    if head[:1] == b"\x08" and head[1:2] < b"\x20" and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x3a"):
        return "an ONNX model"
    return _kind_of_text(head.removeprefix(b"\xef\xbb\xbf").lstrip().lower())


def _kind_of_text(head: bytes) -> str | None:
    if head.startswith(b"<"):
        if b"<svg" in head:
            return "an SVG image"
        kind = "an HTML page" if b"<html" in head or b"<!doctype html" in head else "an XML text"
        return f"{kind} (of a download that failed?)"
    if head.startswith((b"{", b"[")):
        return "a JSON text, as an index of other files"
    return None


def _kind_of_zip(file: BinaryIO) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception:  # what a damaged archive raises depends on where it is damaged
        return "a zip archive that is damaged or cut off (get it again)"
    inner = {name.partition("/")[2] for name in names}  # torch puts all into one folder
    if "constants.pkl" in inner:
        return "a TorchScript archive, which is code"
    if "data.pkl" in inner:
        return TORCH
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy .npz archive"
    if "model.weights.h5" in names:
        return "a Keras model"
    return f"a zip archive {UNPACK}"


def not_weights(path: Path) -> str | None:
    """Say why a path cannot be a file of weights. None if it can be one.

    The words go after the path in a message. Does not read the whole file. Raises OSError.
    """
    if path.is_dir():
        return "is a folder; give the file of weights in it"
    if not path.is_file():
        return "no such file; give a file's path with --weights, or timm, or none"
    kind = kind_of(path)
    if kind in (SAFETENSORS, TORCH):
        return None
    return f"is {kind or 'of no known kind'}; allowed is {SAFETENSORS} or {TORCH}"
