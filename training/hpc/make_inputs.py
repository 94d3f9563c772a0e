"""Make inputs that several experiments share; a job of its own, which their jobs wait for.

    python training/hpc/make_inputs.py data/posters_64 --configs configs/experiments/autoencoder/quickstart.yaml

The inputs are named as in the `prepare` entries of these experiments. What is complete is left unchanged. The exit
status is 75 after a signal; the same command resumes.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence

from pipelines.tools.cli import Options, UserError, entry_point, nearest
from training.core.parsing import parse_config
from training.engine.prepare import make_missing
from training.engine.signals import Interrupted, StopSignal
from training.experiments.registry import config_class, stage_of


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    recipes: dict[str, str] = {}
    for file in options.configs:
        recipes |= parse_config(config_class(stage_of(file)), ["--config", file, *options.flags]).recipes()
    for path in options.inputs:
        if path not in recipes:
            raise UserError(f"no config has {path} in `prepare`{nearest(path, recipes)}; name one of {list(recipes)}")
    with StopSignal() as stop:
        try:
            make_missing({path: recipes[path] for path in recipes if path in options.inputs}, lambda: stop.requested)
        except Interrupted:
            return stop.exit_status(stop.requested or signal.SIGTERM)
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options; the arguments after `--` become `flags`. Raises UserError."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = Options(__doc__)
    parser.add_argument("inputs", nargs="+", help="Paths of the inputs")
    parser.add_argument("--configs", nargs="+", required=True, help="YAML config files of the experiments")
    options = parser.parse(words[:cut])
    options.flags = words[cut + 1 :]
    return options


if __name__ == "__main__":
    entry_point(main)
