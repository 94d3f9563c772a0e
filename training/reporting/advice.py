"""Warnings about the course of training, computed from the history of its epochs. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from training.run.state import EpochSummary

FLAT_EPOCHS = 4
FLAT_SHARE = 0.002
HIGH_SHARE = 0.85
HIGH_AFTER_EPOCHS = 3
GAP_RATIO = 1.5


def advice(history: Sequence[EpochSummary], trivial_loss: float | None, final_epochs: float) -> list[str]:
    """Return warnings about the newest epoch of `history`, each with what to do about it; usually none.

    Args:
        history: the epochs so far, in order.
        trivial_loss: the loss of a model that has learned nothing; None where it is not known.
        final_epochs: number of epochs that the run will have in the end.
    """
    warnings = [_still_high(history, trivial_loss), _flat_or_rising(history, final_epochs), _gap(history)]
    return [warning for warning in warnings if warning]


def _still_high(history: Sequence[EpochSummary], trivial_loss: float | None) -> str | None:
    if trivial_loss is None or len(history) != HIGH_AFTER_EPOCHS:
        return None
    last = history[-1]
    if last.loss < HIGH_SHARE * trivial_loss:
        return None
    if last.learning_rate < 3e-5:
        cause = f"the learning rate is very low ({last.learning_rate:.1e}); try --learning_rate 1e-4 to 1e-3"
    elif last.loss > 1.2 * trivial_loss:
        cause = (
            "training diverges, or the latents do not have unit variance; lower --learning_rate, and check that --vae "
            "is the autoencoder that the latents were computed with"
        )
    else:
        cause = (
            "too few steps so far (--dry_run shows the steps per epoch), a model that is too small for the data, or "
            "captions that do not describe the images"
        )
    return (
        f"the loss is still {last.loss:.3f} after {len(history)} epochs; "
        f"a model that has learned nothing has a loss of about {trivial_loss:.1f}. Likely cause: {cause}"
    )


def _flat_or_rising(history: Sequence[EpochSummary], final_epochs: float) -> str | None:
    if len(history) < 2 * FLAT_EPOCHS or len(history) % FLAT_EPOCHS or len(history) >= final_epochs:
        return None
    recent = sum(e.loss for e in history[-FLAT_EPOCHS:]) / FLAT_EPOCHS
    before = sum(e.loss for e in history[-2 * FLAT_EPOCHS : -FLAT_EPOCHS]) / FLAT_EPOCHS
    if recent > before * (1 + 5 * FLAT_SHARE):
        return (
            f"the training loss rose over the last {FLAT_EPOCHS} epochs ({before:.4f} → {recent:.4f}); "
            "lower --learning_rate, or resume from the best checkpoint with --resume_from_checkpoint best"
        )
    if recent > before * (1 - FLAT_SHARE):
        return (
            f"the training loss has been flat for {FLAT_EPOCHS} epochs ({before:.4f} → {recent:.4f}); a decaying "
            "learning rate (--lr_scheduler cosine) or a larger model may lower it, more epochs alone will not"
        )
    return None


def _gap(history: Sequence[EpochSummary]) -> str | None:
    if len(history) < 2 or history[-1].val_loss is None:
        return None
    last = history[-1]
    best = min(e.val_loss for e in history if e.val_loss is not None)
    # The two are measured on different timesteps and weights, so a fixed gap is normal; a growing one is not.
    if last.val_loss > GAP_RATIO * last.loss and last.val_loss > 1.1 * best:  # type: ignore[operator]
        return (
            f"the validation loss ({last.val_loss:.4f}; best {best:.4f}) moves away from the training loss "
            f"({last.loss:.4f}): the model begins to memorize its training data. Use more images, --random_flip, a "
            "smaller model or --early_stopping_patience; the checkpoint `best` keeps the best weights"
        )
    return None
