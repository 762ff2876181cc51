"""Between which limits a share lies that was seen on some images."""

import math
import statistics

LEVEL = 0.95
Z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)  # standard errors to each side


def wilson(share: float, images: float, z: float = Z) -> tuple[float, float]:
    """The score interval of E. B. Wilson (JASA 22, 1927) of a share in [0, 1], by default with 95 %.

    `images`, above 0, need not be whole: it is then how many the share is worth. The limits are in
    [0, 1] with the share between them, and apart even where none of the images was right, or all.
    """
    more = z**2 / images
    centre = (share + more / 2) / (1 + more)
    half = math.sqrt(more * share * (1 - share) + more**2 / 4) / (1 + more)
    # At 0 and at 1 a limit is the share itself, which rounding must not move it beyond.
    return min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)
