"""What is made of an image file, against arrays that were turned and coloured by other means."""

import io
import struct

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from trainer import stream
from trainer.dataset import read_dataset
from trainer.images import ImageError, load_image
from trainer.stream import prepared_images, read_images

# How an upright array lies in a file of each orientation (EXIF 2.3, 4.6.4): rows and columns that the
# 0th row and the 0th column of the file are.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[:, ::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[::-1].transpose(1, 0, 2),
}
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "TIFF LZW": {"compression": "tiff_lzw"}}
LOSSY = {"JPEG": {"quality": 95, "subsampling": 0}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}


def garment():
    """Upright, and like itself in no other position; flat, so that a JPEG keeps it."""
    image = np.full((48, 32, 3), 200, np.uint8)
    image[:16, :16], image[32:, 16:], image[:16, 16:] = (250, 20, 20), (20, 20, 250), (20, 160, 20)
    return image


def turned(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def put(folder, image, name, **options):
    path = folder / "image"
    image.save(path, name.split()[0], **options)
    return path


def apart(found, wanted):
    """How far two arrays are apart, on average: a codec blurs edges."""
    return np.abs(found.astype(int) - wanted).mean()


def pixels(path):
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
def test_an_image_stands_upright(name, orientation, tmp_path):
    lying = Image.fromarray(np.ascontiguousarray(STORED[orientation](garment())))
    path = put(tmp_path, lying, name, exif=turned(orientation), **(LOSSLESS | LOSSY)[name])
    found = pixels(path)
    assert found.shape == (48, 32, 3)
    assert apart(found, garment()) <= (0 if name in LOSSLESS else 3)


def test_the_orientation_may_stand_in_xmp(tmp_path):
    lying = Image.fromarray(np.ascontiguousarray(STORED[6](garment())))
    path = put(tmp_path, lying, "WEBP", lossless=True, xmp=b'<x tiff:Orientation="6"/>')
    assert np.array_equal(pixels(path), garment())


def test_an_orientation_that_is_none_turns_nothing(tmp_path):
    image = Image.fromarray(garment())
    for orientation in (0, 9, 77):
        assert np.array_equal(pixels(put(tmp_path, image, "PNG", exif=turned(orientation))), garment())
    for junk in (
        b"",
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12",
    ):
        assert np.array_equal(pixels(put(tmp_path, image, "PNG", exif=junk)), garment())


def swapped_profile():
    """An RGB profile in which the numbers for red and for green stand for each other's colour."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = {bytes(data[at : at + 4]): at + 4 for at in range(132, 132 + 12 * data[131], 12)}
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    data[red : red + 8], data[green : green + 8] = data[green : green + 8], data[red : red + 8]
    return bytes(data)


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
def test_colours_are_those_of_the_profile(name, tmp_path):
    image = Image.fromarray(garment())
    path = put(tmp_path, image, name, icc_profile=swapped_profile(), **(LOSSLESS | LOSSY)[name])
    assert apart(pixels(path), garment()[..., [1, 0, 2]]) <= (1 if name in LOSSLESS else 4)
    for profile in (b"junk", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        path = put(tmp_path, image, name, icc_profile=profile, **(LOSSLESS | LOSSY)[name])
        assert apart(pixels(path), garment()) <= (1 if name in LOSSLESS else 4)


def linear_grey():
    """A profile in which grey is linear in light: ICC.1:2010, 7.2, 8.5 and 10.5."""
    xyz = b"XYZ \0\0\0\0" + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    tags = {b"wtpt": xyz, b"kTRC": b"curv" + bytes(8)}  # a curve of no points is a straight line
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(data), len(content))
        data += content
    header = struct.pack(
        ">I4sI4s4s4s12x4s", start + len(data), b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ", b"acsp"
    )
    light = struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    return header.ljust(68, b"\0") + light.ljust(60, b"\0") + struct.pack(">I", len(tags)) + table + data


@pytest.mark.parametrize("bits", [8, 16])
def test_greys_are_those_of_the_profile(bits, tmp_path):
    image = Image.fromarray(GREY if bits == 8 else GREY.astype(np.uint16) * 257)
    found = pixels(put(tmp_path, image, "PNG", icc_profile=linear_grey())).astype(int)
    light = GREYS / 255
    seen = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(found - 255 * seen).mean() <= 1  # in the dark, 8 bits of light are few


GREY = np.repeat(np.arange(0, 256, 5, dtype=np.uint8)[np.newaxis], 4, 0)
GREYS = np.stack([GREY] * 3, 2)
SEEN = {  # (image, format, options): what a viewer shows on white, and by how much it may differ
    "grey": (Image.fromarray(GREY), "PNG", {}, GREYS, 0),
    "grey JPEG": (Image.fromarray(GREY), "JPEG", {"quality": 100}, GREYS, 2),
    "16 bits": (Image.fromarray(GREY.astype(np.uint16) << 8), "PNG", {}, GREYS, 0),
    "16 bits, TIFF": (Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF", {}, GREYS, 0),
    "1 bit": (Image.fromarray(GREY > 127), "PNG", {}, (GREYS > 127) * np.uint8(255), 0),
    "1 bit, TIFF": (Image.fromarray(GREY > 127), "TIFF", {}, (GREYS > 127) * np.uint8(255), 0),
    "palette": (Image.fromarray(GREY).convert("P"), "PNG", {}, GREYS, 0),
    "GIF": (Image.fromarray(GREY), "GIF", {}, GREYS, 0),
    "CMYK": (Image.fromarray(GREYS).convert("CMYK"), "TIFF", {}, GREYS, 1),
    "CMYK JPEG": (Image.fromarray(GREYS).convert("CMYK"), "JPEG", {"quality": 100}, GREYS, 4),
    "YCbCr": (Image.fromarray(GREYS).convert("YCbCr"), "TIFF", {}, GREYS, 1),
    "WebP": (Image.fromarray(GREYS), "WEBP", {"lossless": True}, GREYS, 0),
    "BMP": (Image.fromarray(GREYS), "BMP", {}, GREYS, 0),
    "AVIF": (Image.fromarray(GREYS), "AVIF", {"quality": 100}, GREYS, 2),
    "opaque": (Image.fromarray(np.dstack([GREYS, GREY * 0 + 255])), "PNG", {}, GREYS, 0),
    "transparent": (Image.fromarray(np.dstack([GREYS, GREY * 0])), "PNG", {}, GREYS * 0 + 255, 0),
    "half transparent": (
        Image.fromarray(np.dstack([GREYS * 0, GREY])),
        "WEBP",
        {"lossless": True, "exact": True},
        255 - GREYS,
        0,
    ),
    "grey, transparent": (
        Image.merge("LA", [Image.fromarray(GREY * 0), Image.fromarray(GREY)]),
        "PNG",
        {},
        255 - GREYS,
        0,
    ),
    "a colour that is transparent": (
        Image.fromarray(GREYS),
        "PNG",
        {"transparency": (50, 50, 50)},
        np.where(GREYS == 50, np.uint8(255), GREYS),
        0,
    ),
    "a palette's colour that is transparent": (
        Image.fromarray(GREY),
        "GIF",
        {"transparency": 50},
        np.where(GREYS == 50, np.uint8(255), GREYS),
        0,
    ),
    "a grey that is transparent": (
        Image.fromarray(GREY),
        "PNG",
        {"transparency": 50},
        np.where(GREYS == 50, np.uint8(255), GREYS),
        0,
    ),
}


@pytest.mark.parametrize("name", SEEN)
def test_an_image_looks_as_in_a_viewer(name, tmp_path):
    image, kind, options, wanted, most = SEEN[name]
    found = pixels(put(tmp_path, image, kind, **options)).astype(int)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= most


def test_a_preview_in_a_jpeg_is_passed_over(tmp_path):
    image = Image.fromarray(garment())
    path = put(tmp_path, image, "MPO", quality=95, save_all=True, append_images=[image.resize((8, 8))])
    assert apart(pixels(path), garment()) <= 3


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PLAIN = Image.new("RGB", (16, 16))


def odd_tiff(bits=16, black_is_0=1):
    """16 x 16 greys of 16 bits, or of 12 in so many bytes (TIFF 6.0, section 4)."""
    data = bytes(16 * 16 * bits // 8)
    entries = [(256, 3, 16), (257, 3, 16), (258, 3, bits), (259, 3, 1), (262, 3, black_is_0)]
    entries += [(273, 4, 8 + 2 + 8 * 12 + 4), (278, 3, 16), (279, 4, len(data))]
    table = b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack("<H2x" if kind == 3 else "<I", value)
        for tag, kind, value in entries
    )
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + data


SIXTEEN = Image.fromarray(np.zeros((4, 4), np.uint16))
REFUSED = {
    "12 bits": (odd_tiff(bits=12), "mode I;16"),
    "16 bits with white at 0": (odd_tiff(black_is_0=0), "mode I;16"),
    "16 bits, of which one is transparent": (saved(SIXTEEN, "PNG", transparency=7), "mode I;16"),
    "floats": (saved(Image.new("F", (4, 4)), "TIFF"), "mode F"),
    "32 bits": (saved(Image.new("I", (4, 4)), "TIFF"), "mode I"),
    "LAB": (saved(Image.new("LAB", (4, 4)), "TIFF"), "mode LAB"),
    "animation": (
        saved(PLAIN, "GIF", save_all=True, append_images=[Image.new("RGB", (16, 16), "red")]),
        "2 pi",
    ),
    "pages": (saved(PLAIN, "TIFF", save_all=True, append_images=[PLAIN]), "2 pictures in one file"),
    "truncated": (saved(Image.fromarray(garment()), "PNG")[:60], "cannot be read"),
    "damaged": (b"\x89PNG\r\n\x1a\n" + bytes(30), "is of no known kind, or damaged; allowed are JPEG"),
    "empty": (b"", "is an empty file"),
    "text": (b"an apology", "is of no known kind"),
    "failed download": (b"<!DOCTYPE html><html>404", "is an HTML page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "drawing": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG image; allowed are JPEG"),
    "of a telephone": (struct.pack(">I", 24) + b"ftypheic" + bytes(12), "is a HEIC image; allowed"),
    "too large": (
        saved(Image.new("1", (6000, 6000)), "PNG"),
        "6000 x 6000 pixels, allowed are 25,000,000",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_one_meaning_is_refused(name, tmp_path):
    data, expected = REFUSED[name]
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        load_image(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ordinary_images_are_what_they_were(real_data):
    for path in sorted((real_data / "img").iterdir())[::40]:
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), pixels(path)), path


def test_images_that_lie_are_trained_and_predicted_upright(demo, tmp_path):
    """Both take their images from `prepared_images`."""
    dataset = read_dataset(demo)
    val, folder = dataset.splits["val"], tmp_path / "lying"
    for path in val.paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        upright = np.asarray(load_image(demo / path))
        lying = Image.fromarray(np.ascontiguousarray(STORED[6](upright)))
        lying.save(folder / path, "PNG", exif=turned(6))
    (folder / "split").symlink_to(demo / "split")
    for path in dataset.splits["train"].paths:
        (folder / path).symlink_to(demo / path)
    both = [
        read_images(prepared_images(one, one.splits["val"], 32, tmp_path), np.arange(len(val)))
        for one in (dataset, read_dataset(folder))
    ]
    assert (both[0] == both[1]).all()


def test_a_cache_of_another_reader_is_passed_over(demo, tmp_path, monkeypatch):
    dataset = read_dataset(demo)
    monkeypatch.setattr(stream, "READER", 1)
    old = prepared_images(dataset, dataset.splits["val"], 32, tmp_path)
    monkeypatch.undo()
    assert prepared_images(dataset, dataset.splits["val"], 32, tmp_path) != old
