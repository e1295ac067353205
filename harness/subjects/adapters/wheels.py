"""Wheels of engines: fetched without being installed, and unpacked as far as an adapter needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from nsa_oracle.harness.errors import BackendError, one_line


def fetched(name: str, version: str | None, cache: Path) -> tuple[Path, str]:
    """A wheel of ``name`` in ``cache``, of ``version`` or the newest on the package index (None), and its version.

    A wheel that is in ``cache`` is not fetched again. Raises BackendError, in one line, if there is no wheel for this
    Python, the index cannot be reached, or nothing can be written.
    """
    if version is not None:
        try:
            wanted = Version(version)
        except InvalidVersion:
            raise BackendError(f"'{one_line(version, 40)}' is not a version; give one such as 0.5.23") from None
        for wheel in sorted(cache.glob(f"{name}-*.whl")):
            if _version_of(wheel) == wanted:
                return wheel, str(wanted)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            wheel = _download(name if version is None else f"{name}=={version}", Path(folder))
            return Path(shutil.move(wheel, cache / wheel.name)), str(_version_of(wheel))
    except OSError as error:
        raise BackendError(f"{cache}: cannot be written: {error.strerror or error}; choose another --cache") from None


def _download(requirement: str, folder: Path) -> Path:
    words = ("download", "--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", *words, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    cause = one_line(said[0] if said else (done.stderr.strip().splitlines() or ["no wheel"])[-1], 120)
    raise BackendError(f"{requirement} cannot be fetched: {cause}; check the version, the network and pip's index")


def _version_of(wheel: Path) -> Version | None:
    try:
        return parse_wheel_filename(wheel.name)[1]
    except (InvalidWheelFilename, InvalidVersion):
        return None


def unpacked(wheel: Path, files: Sequence[str], folder: Path) -> None:
    """Unpack ``files`` of ``wheel``, and nothing else, to ``folder``, which is replaced.

    Raises BackendError, in one line, if it is not a wheel, lacks one of them, or cannot be written.
    """
    try:
        if folder.exists():
            shutil.rmtree(folder)
        with zipfile.ZipFile(wheel) as archive:
            missing = sorted(set(files) - set(archive.namelist()))
            if missing:
                raise BackendError(f"it has no {missing[0]}")
            for name in files:
                archive.extract(name, folder)
    except zipfile.BadZipFile:
        raise BackendError(f"{wheel} is not a wheel; delete it, and it is fetched again") from None
    except OSError as error:
        raise BackendError(f"{folder}: cannot be written: {error.strerror or error}; choose another --cache") from None
