"""Colours that nobody can see, because they are fully transparent, made harmless before a picture is enlarged.

Under alpha 0 a file may hold any colour: black, the editor's background, garbage. Resizing and networks mix it into the
visible edge, as a rim.
"""

from __future__ import annotations

import cv2
import numpy as np

from .files import FloatArray


def fill_hidden(rgb: FloatArray, alpha: FloatArray) -> FloatArray:
    """`rgb` [height, width, 3] with each pixel of alpha 0 in the colour of the nearest visible one (ours).

    `alpha` [height, width] in [0, 1]. Visible pixels are unchanged, and what was hidden does not matter for the result.
    A picture without any visible pixel becomes black. Returns `rgb` itself where nothing is hidden.
    """
    hidden = alpha <= 0
    if not hidden.any():
        return rgb
    if hidden.all():
        return np.zeros_like(rgb)
    _, labels = cv2.distanceTransformWithLabels(
        hidden.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    nearest = np.zeros((int(labels.max()) + 1, 3), np.float32)
    nearest[labels[~hidden]] = rgb[~hidden]  # each visible pixel has a label of its own
    return np.where(hidden[..., None], nearest[labels], rgb)
