"""Python environments made without a network: of links to what is installed here."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def environment_without_halftone(folder: Path) -> str:
    """The Python of an environment that has torch, diffusers and transformers, what those require, and no more."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    for name in required_packages("torch", "diffusers", "transformers"):
        package = importlib.metadata.distribution(name)
        for top_level in {path.parts[0] for path in package.files or () if path.parts[0] not in ("..", "__pycache__")}:
            link = site_packages / top_level
            if not link.exists():
                link.symlink_to(package.locate_file(top_level))
    return str(folder / "bin" / "python")


def required_packages(*names: str) -> set[str]:
    """`names` and all that they require without extras, as far as it is installed here."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        found.add(name)
        parsed = [Requirement(requirement) for requirement in requirements]
        waiting += [r.name for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found
