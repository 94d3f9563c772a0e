"""Run a training script that receives a SIGTERM at the beginning of a step.

    python interrupted.py STEP script.py flags …

Steps count from 0. Halftone is not imported here, so that the script may be of any version.
"""

from __future__ import annotations

import runpy
import signal
import sys

from torch.nn.modules.module import register_module_forward_pre_hook


def main() -> None:
    step, script = int(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]

    def interrupt(module, arguments) -> None:
        if type(module).__name__.endswith("Phase") and arguments[1].step == step:
            signal.raise_signal(signal.SIGTERM)

    register_module_forward_pre_hook(interrupt)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
