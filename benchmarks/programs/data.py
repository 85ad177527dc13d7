"""Real data that needs no download: handwritten digits of scikit-learn, and English text of the standard library."""

from collections import Counter
from functools import cache

import torch
from torch.nn import functional as F

UNKNOWN = 0
"""The token of a word that is not in the vocabulary."""


def digits(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1,797 grey images, f32[1797, 1, side, side] in 0...1, and what they show, i64[1797].

    They have 8x8 points; other sides are interpolated.
    """
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1) / 16
    if side != images.size(2):
        images = F.interpolate(images, (side, side), mode="bilinear", align_corners=False)
    return images, torch.tensor(loaded.target)


@cache
def _words() -> tuple[str, ...]:
    from pydoc_data.topics import topics

    return tuple(word for topic in sorted(topics) for word in topics[topic].lower().split())


def text(vocabulary: int) -> torch.Tensor:
    """Return Python's own reference manual as i64[words]: the more frequent a word, the smaller its number."""
    frequent = [word for word, _ in Counter(_words()).most_common(vocabulary - 1)]
    numbers = {word: number for number, word in enumerate(frequent, start=UNKNOWN + 1)}
    return torch.tensor([numbers.get(word, UNKNOWN) for word in _words()])
