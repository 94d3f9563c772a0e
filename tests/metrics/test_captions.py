"""Metrics of captions, retrieval and alignment for cases with known values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from training.metrics.captions import (
    alignment_metrics,
    best_constant_caption,
    caption_scores,
    perplexity,
    retrieval_metrics,
    same_pairs,
)

TEXTS = ["a red circle on a table", "a blue square on a chair", "two green birds in a tree"]


def alone(texts):
    """Each text as the only reference of an image."""
    return [[text] for text in texts]


def test_equal_captions_score_100_whatever_the_case():
    scores = caption_scores([text.upper() for text in TEXTS], alone(TEXTS))
    assert scores.keys() == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "chrf"}
    assert all(value == pytest.approx(100) for value in scores.values())


def test_bleu_in_closed_form():
    """'a b c x' for 'a b c d': precisions 3/4, 2/3, 1/2 and, smoothed, 1/(2·1)."""
    scores = caption_scores(["a b c x"], [["a b c d"]])
    assert scores["bleu_1"] == pytest.approx(75)
    assert scores["bleu_2"] == pytest.approx(100 * math.sqrt(3 / 4 * 2 / 3))
    assert scores["bleu_3"] == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2) ** (1 / 3))
    assert scores["bleu_4"] == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** (1 / 4))


def test_short_captions_score_lower():
    """The brevity penalty is exp(1 - 6/3)."""
    scores = caption_scores(["a red circle"], [["a red circle on a table"]])
    assert scores["bleu_1"] == pytest.approx(100 * math.exp(-1))


def test_several_references():
    """Words of any reference count, for any number of references; the closest length is used for brevity."""
    predictions = ["a b c d", "x y"]
    scores = caption_scores(predictions, [["a b e f g", "q c d r"], ["x z"]])
    assert scores["bleu_1"] == pytest.approx(100 * (4 + 1) / 6)
    assert scores["bleu_2"] == pytest.approx(100 * math.sqrt(5 / 6 * 2 / 4))  # "a b" and "c d", of four pairs of words
    assert caption_scores(predictions, [["x", "A b c d"], ["x y"]])["chrf"] == pytest.approx(100)
    assert best_constant_caption(["a b", "x y"], [["q r", "x y"], ["x y"], ["a b", "a c"]])[0] == "x y"


def test_counts_must_agree():
    with pytest.raises(ValueError, match="2 captions for the references of 3"):
        caption_scores(TEXTS[:2], alone(TEXTS))
    with pytest.raises(ValueError, match="1 of 2 images have no reference"):
        caption_scores(TEXTS[:2], [["a"], []])


def test_the_best_constant_caption_has_the_highest_score():
    truth = ["a red circle on paper"] * 5 + ["a blue square on paper"] * 3
    best, score = best_constant_caption([*TEXTS, *truth], alone(truth))
    assert best == "a red circle on paper"
    assert score == pytest.approx(caption_scores([best] * 8, alone(truth))["bleu_4"])
    assert all(score >= caption_scores([text] * 8, alone(truth))["bleu_4"] for text in TEXTS)


def test_perplexity_of_uniform_predictions_is_the_number_of_tokens():
    assert perplexity(10 * math.log(7), 10) == pytest.approx(7)


def test_recall():
    similarity = np.array([[0.9, 0.1, 0.2], [0.8, 0.3, 0.5], [0.1, 0.2, 0.6]])
    scores = retrieval_metrics(similarity, same_pairs(["a", "b", "c"]))
    assert scores["image_to_text_recall_1"] == pytest.approx(2 / 3)  # image 1 retrieves caption 0
    assert scores["text_to_image_recall_1"] == 1
    assert scores["image_to_text_recall_5"] == scores["text_to_image_recall_10"] == 1


def test_recall_of_chance_and_of_ties():
    generator = np.random.default_rng(0)
    scores = retrieval_metrics(generator.normal(size=(400, 400)), np.eye(400, dtype=bool))
    assert scores["text_to_image_recall_10"] == pytest.approx(10 / 400, abs=0.02)
    # Constant similarities retrieve nothing.
    assert retrieval_metrics(np.ones((20, 20)), np.eye(20, dtype=bool))["text_to_image_recall_10"] == 0
    assert retrieval_metrics(np.full((20, 20), np.nan), np.eye(20, dtype=bool))["image_to_text_recall_10"] == 0


def test_any_image_with_the_caption_is_a_match():
    similarity = np.array([[0.1, 0.9, 0.0], [0.8, 0.2, 0.0], [0.3, 0.3, 0.5]])
    assert retrieval_metrics(similarity, same_pairs(["a", "b", "c"]))["text_to_image_recall_1"] == pytest.approx(1 / 3)
    assert retrieval_metrics(similarity, same_pairs(["a", "a", "c"]))["text_to_image_recall_1"] == 1
    same_image = same_pairs(["a", "b", "c"], ["x", "x", "y"])
    assert retrieval_metrics(similarity, same_image)["text_to_image_recall_1"] == 1


def test_alignment_of_true_and_shuffled_pairs():
    generator = np.random.default_rng(1)
    similarity = generator.normal(0.1, 0.2, size=(300, 300))
    similarity[np.diag_indices(300)] += 0.5
    scores = alignment_metrics(similarity, np.eye(300, dtype=bool))
    assert scores["alignment"] == pytest.approx(0.6, abs=0.05)
    assert scores["alignment_shuffled"] == pytest.approx(0.1, abs=0.05)
    assert scores["alignment_standard_error"] == pytest.approx(0.2 / math.sqrt(300), rel=0.15)
    assert scores["alignment_gap"] == pytest.approx(0.5 / (0.2 * math.sqrt(2 / 300)), rel=0.2)


def test_random_alignment_has_no_gap():
    similarity = np.random.default_rng(2).normal(size=(300, 300))
    assert abs(alignment_metrics(similarity, np.eye(300, dtype=bool))["alignment_gap"]) < 4


def test_shuffled_pairs_with_the_true_caption_are_left_out():
    """With two captions in turn, a shuffle gives many pairs with the true caption, which are not mismatched."""
    texts = ["a", "b"] * 20
    similarity = np.array([[0.9 if one == other else 0.0 for other in texts] for one in texts])
    assert alignment_metrics(similarity, same_pairs(texts))["alignment_shuffled"] == pytest.approx(0)
