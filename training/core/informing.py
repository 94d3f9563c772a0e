"""What only informs (logs, curves, samples, reports) never ends a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.tools.cli import cause

logger = logging.getLogger("halftone")


class Informing:
    """Makes of a failure to write what only informs a single warning, so that training continues.

        informing = Informing()
        with informing("training_curves.png"):
            draw()

    There is one warning when `what` begins to fail, and one message when it is written again.
    """

    def __init__(self) -> None:
        self._failing: set[str] = set()

    @contextmanager
    def __call__(self, what: str, consequence: str = "") -> Iterator[None]:
        """Suppress the errors in the block.

        Args:
            what: what is written, for the messages.
            consequence: clause on what happens to it, such as "its rows are kept in memory".
        """
        try:
            yield
        except Exception as error:  # most are OSErrors; libraries that draw and encode images have others
            if what not in self._failing:
                self._failing.add(what)
                outcome = "; ".join(text for text in ("training continues", consequence) if text)
                logger.warning("%s could not be written (%s); %s", what, _reason(error), outcome)
        else:
            if what in self._failing:
                self._failing.discard(what)
                logger.info("%s can be written again", what)


def _reason(error: Exception) -> str:
    return str(error.strerror) if isinstance(error, OSError) and error.strerror else cause(error)
