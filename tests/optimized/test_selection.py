"""Selecting equals the reference bit for bit, whatever the scores, lengths and strides, and whatever scratch holds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from nsa_oracle.optimized import kernels, topk
from nsa_oracle.reference import topk as reference_topk

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = 24
LINE = kernels.topk.LINE.value  # the filter keeps whole lines
GARBAGE = 0x7FFFFFFF  # in dead cells of a table and of scratch: looking it up would fault
Logits = Callable[[int], torch.Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), device=DEVICE)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=generator(seed), device=DEVICE)


def from_bits(bits: torch.Tensor) -> torch.Tensor:
    return bits.int().view(torch.float32)


def permuted(row: torch.Tensor) -> torch.Tensor:
    return row[torch.randperm(len(row), generator=generator(), device=DEVICE)]


def sweep(count: int) -> torch.Tensor:
    return torch.arange(count, device=DEVICE)


# Rows of so many logits that search by bits, by bins, by interpolation or by a sample may find hard.
DISTRIBUTIONS: dict[str, Logits] = {
    "normal": lambda n: randn(n),
    "all equal": lambda n: torch.full((n,), -1.5, device=DEVICE),
    "all but one equal": lambda n: torch.where(sweep(n) == n // 2, 1.0, torch.zeros(n, device=DEVICE)),
    "two values": lambda n: torch.where(rand(n) < 0.5, 1.0, 2.0),
    "few of the larger value": lambda n: torch.where(sweep(n) % 97 == 5, 1.0, torch.zeros(n, device=DEVICE)),
    "integers": lambda n: torch.randint(-3, 4, (n,), generator=generator(), device=DEVICE).float(),
    "ascending": lambda n: sweep(n).float(),
    "descending": lambda n: -sweep(n).float(),
    "adjacent floats": lambda n: permuted(from_bits(0x3F800000 + sweep(n))),
    "adjacent floats around zero": lambda n: permuted((sweep(n) - n // 2) * 2.0**-149),
    "adjacent negative floats, in pairs": lambda n: permuted(-from_bits(0x40490000 + sweep(n) // 2)),
    "zeros of both signs": lambda n: torch.where(rand(n) < 0.5, -0.0, torch.zeros(n, device=DEVICE)),
    "zeros and the smallest of both signs": lambda n: (
        torch.randint(-1, 2, (n,), generator=generator(), device=DEVICE) * torch.where(rand(n) < 0.5, -0.0, 2.0**-149)
    ),
    "every exponent": lambda n: permuted(
        torch.where(sweep(n) % 2 == 0, 1, -1) * 2.0 ** (sweep(n) % 270 - 145).double()
    ).float(),
    "normal and far outliers": lambda n: torch.where(sweep(n) % 101 == 7, 1e38, randn(n)),
    "all in one bin but the best": lambda n: 5 + 1e-3 * randn(n) * (rand(n, seed=1) < 0.9),
    "half NaN": lambda n: torch.where(rand(n) < 0.5, torch.nan, randn(n)),
    "nearly all NaN or -inf": lambda n: torch.where(
        rand(n) < 0.98, torch.where(rand(n, seed=1) < 0.5, torch.nan, -torch.inf), randn(n)
    ),
    "all NaN": lambda n: torch.full((n,), torch.nan, device=DEVICE),
    "all inf": lambda n: torch.full((n,), torch.inf, device=DEVICE),
    "both infinities and NaN": lambda n: torch.where(
        rand(n) < 0.3, torch.inf, torch.where(rand(n, seed=1) < 0.5, -torch.inf, torch.nan)
    ),
    "the best in one place": lambda n: randn(n) + 9.0 * ((sweep(n) > n // 3) & (sweep(n) < n // 2)),
    "the best at the end": lambda n: randn(n) + 9.0 * (sweep(n) >= n - n // 8),
    "the best at a period": lambda n: randn(n) + 9.0 * (sweep(n) % 8 == 3),
}


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def in_strided_rows(rows: list[torch.Tensor], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, a view into a wider tensor, with NaN and inf beyond each row's length; and strided int64 lengths."""
    logits = torch.full((len(rows), width + 7), torch.inf, device=DEVICE)[:, 3 : width + 3]
    logits[rand(len(rows), width) < 0.5] = torch.nan
    for row, values in enumerate(rows):
        logits[row, : len(values)] = values
    lengths = torch.full((2 * len(rows),), GARBAGE, device=DEVICE)[::2]
    lengths[:] = torch.tensor([len(row) for row in rows])
    return logits, lengths


