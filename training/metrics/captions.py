"""Metrics of captions, of retrieval and of the alignment of images and captions; pure functions.

N pairs.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from training.core.exchange import ALONE, Exchange

ORDERS = (1, 2, 3, 4)
RANKS = (1, 5, 10)
COMPARISONS = 1_000_000
TRIED_AT_A_TIME = 16


def caption_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Compute BLEU-1 to BLEU-4 (Papineni et al. 2002) and chrF (Popović 2015) of N captions with sacrebleu, 0 to 100.

    Case is ignored.

    Args:
        predictions: one predicted caption for each of N images.
        references: one or several reference captions for each image. An n-gram counts if any of them has it, and chrF
            is that of the closest one.

    Raises:
        ValueError: the numbers of predictions and references differ, or an image has no reference.
    """
    from sacrebleu.metrics import BLEU, CHRF

    if len(predictions) != len(references) or not predictions:
        raise ValueError(f"{len(predictions)} captions for the references of {len(references)} images")
    streams = _streams(references)
    scores = {
        f"bleu_{order}": BLEU(lowercase=True, max_ngram_order=order).corpus_score(list(predictions), streams).score
        for order in ORDERS
    }
    return scores | {"chrf": CHRF(lowercase=True).corpus_score(list(predictions), streams).score}


def _streams(references: Sequence[Sequence[str]]) -> list[list[Any]]:
    """Arrange references for sacrebleu: the first of each image, the second of each, and so on, padded with None."""
    if not all(references):
        raise ValueError(f"{sum(not own for own in references)} of {len(references)} images have no reference")
    return [list(stream) for stream in itertools.zip_longest(*references)]


def best_constant_caption(
    candidates: Sequence[str], references: Sequence[Sequence[str]], exchange: Exchange = ALONE
) -> tuple[str, float]:
    """Return the caption with the highest BLEU-4 if it is predicted for every image, and its BLEU-4.

    It is a baseline: a model that ignores its images can score this much.

    Args:
        candidates: captions to try. If trying all would take minutes, only those that share the most words with the
            references are tried.
        references: the references of each image, as in `caption_scores`.
        exchange: every process calls this function, tries its share of the captions, and gets the result.
    """
    from sacrebleu.metrics import BLEU

    metric = BLEU(lowercase=True)
    streams = _streams(references)
    words = Counter(word for own in references for word in {word for text in own for word in text.lower().split()})
    distinct = sorted(set(candidates))
    shared = {text: sum(words[word] for word in text.lower().split()) / (3 + len(text.split())) for text in distinct}
    tried = sorted(distinct, key=lambda text: -shared[text])[: max(100, COMPARISONS // len(references))]

    def score(numbers: Sequence[int]) -> list[float]:
        return [metric.corpus_score([tried[number]] * len(references), streams).score for number in numbers]

    scores = exchange.map(score, len(tried), TRIED_AT_A_TIME)
    best = max(range(len(tried)), key=lambda number: scores[number])
    return tried[best], scores[best]


def perplexity(total_loss: float, tokens: float) -> float:
    """Compute exp of the mean cross-entropy per token."""
    return math.exp(total_loss / tokens)


def same_pairs(captions: Sequence[str], images: Sequence[str] | None = None) -> np.ndarray:
    """Return which pairs have the same caption or the same image. N × N, bool.

    Args:
        captions: N captions.
        images: N strings that are equal for equal images; None if all images are different.
    """
    same = np.zeros((len(captions), len(captions)), dtype=bool)
    for names in filter(None, (list(captions), list(images or []))):
        values = np.array(names)
        same |= values[:, None] == values[None]
    return same


def retrieval_metrics(similarity: np.ndarray, matches: np.ndarray) -> dict[str, float]:
    """Compute recall at 1, 5 and 10 from images to captions and back: how often a match is among the first k results.

    Args:
        similarity: N × N, of image i with caption j.
        matches: N × N, bool, which captions match which images (`same_pairs`).
    """
    metrics: dict[str, float] = {}
    for name, scores, positives in (("image_to_text", similarity, matches), ("text_to_image", similarity.T, matches.T)):
        # The rank of the best match is the number of mismatched candidates with at least the same similarity.
        best = np.where(positives, scores, -np.inf).max(1, keepdims=True)
        ahead = (~(scores < best) & ~positives).sum(1)  # not `>=`, so that NaN counts against the model
        metrics |= {f"{name}_recall_{k}": float((ahead < k).mean()) for k in RANKS}
    return metrics


def alignment_metrics(similarity: np.ndarray, matches: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Compute the mean cosine of true pairs and of shuffled pairs, with the standard errors of the means.

    Args:
        similarity: N × N cosines, of image i with caption j.
        matches: N × N, bool, as in `retrieval_metrics`; shuffled pairs that match are left out.
        seed: seed of the shuffle.

    Returns:
        alignment and alignment_shuffled, each with its _standard_error, and alignment_gap, their difference divided by
        the standard error of the difference.
    """
    true = np.diag(similarity)
    order = np.random.default_rng(seed).permutation(len(true))
    mismatched = ~matches[np.arange(len(true)), order]
    shuffled = similarity[np.arange(len(true)), order][mismatched]
    means = {"alignment": true, "alignment_shuffled": shuffled}
    metrics: dict[str, float] = {}
    for name, values in means.items():
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        metrics |= {name: float(values.mean()) if len(values) else math.nan, f"{name}_standard_error": error}
    spread = math.hypot(metrics["alignment_standard_error"], metrics["alignment_shuffled_standard_error"])
    gap = metrics["alignment"] - metrics["alignment_shuffled"]
    return metrics | {"alignment_gap": gap / spread if spread > 0 else math.nan}
