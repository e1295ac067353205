"""The decorator that makes a pytest test of a backend or a layer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

_Test = TypeVar("_Test", bound=Callable[..., Any])

KINDS = ("saved", "metadata", "layers")
"""What can be judged: the repository's saved cases, drawn cases of metadata alone, drawn cases with a layer."""
SAVED_IF_ANY = "saved if any"  # the saved cases; a repository without any is no mistake
GUARD = "_oracle_judges_this_test"  # the plugin's fixture that a marked class asks for
NOT_JUDGED = (
    "not judged: the nsa_oracle pytest plugin is not active for this test; load it with -p nsa_oracle.pytest_plugin "
    "(methods of unittest.TestCase cannot be judged)"
)

_judged_items = 0  # items that the plugin has judged and whose bodies are running


def judged(
    backend: str | Callable[..., object] | None = None,
    layer: str | Callable[..., object] | None = None,
    profile: str | None = None,
    cases: Sequence[str] | None = None,
) -> Callable[[_Test], _Test]:
    """Make a test of a backend or a layer: one item for each saved case and each shard of the drawn ones (up to 8).

    backend: a callable of (config, req_to_token), or its name as ``module:attribute``; layer: likewise, of (config,
    attention). The options --oracle-backend and --oracle-layer, and then ``optimized/``, stand for those not given.
    profile: how many cases to draw, as --oracle-profile. cases: some of ``KINDS``, or SAVED_IF_ANY; by default the
    saved ones if there are any, metadata alone for a backend, and those with a layer for a layer. The test's own body
    runs after each item has passed, and fails if the plugin has not judged the item, because it is not loaded.

    Raises TypeError for ``@judged`` without a call, which would give it the test as a backend.
    """
    if layer is None and profile is None and cases is None and _is_test(backend):
        raise TypeError(
            f"write @judged() above {getattr(backend, '__name__', '')}, not @judged; if it is no test but a backend, "
            "give its name as 'module:attribute'"
        )
    import pytest  # late: importing nsa_oracle.harness loads no pytest

    mark = pytest.mark.oracle(backend=backend, layer=layer, profile=profile, cases=cases)

    def decorate(test: _Test) -> _Test:
        if isinstance(test, type):
            return cast("_Test", pytest.mark.usefixtures(GUARD)(mark(test)))
        return cast("_Test", mark(_guarded(test)))

    return decorate


@contextmanager
def judged_item() -> Iterator[None]:
    """While it lasts, the bodies of tests may run: the plugin has judged the item."""
    global _judged_items
    _judged_items += 1
    try:
        yield
    finally:
        _judged_items -= 1


def _is_test(given: object) -> bool:
    """Whether it is a test and no backend: named like one, or a function that cannot take a backend's arguments."""
    if not isinstance(given, type):
        return inspect.isfunction(given) and (given.__name__.startswith("test") or not _takes_two(given))
    return given.__name__.startswith("Test") and not _takes_two(given)


def _takes_two(given: Callable[..., object]) -> bool:
    """Whether it can be called with two arguments, as a backend is."""
    try:
        inspect.signature(given).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True


def _guarded(test: Callable[..., Any]) -> Callable[..., Any]:
    """``test``, which fails in one line unless it is called within ``judged_item``."""

    @functools.wraps(test)
    def guarded(*arguments: Any, **named: Any) -> Any:
        __tracebackhide__ = True
        _check_judged()
        return test(*arguments, **named)

    @functools.wraps(test)
    async def guarded_coroutine(*arguments: Any, **named: Any) -> Any:
        __tracebackhide__ = True
        _check_judged()
        return await test(*arguments, **named)

    return guarded_coroutine if inspect.iscoroutinefunction(test) else guarded


def _check_judged() -> None:
    import pytest

    if not _judged_items:
        pytest.fail(NOT_JUDGED, pytrace=False)
