"""Python environments made from the packages installed here, and, for other versions, from the package index."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
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


def environment_with(folder: Path, *requirements: str) -> str:
    """Make an environment with these packages, such as `diffusers==0.35.2`, from the package index; return its Python.

    All other packages are those installed here. pip installs only what the requirements need in another version, so
    that nothing large is downloaded.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    (site_packages / "installed_here.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--upgrade"]
    done = subprocess.run([*pip, *requirements], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return str(python)


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
