"""Commands in an environment that has the project's wheel and nothing of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.project import PROJECT

PARTS = ("harness", "optimized", "reference")


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def environment(site: Path) -> dict[str, str]:
    """One in which packages are found in ``site``, and the libraries of this one, but nothing of the checkout."""
    libraries = [path for path in sys.path if path and not Path(path).resolve().is_relative_to(PROJECT)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON"))}
    return {**inherited, "PYTHONPATH": os.pathsep.join([str(site), *libraries])}


def python(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python in a folder where nothing of the checkout is found."""
    environ = {**environment(site), "COLUMNS": "200"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=600)


def run(site: Path, folder: Path, *words: str) -> str:
    """What Python prints, in a folder where nothing of the checkout is found."""
    done = python(site, folder, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
