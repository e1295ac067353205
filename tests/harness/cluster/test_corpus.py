"""A shared corpus: what is written is read back, what is no case is left out, and what cannot be used is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa_oracle.harness.cluster.corpus import SharedCorpus
from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.scenarios.files import MAX_FILE_BYTES, digest
from tests.support.metadata_cases import DECODE, TWO_LENGTHS, one_replay

pytest.importorskip("fsspec", reason="fsspec, which comes with dask's distributed, is not installed")
ONE = one_replay(DECODE)


def test_what_is_added_is_read_back(tmp_path: Path) -> None:
    first, second = (SharedCorpus(str(tmp_path / "corpus")) for _ in range(2))
    assert first.cases() == ([], [])
    for scenario in (ONE, TWO_LENGTHS, ONE):
        first.add(scenario)
    found, unusable = second.cases()
    assert sorted(map(digest, found)) == sorted(map(digest, (ONE, TWO_LENGTHS)))
    assert unusable == []
    assert {path.name for path in (tmp_path / "corpus").iterdir()} == {
        f"{digest(one)}.json" for one in (ONE, TWO_LENGTHS)
    }


def test_an_address_in_memory() -> None:
    corpus = SharedCorpus("memory://corpus-of-a-test")
    corpus.add(ONE)
    assert corpus.cases() == ([ONE], [])


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 100_000, b" " * (MAX_FILE_BYTES + 1)])
def test_a_file_that_is_no_case_is_left_out(content: bytes, tmp_path: Path) -> None:
    corpus = SharedCorpus(str(tmp_path))
    corpus.add(ONE)
    (tmp_path / "bad.json").write_bytes(content)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "notes.txt").write_text("not a case")
    found, (line,) = corpus.cases()
    assert found == [ONE]
    assert "bad.json" in line
    assert "\n" not in line


@pytest.mark.parametrize("address", ["nonsense://somewhere", "{file}/below"])
def test_an_address_that_cannot_be_used_is_one_line(address: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BackendError, match="--corpus ") as error:
        SharedCorpus(address.format(file=tmp_path / "file"))
    assert "\n" not in str(error.value)