def lengths_about(*numbers: int) -> list[int]:
    return sorted({number + step for number in numbers for step in (-1, 0, 1) if number + step >= 0})


def check(logits: torch.Tensor, lengths: torch.Tensor, k: int) -> None:
    """Each transform, with int32 and int64 lengths."""
    rows, width = logits.shape
    positions = reference_topk.topk_indices(logits, lengths, k)
    assert_same_bits(topk.topk_indices(logits, lengths, k), positions)
    table = torch.randint(0, 10**9, (rows, width + 9), generator=generator(), dtype=torch.int32, device=DEVICE)[:, 9:]
    table[torch.arange(width, device=DEVICE) >= lengths[:, None]] = GARBAGE
    expected = reference_topk.transform_paged(positions, table)
    assert_same_bits(topk.topk_transform_paged(logits, lengths.int(), table, k), expected)
    offsets = torch.arange(2 * rows, dtype=torch.int32, device=DEVICE)[::2] * 1000
    expected = reference_topk.transform_ragged(positions, offsets)
    assert_same_bits(topk.topk_transform_ragged(logits, lengths, offsets, k), expected)


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of over 256 tokens are filtered by programs that look at 64 at a time; three of them share each of four."""
    monkeypatch.setattr(topk, "BLOCKS", {64: 4, 256: 4})
    monkeypatch.setattr(topk, "SMALL_BLOCK", 128)
    monkeypatch.setattr(topk, "FILTER_BLOCK", 64)
    monkeypatch.setattr(topk, "FILTER_WARPS", 4)
    monkeypatch.setattr(topk, "FILTER_PROGRAMS", 12)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_rows_of_one_block(name: str) -> None:
    k, width = 33, 400
    rows = [DISTRIBUTIONS[name](length) for length in [*lengths_about(k, LINE, 128, 256), 0, 2, width]]
    check(*in_strided_rows(rows, width), k)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.usefixtures("_small_blocks")
def test_rows_of_many_blocks(name: str) -> None:
    k, width = 33, 1000
    rows = [DISTRIBUTIONS[name](length) for length in (256, 257, 300, width)]
    check(*in_strided_rows(rows, width), k)


@pytest.mark.usefixtures("_small_blocks")
def test_lengths_about_everything() -> None:
    k, width = 33, 700
    lengths = lengths_about(k, LINE, 64, 128, 256, 256 + 2 * LINE, 512, width - 1)
    check(*in_strided_rows([DISTRIBUTIONS["normal"](length) for length in lengths], width), k)


@pytest.mark.parametrize(("width", "k"), [(1, 1), (40, 16), (1024, 500), (1025, 64), (3000, 700), (8192, 2048)])
def test_every_block(width: int, k: int) -> None:
    lengths = [min(length, width) for length in (width, width - 1, k, k + 1, 0, 1)]
    rows = [DISTRIBUTIONS[name](length) for length, name in zip(lengths, DISTRIBUTIONS, strict=False)]
    check(*in_strided_rows(rows, width), k)


@pytest.mark.parametrize(("width", "k"), [(8193, 2048), (20000, 2048), (40000, 17)])
def test_wide_tables(width: int, k: int) -> None:
    lengths = {"normal": width, "two values": 8192, "integers": min(width, 16384), "half NaN": 8193}
    check(*in_strided_rows([DISTRIBUTIONS[name](length) for name, length in lengths.items()], width), k)


def test_no_row_is_longer_than_its_logits() -> None:
    logits = randn(2, 40)
    expected = reference_topk.topk_indices(logits, torch.tensor([40, 40]), 7)
    assert_same_bits(topk.topk_indices(logits, torch.tensor([45, 40], device=DEVICE), 7), expected)
    assert topk.topk_indices(logits, torch.tensor([-3, 0], device=DEVICE), 2).tolist() == [[-1, -1]] * 2


def test_one_row_of_memory_shown_by_all() -> None:
    logits, lengths = randn(1, 300).expand(ROWS, -1), torch.arange(ROWS, device=DEVICE) * 12
    table = torch.arange(300, dtype=torch.int32, device=DEVICE).flip(0)[None].expand(ROWS, -1)
    expected = reference_topk.topk_transform_paged(logits, lengths, table, 32)
    assert_same_bits(topk.topk_transform_paged(logits, lengths, table, 32), expected)


@pytest.mark.parametrize(("rows", "width"), [(0, 16), (2, 0), (0, 10000)])
def test_selecting_from_nothing(rows: int, width: int) -> None:
    logits = torch.empty(rows, width, device=DEVICE)
    lengths = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    table = torch.empty(rows, width, dtype=torch.int32, device=DEVICE)
    assert topk.topk_transform_paged(logits, lengths, table, 4).tolist() == [[-1] * 4] * rows


# The filter ------------------------------------------------------------------------------------------------------


POISON = GARBAGE | 0x7F800000 << 32  # inf, at a position beyond all bounds
NOTHING = GARBAGE | 0x7FC00000 << 32  # NaN


def scratch(rows: int, shares: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the filter fills, poisoned: with scores better than any, at positions and of counts beyond all bounds."""
    likely = torch.full((rows, shares, max(topk.BLOCKS)), POISON, device=DEVICE)
    return likely, torch.full((rows, shares), GARBAGE, dtype=torch.int32, device=DEVICE)


