"""Wheels are fetched once, and only what is asked for is unpacked."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.subjects.adapters import sglang, wheels
from tests.support import miniature_sglang


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip takes for the package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_wheel_is_fetched_once(index: Path, tmp_path: Path) -> None:
    path = miniature_sglang.wheel(index)
    cache = tmp_path / "cache"
    wheel, version = wheels.fetched("sglang", "0.5.8", cache)
    assert (wheel, version) == (cache / path.name, "0.5.8")
    path.unlink()
    assert wheels.fetched("sglang", "0.5.8", cache) == (wheel, version)
    with pytest.raises(BackendError, match=r"^sglang==0.5.9 cannot be fetched: .*; check the version, the network"):
        wheels.fetched("sglang", "0.5.9", cache)
    assert [file.name for file in cache.iterdir()] == [wheel.name], "nothing is left behind"
    with pytest.raises(BackendError, match=r"^'newest' is not a version; give one such as 0.5.23"):
        wheels.fetched("sglang", "newest", cache)


def test_a_cache_that_cannot_be_written_is_refused(index: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match=r"file/cache: cannot be written: Not a directory; choose another --cache"):
        wheels.fetched("sglang", "0.5.8", tmp_path / "file" / "cache")


def test_only_what_is_named_is_unpacked_and_what_was_there_is_gone(tmp_path: Path) -> None:
    wheel, folder = miniature_sglang.wheel(tmp_path), tmp_path / "unpacked"
    (folder / "sglang").mkdir(parents=True)
    (folder / "sglang" / "of_another_time.py").write_text("")
    wheels.unpacked(wheel, ["sglang/_version.py"], folder)
    assert [file.name for file in folder.rglob("*.py")] == ["_version.py"]
    with pytest.raises(BackendError, match=r"^it has no sglang/gone.py$"):
        wheels.unpacked(wheel, ["sglang/_version.py", "sglang/gone.py"], folder)
    wheel.write_text("no zip")
    with pytest.raises(BackendError, match=r"is not a wheel; delete it, and it is fetched again$"):
        wheels.unpacked(wheel, [], folder)


@pytest.mark.parametrize(
    ("version", "near"),
    [
        ("0.5.8", "0.5.8"),
        ("0.5.8.post1", "0.5.8"),
        ("0.5.24", "0.5.23"),
        ("0.5.19", "0.5.23"),
        ("0.5.18", "0.5.15"),
        ("0.6.0", None),
        ("1.5.8", None),
        ("from a branch", None),
    ],
)
def test_the_nearest_version_is_of_the_same_series(version: str, near: str | None) -> None:
    assert sglang.PUBLISHED.nearest_to(version) == near
