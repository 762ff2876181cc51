"""Load an image as viewers show it: upright, in sRGB, on white. Or say why that is impossible."""

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from trainer.kind import IMAGES, kind_of

# The version of this reader. It is stored with everything that depends on the pixels that it makes, such
# as prepared images and checkpoints. Version 1 ignored orientation and colour profile.
READER = 2

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MOST_PIXELS = 25_000_000  # of an image; to decode a progressive JPEG takes 10 bytes a pixel

# The modes of Pillow whose look on a screen is defined.
GREY, COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBX", "RGBA", "YCbCr", "CMYK")
SIXTEEN_BITS = ("I;16", "I;16B")
TIFF_BITS, TIFF_MEANING, TIFF_BLACK_IS_0 = 258, 262, 1  # TIFF 6.0, section 8
UPRIGHT = {  # what turns an image upright, by its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """A file cannot be used as an image. The message is one line and names the file."""


def load_image(path: Path) -> Image.Image:
    """Decode an image to RGB. Raises ImageError."""
    with _errors_of(path), path.open("rb") as file:
        return _decode(path, file)


def image_digest(path: Path) -> bytes:
    """The SHA-256 of an image file, which is decoded to check it. Raises ImageError."""
    with _errors_of(path), path.open("rb") as file:
        _decode(path, file)
        file.seek(0)
        return hashlib.file_digest(file, "sha256").digest()


def _decode(path: Path, file: BinaryIO) -> Image.Image:
    # Pillow's warnings would add lines to the user's output.
    with warnings.catch_warnings(action="ignore"), Image.open(file, formats=FORMATS) as image:
        _check(path, image)  # before its pixels take memory
        image.load()
        turn = UPRIGHT.get(_orientation(image))
        shown = _on_white(image)
        return shown if turn is None else shown.transpose(turn)


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Turn every error in reading an image into an ImageError that names the file."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        kind = kind_of(path)
        problem = "is of no known kind, or damaged" if kind in (None, *IMAGES) else f"is {kind}"
        raise ImageError(
            f"{path}: {problem}; allowed are {', '.join(FORMATS)}: save it anew, or get it again"
        ) from None
    except Image.DecompressionBombError:
        raise ImageError(
            f"{path}: too large; allowed are {MOST_PIXELS:,} pixels; make it smaller"
        ) from None
    except Exception as error:  # what a damaged image raises depends on where it is damaged
        raise ImageError(f"{path}: cannot be read ({error}); save it anew, or get it again") from None


def _check(path: Path, image: Image.Image) -> None:
    if image.width * image.height > MOST_PIXELS:
        size = f"{image.width} x {image.height}"
        raise ImageError(f"{path}: {size} pixels, allowed are {MOST_PIXELS:,} in all; make it smaller")
    if image.mode not in (*GREY, *COLOUR, *SIXTEEN_BITS) or _is_odd_grey(image):
        raise ImageError(
            f"{path}: pixels of mode {image.mode} whose look on a screen is not defined; "
            "save it in grey or RGB, with 8 bits"
        )
    # In a JPEG, pictures after the first are previews, or the other half of a stereo picture.
    frames = 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
    if frames > 1:
        raise ImageError(f"{path}: {frames} pictures in one file; save the one that is meant")


def _is_odd_grey(image: Image.Image) -> bool:
    """Whether a 16-bit image is not plain grey: it uses 12 bits, has white at 0, or is transparent."""
    if image.mode not in SIXTEEN_BITS:
        return False
    tags = getattr(image, "tag_v2", {TIFF_BITS: (16,), TIFF_MEANING: TIFF_BLACK_IS_0})
    swapped = tags.get(TIFF_MEANING) != TIFF_BLACK_IS_0
    return swapped or tags.get(TIFF_BITS) != (16,) or "transparency" in image.info


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, or 1 for upright if there is none. Pillow turns a TIFF itself.

    ImageOps.exif_transpose is not used, because it rewrites the EXIF, which fails for some cameras.
    """
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # with a damaged EXIF, viewers show the image as if it had none
        return 1


def _on_white(image: Image.Image) -> Image.Image:
    """Convert to RGB in sRGB, with white where the image is transparent."""
    if not image.has_transparency_data:
        return _in_srgb(image)
    white = Image.new("RGB", image.size, "white")
    return Image.composite(_in_srgb(image), white, image.convert("RGBA").getchannel("A"))


def _in_srgb(image: Image.Image) -> Image.Image:
    """Convert to RGB in sRGB, by the image's colour profile if it has one that fits."""
    profile = image.info.get("icc_profile")
    if image.mode in SIXTEEN_BITS:  # the upper byte, as Pillow does for 16-bit colours
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not profile:
        return image if image.mode == "RGB" else image.convert("RGB")
    mode = "L" if image.mode in (*GREY, *SIXTEEN_BITS) else "CMYK" if image.mode == "CMYK" else "RGB"
    colours = image.convert(mode)
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(
            colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError):  # damaged, or for other colours: go without it
        return colours.convert("RGB")
    assert converted is not None  # it is None only for a conversion in place
    return converted
