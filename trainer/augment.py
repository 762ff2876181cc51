"""The report's random augmentation, for a batch of images at once, on any device.

Each image has its own parameters. They are drawn from (seed, epoch) for the whole split, so an image
looks the same in every block, process and order. The arithmetic is that of torchvision's transforms on
PIL images (Pillow's Blend.c, Convert.c and Geometry.c), rounding included. The bytes are the same on a
CPU and a GPU, compiled or not.
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.device import is_out_of_memory

log = logging.getLogger(__name__)

JITTER, HUE = 0.3, 0.3  # brightness, contrast and saturation within 1 +- 0.3; hue within +- 0.3 turns
DEGREES, SHEAR = 15.0, 15.0  # within +-
TRANSLATE = 0.1  # of the image's side, within +-
SCALE = (0.5, 1.5)

# Let the compiler round as uncompiled code does: on a GPU it would fuse products with sums.
AS_EAGER: dict[str, str | int | bool | Callable[..., Any]] = {
    "emulate_precision_casts": True,
    "eager_numerics.division_rounding": True,
}
# A CPU works on so many pixels at once, so that they stay in its cache. Uncompiled steps keep so many
# intermediate results there too, of four bytes a pixel.
CACHED_PIXELS, TEMPORARIES = 1 << 20, 5


@dataclass(frozen=True)
class Draws:
    """The random parameters of n images, on the host."""

    order: np.ndarray  # int [n, 4]: a permutation of STEPS for each image
    factors: np.ndarray  # float32 [n, 4], one per step; hue's is in whole 255ths of a turn
    flip: np.ndarray  # bool [n]
    # int32 [n, 6]: output pixel (x, y) shows source pixel (a x + b y + c, d x + e y + f) >> 16.
    affine: np.ndarray

    def __getitem__(self, rows: np.ndarray | slice) -> "Draws":
        return Draws(*(values[rows] for values in vars(self).values()))


def draw(seed: int, epoch: int, images: int, size: int) -> Draws:
    """Draw the parameters of every image of a split for one epoch. Images are `size` x `size` pixels."""
    generator = np.random.default_rng([seed, epoch, 1])  # [seed, epoch] draws the order
    uniform = generator.random((images, 13))
    between = 2 * uniform - 1
    factors = 1 + JITTER * between[:, :4]
    factors[:, 3] = np.trunc(255 * HUE * between[:, 3])
    shift = np.rint(TRANSLATE * size * between[:, 4:6])
    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * uniform[:, 6]
    return Draws(
        order=np.argsort(uniform[:, 9:], axis=1),
        factors=factors.astype(np.float32),
        flip=uniform[:, 8] < 0.5,
        affine=affine(
            DEGREES * between[:, 7], SHEAR * generator.uniform(-1, 1, images), scale, shift, size
        ),
    )


def affine(
    angle: np.ndarray, shear: np.ndarray, scale: np.ndarray, shift: np.ndarray, size: int
) -> np.ndarray:
    """The matrices of `Draws.affine`, in Pillow's fixed point.

    Angle and shear (along x) are in degrees, shift [n, 2] is in pixels. An image is sheared, rotated,
    scaled about its centre and shifted. The matrix undoes this: it leads from an output pixel to its
    source.
    """
    sine, cosine = np.sin(np.radians(angle)), np.cos(np.radians(angle))
    slope = np.tan(np.radians(shear))
    linear = np.stack([cosine - slope * sine, sine + slope * cosine, -sine, cosine], 1)
    linear = linear.reshape(-1, 2, 2) / scale[:, None, None]
    middle = np.full(2, size / 2)
    # A pixel's centre is half a pixel from its corner.
    offset = middle - np.einsum("nij,nj->ni", linear, middle + shift - 0.5)
    return np.floor(65536 * np.dstack([linear, offset]).reshape(-1, 6) + 0.5).astype(np.int32)


def brightness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Blend with black.

    All four steps take and return images as float32 [n, 3, h, w] with whole numbers. Factors are float32
    [n, 1, 1, 1]. What Pillow computes in whole numbers is exact in float32.
    """
    return _blend(torch.zeros_like(factors), images, factors)


