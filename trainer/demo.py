"""A generated dataset of drawn garments, in the layout of the real one.

Every picture shows its six attributes by shape or pattern, never by hue alone, because training changes
hues. A small network can learn them, and nothing has to be downloaded.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from trainer.dataset import DatasetError

CATEGORIES = {
    "texture": ("floral", "graphic", "striped", "embroidered", "pleated", "solid", "lattice"),
    "sleeve": ("long_sleeve", "short_sleeve", "sleeveless"),
    "length": ("maxi_length", "mini_length", "no_dress"),
    "neckline": ("crew_neckline", "v_neckline", "square_neckline", "no_neckline"),
    "fabric": ("denim", "chiffon", "cotton", "leather", "faux", "knit"),
    "fit": ("tight", "loose", "conventional"),
}
# How often each attribute occurs, in the order above. They are unequal, as in real data.
SHARES = (
    (4, 4, 3, 2, 2, 12, 1.5),
    (4, 3, 6),
    (3, 4, 7),
    (6, 4, 1.5, 5),
    (3, 4, 9, 2, 1.5, 3),
    (4, 2, 6),
)
WIDTH, HEIGHT = 192, 256  # pixels of the drawing; the training crop shows x 28-164, y 43-213
QUALITY = 90  # of the JPEG
NOISE = 2.5  # standard deviation of the brightness noise on the cloth
Point = tuple[float, float]


def write_demo(folder: Path, train: int = 1000, val: int = 400, test: int = 100, seed: int = 0) -> None:
    """Write a dataset with so many images per split. The same seed gives the same bytes.

    Raises DatasetError if the folder exists and is not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise DatasetError(f"{folder}: is a file; name a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise DatasetError(f"{folder} exists and is not empty; name a new folder, or remove it")
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be made ({error.strerror}); name another folder") from None
    # Moved into place when it is complete, so that a killed process leaves no half dataset.
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.absolute().parent))
    try:
        _write(temporary, {"train": train, "val": val, "test": test}, seed)
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(folder: Path, sizes: dict[str, int], seed: int) -> None:
    (folder / "img").mkdir()
    (folder / "split").mkdir()
    names = [(name, kind) for kind, group in enumerate(CATEGORIES.values(), 1) for name in group]
    rows = "".join(f"{name:<21}{kind}\n" for name, kind in names)
    header = f"{len(names)} \nattribute_name   attribute_type\n"
    (folder / "split" / "list_attr_cloth.txt").write_text(header + rows, "utf-8")
    first = 0
    for number, (split, size) in enumerate(sizes.items()):
        if not size:
            continue
        labels = draw_labels(size, np.random.default_rng([seed, number]))
        paths = [f"img/{index:05d}.jpg" for index in range(first, first + size)]
        for path, label in zip(paths, labels, strict=True):
            rng = np.random.default_rng([seed, int(path[4:9]), 1])
            photograph(tuple(label), rng).save(folder / path, quality=QUALITY)
        (folder / "split" / f"{split}.txt").write_text("".join(f"{path}\n" for path in paths), "utf-8")
        if split != "test":
            text = "".join(" ".join(map(str, label)) + "\n" for label in labels)
            (folder / "split" / f"{split}_attr.txt").write_text(text, "utf-8")
        first += size


