"""Chooses one of several captions of an image.

This file is shipped inside published pipelines, so it imports no other file of Halftone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def consensus(captions: Sequence[str]) -> str:
    """Return the caption that shares the most n-grams (one to four words) with all captions, averaged over pairs.

    This is minimum Bayes risk decoding (Kumar & Byrne 2004): given samples from the model, it returns the caption with
    the lowest expected loss. The most likely caption is a worse choice for an image that can be described in many ways.
    Recall of n-grams counts more than precision (F2, as in chrF: Popović 2016); otherwise the shortest would win.
    """
    if len(captions) == 1:
        return captions[0]
    counts = Counter(captions)
    grams = {text: [Counter(_grams(text.split(), size)) for size in (1, 2, 3, 4)] for text in counts}

    def likeness(one: str, other: str) -> float:
        score = 0.0
        for own, reference in zip(grams[one], grams[other]):
            total = own.total() + 4 * reference.total()
            score += 5 * (own & reference).total() / total if total else 1.0  # both too short for such n-grams
        return score

    return max(counts, key=lambda text: sum(likeness(text, other) * count for other, count in counts.items()))


def _grams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