def contrast(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Blend with the image's mean luma, rounded."""
    luma = _luma(images)
    mean = luma.sum((1, 2, 3), keepdim=True, dtype=torch.float64) / luma[0].numel()
    return _blend((mean + 0.5).floor().float(), images, factors)


def saturation(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Blend with each pixel's luma."""
    return _blend(_luma(images), images, factors)


def hue(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn the colour circle by 255ths of a turn, through Pillow's HSV in bytes.

    Pillow works in double precision and rounds to float in between. The order of the steps here gives
    the same result in floats. A test compares all colours.
    """
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    width = chroma.clamp(min=1)
    from_red, from_green, from_blue = (
        (value - red) / width,
        (value - green) / width,
        (value - blue) / width,
    )
    reddest, greenest = red == value, green == value
    sector = torch.where(reddest, 0.0, torch.where(greenest, 2.0, 4.0))
    plus = torch.where(reddest, from_blue, torch.where(greenest, from_red, from_green))
    minus = torch.where(reddest, from_green, torch.where(greenest, from_blue, from_red))
    # Plus or minus is exactly 1: the darkest channel's. Sector and 1 add up exactly, so only the other
    # sum is rounded.
    sixth = torch.where(minus == 1, (sector - 1) + plus, (sector + 1) - minus)
    turn = torch.where(sixth < 0, 1 + sixth / 6, sixth / 6)
    whole = (turn * 255).floor()
    whole = torch.where(turn * 256 - whole < turn, whole - 1, whole)  # turn * 255 was rounded up
    angle = torch.where(chroma == 0, 0.0, whole) + turns.squeeze(1)
    angle = (angle - 256 * (angle / 256).floor()) * 6 / 255
    grey = (chroma / value.clamp(min=1) * 255).floor() / 255
    sector = angle.floor()
    part = angle - sector
    sector = torch.where(sector == 6, 0.0, sector)
    low = _rounded(value * (1 - grey))
    falling = _rounded(value * (1 - grey * part))
    rising = _rounded(value * (1 - grey * (1 - part)))

    def channel(first: int) -> torch.Tensor:
        """The channel that is highest in sector `first` and in the sector after it."""
        where = sector - first
        where = torch.where(where < 0, where + 6, where)
        sides = torch.where(where == 2, falling, torch.where(where == 5, rising, low))
        return torch.where(where < 2, value, sides)

    return torch.stack([channel(5), channel(1), channel(3)], 1)


def _blend(base: torch.Tensor, images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return (base + factors * (images - base)).clamp(0, 255).floor()


def _luma(images: torch.Tensor) -> torch.Tensor:
    """The brightness by ITU-R 601-2, in whole numbers: [n, 1, h, w]."""
    red, green, blue = images.unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) / 0x10000).floor().unsqueeze(1)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    return (x + 0.5).floor()


def sources(matrices: torch.Tensor, flip: torch.Tensor, size: int) -> torch.Tensor:
    """The source pixel of each pixel of a flipped and moved image: int32 [n, size, size].

    A source pixel is the number y * size + x, or -1 outside the image. `matrices` are those of
    `Draws.affine`, int32 [n, 6], and `flip` is bool [n].
    """
    across = torch.arange(size, device=matrices.device, dtype=torch.int32)
    down = across.view(-1, 1)
    a, b, c, d, e, f = (column.view(-1, 1, 1) for column in matrices.unbind(1))
    x = (a * across + b * down + c) >> 16
    y = (d * across + e * down + f) >> 16
    inside = (torch.maximum(x, y) < size) & (torch.minimum(x, y) >= 0)
    x = torch.where(flip.view(-1, 1, 1), size - 1 - x, x)
    return torch.where(inside, y * size + x, -1)


STEPS = (brightness, contrast, saturation, hue)


def groups(order: np.ndarray, one_by_one: bool) -> Iterator[tuple[slice | np.ndarray, int]]:
    """Which images take which step next. Every image gets its steps in its own order."""
    if one_by_one:  # slices, which copy nothing
        for image, steps in enumerate(order.tolist()):
            yield from ((slice(image, image + 1), step) for step in steps)
    else:
        for position, number in itertools.product(range(len(STEPS)), range(len(STEPS))):
            rows = np.flatnonzero(order[:, position] == number)
            if len(rows):
                yield rows, number


class Augmentation:
    """Applies draws to images. `compiled` fuses each step's arithmetic; the bytes stay the same."""

    def __init__(self, compiled: bool) -> None:
        self._compiled = compiled
        self._fused: dict[str, Callable[..., torch.Tensor]] = {}

    def __call__(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Augment images, uint8 [n, 3, s, s] on any device. Returns a new tensor of that form."""
        if images.device.type != "cpu":
            return self._augmented(images, draws, one_by_one=False)
        pixels = CACHED_PIXELS * (1 if self._compiled else 1 / TEMPORARIES)
        images_at_once = max(round(pixels / images[0, 0].numel()), 1)
        # Grouping is only faster if several images share a step.
        one_by_one = self._compiled or images_at_once < len(STEPS) ** 2
        starts = range(0, len(images), images_at_once)
        parts = [slice(start, start + images_at_once) for start in starts]
        return torch.cat([self._augmented(images[part], draws[part], one_by_one) for part in parts])

    def _augmented(self, images: torch.Tensor, draws: Draws, one_by_one: bool) -> torch.Tensor:
        def to_device(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).to(images.device, non_blocking=True)

        jittered = images.float()
        factors = to_device(draws.factors).view(-1, 4, 1, 1, 1)
        for images_of_group, number in groups(draws.order, one_by_one):
            rows = images_of_group if isinstance(images_of_group, slice) else to_device(images_of_group)
            jittered[rows] = self._run(STEPS[number], jittered[rows], factors[rows, number])
        shown = self._run(sources, to_device(draws.affine), to_device(draws.flip), images.shape[-1])
        index = shown.flatten(1).unsqueeze(1)
        pixels = jittered.byte().flatten(2).gather(2, index.clamp(min=0).long().expand(-1, 3, -1))
        return pixels.mul_(index >= 0).view_as(images)

    def _run(self, step: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        if self._compiled:
            if step.__name__ not in self._fused:
                self._fused[step.__name__] = torch.compile(step, dynamic=True, options=AS_EAGER)
            try:
                return self._fused[step.__name__](*arguments)
            except Exception as error:  # no compiler, a full disk, a killed compiler, and more
                if is_out_of_memory(error):
                    raise
                log.warning("the augmentation runs uncompiled: %s", repr(error).splitlines()[0])
                self._compiled = False
        return step(*arguments)