def entries(scores: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What is stored of tokens."""
    return scores.view(torch.int32).long() << 32 | positions


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.usefixtures("_small_blocks")
def test_what_the_filter_keeps(name: str) -> None:
    """All tokens from some score upwards, each in one share, in order; of shorter rows nothing."""
    k, width, shares, capacity = 33, 1152, 3, max(topk.BLOCKS)  # a share of the widest is larger than is stored
    rows = [DISTRIBUTIONS[name](length) for length in (256, 257, 300, width)]
    logits, lengths = in_strided_rows(rows, width)
    likely, counts = scratch(len(rows) + 1, shares)
    topk.topk_filter_op(likely[:-1], counts[:-1], logits, lengths, k)
    assert likely[-1].eq(POISON).all()  # nothing is written behind
    assert counts[0].tolist() == [0] * shares
    for row, scores in list(enumerate(rows))[1:]:
        kept = []
        for share, count in enumerate(counts[row].tolist()):
            if count > capacity:
                return  # what is stored then is of no use
            kept.append(likely[row, share, :count] & 0xFFFFFFFF)
            whole = -(-count // LINE) * LINE
            assert torch.equal(likely[row, share, :count], entries(scores[kept[-1]], kept[-1]))
            assert (likely[row, share, count:whole] >> 32).int().view(torch.float32).isnan().all()
            assert likely[row, share, whole:].eq(POISON).all()
        if sum(map(len, kept)):
            positions = torch.cat(kept)
            assert torch.equal(positions, (scores >= scores[positions].min()).nonzero()[:, 0])


@pytest.mark.parametrize("count", [250, 256, 257])
@pytest.mark.usefixtures("_small_blocks")
def test_the_filter_fills_its_scratch_and_no_more(count: int) -> None:
    """The first ``count`` tokens of a row are its best; scratch has room for 256, and for whole lines."""
    logits = torch.where(sweep(300) < count, 1.0, torch.zeros(1, 300, device=DEVICE))
    likely, counts = scratch(2, 1)
    topk.topk_filter_op(likely[:1], counts[:1], logits, torch.tensor([300], device=DEVICE), 64)
    assert counts[0].tolist() == [count]
    assert likely[1].eq(POISON).all()
    if count <= 256:
        assert torch.equal(likely[0, 0, :count], entries(logits[0, :count], sweep(count)))
        assert (likely[0, 0, count:] >> 32).int().view(torch.float32).isnan().all()


def test_the_filter_keeps_little_and_enough() -> None:
    """Of distinct scores in random order; the kernel works without, but then one program looks at the whole row."""
    k = 2048
    for length in (8193, 12000, 16384, 32768, 65536):
        logits = randn(1, length, seed=length)
        likely, counts = scratch(1, 4)
        topk.topk_filter_op(likely, counts, logits, torch.tensor([length], device=DEVICE), k)
        assert k <= int(counts.sum()) <= 2 * k


def fill(shares: list[torch.Tensor], scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scratch of one row of which those positions are kept."""
    likely, counts = scratch(1, len(shares))
    for share, kept in enumerate(shares):
        stored = kept[: likely.shape[2]]
        likely[0, share, : len(stored)] = entries(scores[stored], stored)
        likely[0, share, len(stored) : -(-len(stored) // LINE) * LINE] = NOTHING
        counts[0, share] = len(kept)
    return likely, counts


SPLITS = {  # of 600 tokens with blocks of 128 and 256
    "too few": [10, 0, 20],
    "just enough": [0, 0, 33],
    "a small block": [33, 0, 0, 1, 32],
    "a whole small block": [128],
    "a block": [1, 1, 64, 0, 1, 31, 2],
    "a whole block": [32] * 8,
    "one line more than a block has": [32] * 8 + [1],
    "more tokens than a block has": [200, 0, 200],
    "more than were stored": [300, 33],
}


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("distribution", ["normal", "integers", "ascending"])
@pytest.mark.usefixtures("_small_blocks")
def test_whatever_was_kept(name: str, distribution: str) -> None:
    """What was kept is used if the best must be among it and it fits, however it lies; otherwise the whole row is."""
    k, length, sizes = 33, 600, SPLITS[name]
    scores = DISTRIBUTIONS[distribution](length)
    best = torch.sort(scores, descending=True, stable=True).indices[: sum(sizes)].sort().values
    kept = fill(list(best.split(sizes)), scores)
    out = torch.empty(1, k, dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([length], device=DEVICE)
    topk.topk_op(out, scores[None], lengths, None, None, *kept)
    assert_same_bits(out, reference_topk.topk_indices(scores[None], lengths, k))
    if k <= sum(sizes) and name.startswith("a "):
        scores[:] = torch.nan  # not looked at: what was kept is
        again = torch.empty_like(out)
        topk.topk_op(again, scores[None], lengths, None, None, *kept)
        assert_same_bits(again, out)


@pytest.mark.usefixtures("_small_blocks")
def test_scratch_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [DISTRIBUTIONS["normal"](length) for length in (30, 34, 256, 257, 500, 1500)]
    logits, lengths = in_strided_rows(rows, 1500)
    expected = topk.topk_indices(logits, lengths, 33)
    empty = torch.empty

    def poisoned(*args: int, **kwargs: object) -> torch.Tensor:
        made: torch.Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(POISON if made.dtype is torch.int64 else GARBAGE)

    monkeypatch.setattr(torch, "empty", poisoned)
    assert_same_bits(topk.topk_indices(logits, lengths, 33), expected)


@pytest.mark.usefixtures("_small_blocks")
def test_how_many_programs_filter_a_row_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [DISTRIBUTIONS[name](1500) for name in ("normal", "integers", "the best in one place")]
    logits, lengths = in_strided_rows(rows, 1500)
    results = []
    for programs in (1, 6, 15, 48):
        monkeypatch.setattr(topk, "FILTER_PROGRAMS", programs)
        results.append(topk.topk_indices(logits, lengths, 33))
    assert all(torch.equal(result, results[0]) for result in results)


def test_more_than_a_block_can_select() -> None:
    width = max(topk.BLOCKS) + 1
    with pytest.raises(AssertionError, match="too large"):
        topk.topk_indices(randn(1, width), torch.tensor([width], device=DEVICE), width - 1)


def test_reference_agrees_with_numpy() -> None:
    """The expected values above: sorted by hand, on the distributions used there."""
    for logits in DISTRIBUTIONS.values():
        scores = np.nan_to_num(logits(300).cpu().numpy(), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        best = sorted(range(300), key=lambda token: (-scores[token], token))[:33]
        got = reference_topk.topk_indices(logits(300)[None], torch.tensor([300]), 33)
        assert got[0].tolist() == sorted(best)
