"""Writes the model card of a complete run again after its model was evaluated."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from pipelines.tools.cli import UserError
from training.core.files import read_json_object
from training.publishing.evaluation_facts import EVALUATION_FILE, read_evaluation
from training.publishing.model_card import CARD_NAME, write_model_card
from training.run.folder import RunFolder

logger = logging.getLogger("halftone")


def digest_of(card: Path) -> str:
    """Return the SHA-256 of a model card, by which one that a user has edited is recognized."""
    return hashlib.sha256(card.read_bytes()).hexdigest()


def update_card(run: Path) -> bool:
    """Write the model card of a run again, with its evaluation.json; return whether the card was written.

    A card that a user has edited stays as it is, and a warning says so. So does the card of an older version, of which
    it is not known whether it was edited. Failures cost a warning.
    """
    folder = RunFolder(run)
    record, card = read_json_object(folder.record_file), folder.pipeline / CARD_NAME
    if record is None or not card.is_file():
        return False
    evaluation = read_evaluation(folder.path, record.get("steps"), just_made=True)
    known = record.get("card")
    if evaluation is None:
        return False
    try:
        if not isinstance(known, dict) or digest_of(card) != known.get("sha256"):
            logger.warning("%s was edited, so it is not written again; the results are in %s", card, EVALUATION_FILE)
            return False
        write_model_card(folder.pipeline, str(known.get("template")), {**record, "evaluation": evaluation})
        folder.save_record({**record, "card": {**known, "sha256": digest_of(card)}})
    except (OSError, UserError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s could not be written again with the results of the evaluation (%s)", card, error)
        return False
    return True
