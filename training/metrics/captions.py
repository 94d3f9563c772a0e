"""How good captions are, and how well pictures and captions find each other; pure functions.

N pairs, D latent vector.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

ORDERS = (1, 2, 3, 4)
RANKS = (1, 5, 10)
COMPARISONS = 1_000_000


def caption_scores(told: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-1 to BLEU-4 (Papineni et al. 2002) and chrF (Popović 2015) of N captions, 0 to 100, by sacrebleu.

    Upper and lower case are the same.

    Args:
        references: N times what is right, one caption or several: an n-gram counts that any of them has, and chrF is
            that of the nearest.

    Raises:
        ValueError: another number of captions than of references, or a picture without any.
    """
    from sacrebleu.metrics import BLEU, CHRF

    if len(told) != len(references) or not told:
        raise ValueError(f"{len(told)} captions for the references of {len(references)} pictures")
    streams = _streams(references)
    scores = {
        f"bleu_{order}": BLEU(lowercase=True, max_ngram_order=order).corpus_score(list(told), streams).score
        for order in ORDERS
    }
    return scores | {"chrf": CHRF(lowercase=True).corpus_score(list(told), streams).score}


def _streams(references: Sequence[Sequence[str]]) -> list[list[Any]]:
    """As sacrebleu wants them: the first of each picture, the second of each, and so on; None where it has no more."""
    if not all(references):
        raise ValueError(f"{sum(not own for own in references)} of {len(references)} pictures have no reference")
    return [list(stream) for stream in itertools.zip_longest(*references)]


def best_constant_caption(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[str, float]:
    """The one caption that, said of every picture, has the highest BLEU-4, and its BLEU-4.

    It is chosen by the references themselves, so that no other of those tried does better.

    Args:
        candidates: of all these, or where that would take minutes, of those that share most words with the references.
        references: of each picture, as in `caption_scores`.
    """
    from sacrebleu.metrics import BLEU

    metric = BLEU(lowercase=True)
    streams = _streams(references)
    words = Counter(word for own in references for word in {word for text in own for word in text.lower().split()})
    distinct = sorted(set(candidates))
    shared = {text: sum(words[word] for word in text.lower().split()) / (3 + len(text.split())) for text in distinct}
    tried = sorted(distinct, key=lambda text: -shared[text])[: max(100, COMPARISONS // len(references))]
    scores = {text: metric.corpus_score([text] * len(references), streams).score for text in tried}
    best = max(scores, key=lambda text: scores[text])
    return best, scores[best]


def perplexity(total_loss: float, tokens: float) -> float:
    """exp of the mean cross-entropy per token."""
    return math.exp(total_loss / tokens)


def same_pairs(captions: Sequence[str], pictures: Sequence[str] | None = None) -> np.ndarray:
    """Which pairs have one caption or one picture. N × N, bool.

    Args:
        captions: N.
        pictures: N, something that is equal for equal pictures; None where all are different.
    """
    same = np.zeros((len(captions), len(captions)), dtype=bool)
    for names in filter(None, (list(captions), list(pictures or []))):
        values = np.array(names)
        same |= values[:, None] == values[None]
    return same


def retrieval_metrics(similarity: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Recall at 1, 5 and 10, from pictures to captions and back: whether a right answer is among the first so many.

    Args:
        similarity: N × N, of picture i with caption j.
        right: N × N, bool: which captions are right answers to which pictures (`same_pairs`).
    """
    figures: dict[str, float] = {}
    for name, scores, answers in (("image_to_text", similarity, right), ("text_to_image", similarity.T, right.T)):
        # The rank of the best right answer: how many wrong ones are at least as near, ties counting against it.
        best = np.where(answers, scores, -np.inf).max(1, keepdims=True)
        ahead = (~(scores < best) & ~answers).sum(1)  # so that what is no number is never found
        figures |= {f"{name}_recall_{k}": float((ahead < k).mean()) for k in RANKS}
    return figures


def alignment_metrics(similarity: np.ndarray, right: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean cosine of true pairs and of shuffled ones, with standard errors of the means.

    Args:
        similarity: N × N cosines, of picture i with caption j.
        right: N × N, bool, as in `retrieval_metrics`; a shuffled pair that is right is left out.

    Returns:
        alignment, alignment_shuffled, each with _standard_error; and alignment_gap, their difference in standard errors
        of the difference.
    """
    true = np.diag(similarity)
    order = np.random.default_rng(seed).permutation(len(true))
    wrong = ~right[np.arange(len(true)), order]
    shuffled = similarity[np.arange(len(true)), order][wrong]
    means = {"alignment": true, "alignment_shuffled": shuffled}
    figures: dict[str, float] = {}
    for name, values in means.items():
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        figures |= {name: float(values.mean()) if len(values) else math.nan, f"{name}_standard_error": error}
    spread = math.hypot(figures["alignment_standard_error"], figures["alignment_shuffled_standard_error"])
    gap = figures["alignment"] - figures["alignment_shuffled"]
    return figures | {"alignment_gap": gap / spread if spread > 0 else math.nan}
