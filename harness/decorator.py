"""The decorator that makes a pytest test of a backend or a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

_Test = TypeVar("_Test", bound=Callable[..., Any])

KINDS = ("saved", "metadata", "layers")
"""What can be judged: the repository's saved cases, drawn cases of metadata alone, drawn cases with a layer."""
SAVED_IF_ANY = "saved if any"  # the saved cases; a repository without any is no mistake


def judged(
    backend: str | Callable[..., object] | None = None,
    layer: str | Callable[..., object] | None = None,
    profile: str | None = None,
    cases: Sequence[str] | None = None,
) -> Callable[[_Test], _Test]:
    """Make a test of a backend or a layer: one item for each saved case and each of eight shards of the drawn ones.

    backend: a callable of (config, req_to_token), or its name as ``module:attribute``; layer: likewise, of (config,
    attention). The options --oracle-backend and --oracle-layer, and then ``optimized/``, stand for those not given.
    profile: how many cases to draw, as --oracle-profile. cases: some of ``KINDS``, or SAVED_IF_ANY; by default the
    saved ones if there are any, metadata alone for a backend, and those with a layer for a layer. The test's own body
    runs after each item has passed.
    """
    import pytest  # late: importing nsa_oracle.harness loads no pytest

    mark = pytest.mark.oracle(backend=backend, layer=layer, profile=profile, cases=cases)
    return cast("Callable[[_Test], _Test]", mark)
