"""Copy a folder of images to scans/, unless it is there, and caption it: `caption_a_copy.py IMAGES MODEL`."""

import shutil
import sys
from pathlib import Path

from data_scripts.caption_images import main
from pipelines.tools.cli import UserError, entry_point

COPY, HALF = Path("scans"), Path("scans_half_copied")
FLAGS = ("--batch_size", "2", "--max_new_tokens", "6", "--device", "cpu")


def caption_a_copy() -> int | None:
    images, model = sys.argv[1:]
    if not COPY.exists():
        shutil.rmtree(HALF, ignore_errors=True)
        try:
            shutil.copytree(images, HALF)
            HALF.rename(COPY)
        except (OSError, shutil.Error) as error:
            raise UserError(f"the images cannot be copied ({error})") from None
    return main(["--train_data_dir", str(COPY), "--model", model, *FLAGS])


if __name__ == "__main__":
    entry_point(caption_a_copy)