def draw_labels(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the labels of a split: int64 [size, 6].

    Each attribute gets one image first, and then its exact share. So even a small split has all of them.
    """
    columns = []
    for shares in SHARES:
        each_once = np.arange(len(shares))[:size]
        rest = size - len(each_once)
        quota = np.cumsum(shares) / np.sum(shares) * rest
        column = np.searchsorted(quota, np.arange(rest) + 0.5)
        columns.append(rng.permutation(np.concatenate([each_once, column])))
    return np.stack(columns, 1)


@dataclass(frozen=True)
class _Body:
    """Where the garment is, in pixels. x counts from the garment's middle, y from the picture's top."""

    middle: float
    top: float  # shoulders
    shoulder: float  # half width
    waist: float
    hem: float
    waist_y: float
    hem_y: float

    def mirrored(self, points: list[Point]) -> list[Point]:
        """A closed outline, given its right half as offsets from the middle."""
        left = [(-x, y) for x, y in reversed(points)]
        return [(self.middle + x, y) for x, y in points + left]


def photograph(label: tuple[int, ...], rng: np.random.Generator) -> Image.Image:
    """The drawn garment as a picture of about 3:4. Its size varies, as that of real photographs does."""
    picture = draw_garment(label, rng)
    width = int(rng.integers(150, 226))
    height = min(300, max(200, round(width * rng.uniform(1.28, 1.38))))
    return picture.resize((width, height), Image.Resampling.BILINEAR)


def draw_garment(label: tuple[int, ...], rng: np.random.Generator) -> Image.Image:
    """Draw one picture, in RGB. `label` has an index per category, in the order of CATEGORIES."""
    texture, sleeve, length, neckline, fabric, fit = label
    shade = rng.uniform(165, 245)
    background = tuple(int(shade + rng.uniform(-10, 10)) for _ in range(3))
    skin = tuple(int(v) for v in np.array([225, 180, 150]) * rng.uniform(0.6, 1.05))
    image = Image.new("RGB", (WIDTH, HEIGHT), background)
    body = _body(length, fit, rng)
    _draw_person(ImageDraw.Draw(image), body, length, skin, rng)
    mask = Image.new("L", image.size, 0)
    outline = ImageDraw.Draw(mask)
    outline.polygon(_torso(body), fill=255)
    _draw_sleeves(outline, body, sleeve, fit)
    _cut_neck(outline, body, neckline)
    mask = _fabric_edge(mask, fabric, rng)
    cloth = _cloth(texture, fabric, rng)
    if fabric == 1:  # chiffon lets the background through
        mask = mask.point([value * 0.62 for value in range(256)])
    image.paste(cloth, (0, 0), mask)
    return image


def _body(length: int, fit: int, rng: np.random.Generator) -> _Body:
    width = (0.72, 1.35, 1.0)[fit]  # tight, loose, conventional
    scale = rng.uniform(0.92, 1.05)
    top = rng.uniform(53, 60)
    hem_y = (200, 164, 130)[length] + rng.uniform(-4, 4)  # maxi, mini, a top
    shoulder = 32 * scale * (0.9 + 0.1 * width)
    flare = (1.5, 1.25, 1.0)[length] * (0.75 if fit == 0 else 1.0)
    waist = 22 * scale * width
    middle = WIDTH / 2 + rng.uniform(-4, 4)
    return _Body(middle, top, shoulder, waist, waist * flare + 4, top + 46 * scale, hem_y)


def _torso(body: _Body) -> list[Point]:
    right = [
        (10, body.top - 3),
        (body.shoulder, body.top + 4),
        (body.shoulder * 0.92, body.top + 30),
    ]
    right += [(body.waist, min(body.waist_y, body.hem_y - 8)), (body.hem, body.hem_y)]
    return body.mirrored(right)


def _draw_person(
    draw: ImageDraw.ImageDraw,
    body: _Body,
    length: int,
    skin: tuple[int, ...],
    rng: np.random.Generator,
) -> None:
    x, top = body.middle, body.top
    draw.ellipse([x - 14, top - 42, x + 14, top - 8], fill=skin)
    draw.rectangle([x - 7, top - 14, x + 7, top + 4], fill=skin)
    draw.polygon(
        body.mirrored([(8, top - 4), (body.shoulder, top + 4), (14, top + 50), (16, top + 84)]),
        fill=skin,
    )
    for side in (-1, 1):
        shoulder = x + side * (body.shoulder - 5)
        draw.line([(shoulder, top + 8), (x + side * 48, top + 96)], fill=skin, width=10)
    legs = tuple(int(rng.integers(40, 90)) for _ in range(3)) if length == 2 else skin
    for side in (-1, 1):
        draw.line([(x + side * 12, top + 80), (x + side * 13, HEIGHT)], fill=legs, width=17)


def _draw_sleeves(draw: ImageDraw.ImageDraw, body: _Body, sleeve: int, fit: int) -> None:
    if sleeve == 2:
        return
    width = (14, 25, 18)[fit]
    reach = 1.0 if sleeve == 0 else 0.36  # long, short
    for side in (-1, 1):
        start = (body.middle + side * (body.shoulder - 6), body.top + 9)
        end = (body.middle + side * 48, body.top + 92)
        tip = tuple(a + (b - a) * reach for a, b in zip(start, end, strict=True))
        draw.line([start, (tip[0], tip[1])], fill=255, width=width)


def _cut_neck(draw: ImageDraw.ImageDraw, body: _Body, neckline: int) -> None:
    x, top = body.middle, body.top
    if neckline == 0:
        draw.ellipse([x - 13, top - 14, x + 13, top + 9], fill=0)
    elif neckline == 1:
        draw.polygon([(x - 15, top - 5), (x + 15, top - 5), (x, top + 31)], fill=0)
    elif neckline == 2:
        draw.rectangle([x - 18, top - 6, x + 18, top + 22], fill=0)
    else:  # strapless
        draw.rectangle([x - 60, top - 10, x + 60, top + 17], fill=0)


def _fabric_edge(mask: Image.Image, fabric: int, rng: np.random.Generator) -> Image.Image:
    if fabric == 1:
        return mask.filter(ImageFilter.GaussianBlur(2.5))
    if fabric == 4:  # fur: a ragged outline
        noise = Image.fromarray(rng.integers(0, 256, (HEIGHT // 3, WIDTH // 3), dtype=np.uint8))
        wide = mask.filter(ImageFilter.GaussianBlur(3.5))
        return ImageChops.add(wide, noise.resize(mask.size), 1, -128).point(
            [255 if value > 150 else 0 for value in range(256)]
        )
    return mask


def _cloth(texture: int, fabric: int, rng: np.random.Generator) -> Image.Image:
    """The cloth as a full picture. The garment's mask cuts it out."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    base = rng.uniform(70, 200, 3)
    if fabric == 0:
        base = np.array([60, 80, 120]) * rng.uniform(0.8, 1.3)
    elif fabric == 1:
        base = rng.uniform(170, 245, 3)
    elif fabric == 3:
        base = rng.uniform(25, 60, 3)
    pattern = _texture(texture, x, y, rng)
    contrast = np.where(base > 128, -1, 1) * rng.uniform(60, 95)
    light = _fabric(fabric, x, y, rng) + rng.normal(0, NOISE, (HEIGHT, WIDTH))
    # Channel by channel and in single precision, because all three do not fit into the CPU's cache.
    light, pattern = light.astype(np.float32), pattern.astype(np.float32)
    channels = [
        (light + np.float32(colour) + pattern * np.float32(change)).clip(0, 255).astype(np.uint8)
        for colour, change in zip(base, contrast, strict=True)
    ]
    return Image.fromarray(np.dstack(channels))


def _texture(kind: int, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The share of the second colour at each pixel, from about -1 to 1.5."""
    period = rng.uniform(0.9, 1.15)
    if kind == 0:  # floral: five petals around scattered centres
        return _stamps(x, y, 26 * period, 9, rng, petals=5)
    if kind == 1:  # graphic: one large print on the chest
        cx, cy, size = WIDTH / 2 + rng.uniform(-4, 4), 107 + rng.uniform(-3, 3), rng.uniform(12, 15)
        box = (abs(x - cx) < size) & (abs(y - cy) < size)
        ring = (x - cx) ** 2 + (y - cy) ** 2 < (size * 0.6) ** 2
        return (box & ~ring).astype(np.float32) * 1.4
    if kind == 2:  # striped: broad horizontal bands
        return (np.sin(y * 2 * np.pi / (17 * period)) > 0).astype(np.float32)
    if kind == 3:  # embroidered: rows of small dots with a bright thread
        rows = (np.sin(y * 2 * np.pi / (11 * period)) > 0.3) & (np.sin(x * 2 * np.pi / 7) > 0.3)
        return np.asarray(rows * ((y % 44) < 20) * 1.5)
    if kind == 4:  # pleated: vertical folds, shaded
        return np.asarray(((x / (11 * period)) % 1) * 1.3 - 0.6)
    if kind == 6:  # lattice: diagonal grid
        step = 22 * period
        grid = (((x + y) % step) < 4) | (((x - y) % step) < 4)
        return np.asarray(grid * 1.2)
    return np.zeros_like(x)


def _stamps(
    x: np.ndarray, y: np.ndarray, step: float, radius: float, rng: np.random.Generator, petals: int
) -> np.ndarray:
    row = np.floor(y / step)
    dx = (x + row % 2 * step / 2 + rng.uniform(0, step)) % step - step / 2
    dy = y % step - step / 2
    reach = radius * (0.72 + 0.28 * np.cos(petals * np.arctan2(dy, dx)))
    distance = np.hypot(dx, dy)
    return np.asarray((distance < reach) - 1.3 * (distance < radius * 0.3))


def _fabric(kind: int, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What the material adds to each pixel's brightness, -255 to 255."""
    if kind == 0:  # denim: fine twill and a bright seam
        seam = 70 * (abs(x - WIDTH / 2 - 2) < 1.5) * ((y % 8) < 5)
        return np.asarray(16 * np.sin((x + 2 * y) * 2 * np.pi / 5) + seam)
    if kind == 3:  # leather: hard highlights
        phase = rng.uniform(0, 6)
        gloss = np.sin(x / 9 + phase + 1.5 * np.sin(y / 23)) + 0.3 * np.sin(y / 13)
        return np.asarray(380 * np.clip(gloss - 0.75, 0, None))
    if kind == 4:  # fur: strokes
        strokes = rng.normal(0, 1, (HEIGHT // 5 + 1, WIDTH)).repeat(5, 0)[:HEIGHT]
        return 26 * strokes
    if kind == 5:  # knit: rows of small v
        return 30 * np.sin((y + 3 * abs((x % 8) - 4) / 2) * 2 * np.pi / 7)
    return np.zeros_like(x)
