"""What the items of a marked test judge: one saved case each, or one shard of the drawn ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nsa_oracle.harness.decorator import KINDS, SAVED_IF_ANY
from nsa_oracle.harness.errors import one_line
from nsa_oracle.harness.search.drawing import PROFILES, SHARDS, Profile


@dataclass(frozen=True)
class Part:
    """A share of what one test judges.

    backend, layer: ``module:attribute``, or None for ``optimized/``. profile: how many cases are drawn. file: the saved
    case; None: cases are drawn. shard: which of ``SHARDS``; with_layer: with an attention layer behind the metadata.
    without: why there is no saved case to judge; empty if there is anything. options: the names of those that stand for
    what the test does not name itself.
    """

    backend: str | None
    layer: str | None
    profile: str
    file: Path | None = None
    shard: int = 0
    with_layer: bool = False
    without: str = ""
    options: tuple[str, ...] = ()

    @property
    def numbers(self) -> range:
        """The numbers, in the stream of drawn cases, of those to judge."""
        return PROFILES[self.profile].share(self.shard, self.with_layer)

    @property
    def cases(self) -> int:
        """The number of cases to judge."""
        if self.without:
            return 0
        return 1 if self.file is not None else len(self.numbers)

    @property
    def taken(self) -> tuple[str, ...]:
        """The options that it takes, ``options`` and the seed of drawn cases."""
        return (*self.options, "seed") if self.kind != "saved" else self.options

    @property
    def kind(self) -> str:
        """The one of ``KINDS`` that this is a share of."""
        if self.file is not None or self.without:
            return "saved"
        return "layers" if self.with_layer else "metadata"


@dataclass(frozen=True)
class Shard:
    """One of ``count`` disjoint parts that together are the whole run; ``number`` begins at 1."""

    number: int
    count: int

    def of(self, named: Mapping[str, Part]) -> dict[str, Part]:
        """The items of a test that belong to this shard: every ``count``-th."""
        return dict(list(named.items())[self.number - 1 :: self.count])

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parts(whole: Part, kinds: Sequence[str], files: Sequence[Path], without: str = "") -> dict[str, Part]:
    """The shares of a test, by the name of their item, saved cases first.

    kinds: some of ``KINDS``. without: why there are no files; a test of nothing else then has one share that says so.
    """
    named: dict[str, Part] = {}
    for kind in (kind for kind in KINDS if kind in kinds):
        prefix = f"{kind}-" if len(kinds) > 1 else ""
        if kind == "saved":
            named |= {f"{prefix}{file.stem}": replace(whole, file=file) for file in files}
        else:
            shares = (replace(whole, shard=shard, with_layer=kind == "layers") for shard in range(SHARDS))
            named |= {f"{prefix}{share.shard}": share for share in shares if share.numbers}  # few cases have few shards
    return named or {"none": replace(whole, without=without)}


def kinds_of(
    cases: Sequence[str] | None, backend: str | None, layer: str | None, profile: Profile, replays: bool = False
) -> tuple[str, ...]:
    """The kinds of cases to judge: those asked for, or else what shows most of the backend or of the layer.

    replays: whether saved cases are named, which are then judged whatever the profile.
    Raises UsageError if none are asked for, and for a name that is none of ``KINDS`` and not SAVED_IF_ANY, which stands
    for "saved" here.
    """
    if cases is None:
        alone, behind = layer is None or backend is not None, backend is None or layer is not None
        wanted = {"saved": profile.saved or replays, "metadata": alone, "layers": behind}
        return tuple(kind for kind in KINDS if wanted[kind])
    if not isinstance(cases, Iterable):
        raise pytest.UsageError(f"cases: {cases!r} is no list; give some of {KINDS}, or leave the argument out")
    asked = (cases,) if isinstance(cases, str) else tuple(cases)
    if not asked:
        told = f"the list is empty, so nothing would be judged; give some of {KINDS}, or leave the argument out"
        raise pytest.UsageError(f"cases: {told}")
    unknown = [kind for kind in asked if kind not in (*KINDS, SAVED_IF_ANY)]
    if unknown:
        raise pytest.UsageError(f"cases: there is no {', '.join(map(repr, unknown))}; choose from {KINDS}")
    return tuple("saved" if kind == SAVED_IF_ANY else kind for kind in asked)


def spec_of(judged: object, what: str) -> str | None:
    """``module:attribute`` of a backend or a layer that a test names; None stands for itself.

    Raises UsageError for an empty name, which would stand for the default if it were that of an unset variable, and for
    an object that builds nothing or that another process cannot import. what: "backend" or "layer".
    """
    if isinstance(judged, str) and not judged.strip():
        raise pytest.UsageError(f"{what}: the name is empty; give one, or leave the argument out")
    if judged is None or isinstance(judged, str):
        return judged
    if not callable(judged):
        given = "config, req_to_token" if what == "backend" else "config, attention"
        raise pytest.UsageError(
            f"{what}: {one_line(repr(judged), 100)} builds nothing; give a class or function of ({given}), or its name "
            "as 'module:attribute'"
        )
    module, name = getattr(judged, "__module__", None), getattr(judged, "__qualname__", None)
    if module is None or name is None or "." in name or module == "__main__":
        raise pytest.UsageError(
            f"{what} {one_line(repr(judged), 100)}: cannot be imported by name; define it at the top of a module, or "
            "give 'module:attribute'"
        )
    return f"{module}:{name}"
