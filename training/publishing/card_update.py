"""Writes the model cards of a complete run, and writes them again after its model was evaluated."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.tools.cli import UserError
from training.core.files import read_json_object
from training.publishing.content import published_part
from training.publishing.evaluation_facts import EVALUATION_FILE, read_evaluation
from training.publishing.model_card import CARD_NAME, write_model_card
from training.run.folder import RunFolder

logger = logging.getLogger("halftone")

ADAPTER_TEMPLATE = "lora.md.jinja"


def digest_of(card: Path) -> str:
    """Return the SHA-256 of a model card, by which one that a user has edited is recognized."""
    return hashlib.sha256(card.read_bytes()).hexdigest()


def published_parts(pipeline: Path) -> list[Path]:
    """Return the folders of a saved pipeline that have a model card: its own, and that of its adapter if it has one."""
    return list(dict.fromkeys([pipeline, published_part(pipeline)]))


def write_cards(pipeline: Path, record: Mapping[str, Any], parts: Sequence[Path] | None = None) -> dict[str, Any]:
    """Write the model cards of a saved pipeline; return their template and digests, which belong into the record.

    Args:
        record: the record of the run, in which `card` has at least the template.
        parts: the folders whose cards are written; None for all of `published_parts`.

    Raises:
        UserError: the template does not exist.
    """
    known = dict(record["card"])
    for part in published_parts(pipeline) if parts is None else parts:
        template = str(known["template"]) if part == pipeline else ADAPTER_TEMPLATE
        known[_digest_key(part, pipeline)] = digest_of(write_model_card(part, template, record))
    return known


def _digest_key(part: Path, pipeline: Path) -> str:
    return "sha256" if part == pipeline else f"{part.name}_sha256"


def update_card(run: Path) -> bool:
    """Write the model cards of a run again, with its evaluation.json; return whether a card was written.

    A card that a user has edited stays as it is, and a warning says so. So does the card of an older version, of which
    it is not known whether it was edited. Failures cost a warning.
    """
    folder = RunFolder(run)
    pipeline, record = folder.pipeline, read_json_object(folder.record_file)
    parts = [part for part in published_parts(pipeline) if (part / CARD_NAME).is_file()]
    if record is None or not parts:
        return False
    evaluation = read_evaluation(folder.path, record.get("steps"), just_made=True)
    known = record.get("card")
    if evaluation is None:
        return False
    written = []
    for part in parts:
        card = part / CARD_NAME
        try:
            if not isinstance(known, dict) or digest_of(card) != known.get(_digest_key(part, pipeline)):
                logger.warning(
                    "%s was edited, so it is not written again; the results are in %s", card, EVALUATION_FILE
                )
                continue
            known = write_cards(pipeline, {**record, "card": known, "evaluation": evaluation}, [part])
            folder.save_record({**record, "card": known})
            written.append(part)
        except (OSError, UserError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s could not be written again with the results of the evaluation (%s)", card, error)
    return bool(written)
