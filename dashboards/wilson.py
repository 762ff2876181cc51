"""The confidence interval of a share, such as the share of images that are predicted right."""

import math
import statistics
from collections.abc import Sequence

LEVEL = 0.95
Z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)  # standard errors to each side


def wilson(share: float, images: float, z: float = Z) -> tuple[float, float]:
    """The score interval of E. B. Wilson (JASA 22, 1927) for a share in [0, 1], by default with 95 %.

    `images` is above 0. It may be fractional, as an effective number of images is. The limits are in
    [0, 1] and the share is between them. They differ even if no image was right, or all were.
    """
    more = z**2 / images
    centre = (share + more / 2) / (1 + more)
    half = math.sqrt(more * share * (1 - share) + more**2 / 4) / (1 + more)
    # At 0 and at 1 one limit is the share itself. Rounding must not move it past the share.
    return min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)


def effective_images(counts: Sequence[int]) -> float:
    """How many images of a single share would tell as much as these of the average of all shares.

    `counts` are the images of each attribute; those without any do not count. The average over C
    attributes that have n_c images, all of one accuracy p, has the variance
    p (1 - p) sum(1 / n_c) / C^2.
    """
    present = [count for count in counts if count > 0]
    return float(len(present) ** 2 / sum(1 / count for count in present))
