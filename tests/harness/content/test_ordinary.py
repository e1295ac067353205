"""Random content is ordinary numbers, with zeros and denormals among them."""

from __future__ import annotations

from nsa_oracle.harness.content.content import Content
from nsa_oracle.harness.scenarios.setup import Regime
from tests.support.contents import BIG


def test_random_content_is_ordinary() -> None:
    content = Content(BIG, Regime.RANDOM, 8)
    k, index_k = content.keys(range(300), 0)
    q, index_q, weights = content.queries([(0, 0), (1, 0)], 0, [[], []])
    for tensor in (k, index_k, q, index_q, weights):
        numbers = tensor.float()
        assert bool(numbers.isfinite().all())
        assert 0.3 < float(numbers.mean() / numbers.std() + 1) < 1.7
    tiny = (k != 0) & (k.abs().float() < 2.0**-126)
    assert 300 < int(tiny.sum()) < 700
    assert float(k.abs().max()) > 16
    empty = (k[:, :512].unflatten(1, (4, 128)) == 0).all(-1)
    assert 20 < int(empty.sum()) < 150
    assert 0 < int((index_k == 0).all(1).sum()) < 20
    assert content.decode(k[0, :512]) is None
