"""Python environments made without a network, from links to the packages installed here."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def environment_without_halftone(folder: Path) -> str:
    """Make an environment with only torch, diffusers, transformers and their requirements; return its Python."""
    return environment_of(folder, "torch", "diffusers", "transformers")


def environment_of(folder: Path, *requirements: str) -> str:
    """Make an environment with only these packages and their requirements; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    for name in required_packages(*requirements):
        package = importlib.metadata.distribution(name)
        for top_level in {path.parts[0] for path in package.files or () if path.parts[0] not in ("..", "__pycache__")}:
            link = site_packages / top_level
            if not link.exists():
                link.symlink_to(package.locate_file(top_level))
    return str(folder / "bin" / "python")


def required_packages(*requirements: str) -> set[str]:
    """Return the packages in `requirements` (such as `jsonargparse[signatures]`) and everything that they require.

    Packages that are not installed here are left out.
    """
    visited: set[tuple[str, str]] = set()
    waiting = [Requirement(requirement) for requirement in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {known for package, known in visited if package == name}:
            try:
                lines = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                break  # a package for another platform
            visited.add((name, extra))
            parsed = [Requirement(line) for line in lines]
            waiting += [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": extra})]
    return {name for name, _ in visited}
