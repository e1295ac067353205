"""A published package of which adapters run a few modules, from an installation or an unpacked wheel."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Protocol, TypeVar

from packaging.version import InvalidVersion, Version

from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.subjects.adapters.stand_ins import Partial

REFUSED = " (called, and nothing stands for it)"


@dataclass(frozen=True, kw_only=True)
class PackageLayout:
    """Where one version of a package has its backend.

    version: the version that has it. real: full names of modules that are the package's own; those that end in ``.*``
    are packages with all that is below them. kernels: more of them, which launch Triton kernels; their assertions that
    tensors are on a GPU are left out. installed: other packages that are not stood in for.
    """

    version: str
    real: tuple[str, ...]
    kernels: tuple[str, ...] = ()
    installed: tuple[str, ...] = ()

    @property
    def files(self) -> list[str]:
        """What is needed of a wheel, as it names its files."""
        names = (*self.real, *self.kernels)
        package = names[0].partition(".")[0]
        return [f"{package}/_version.py", *(name.replace(".", "/") + ".py" for name in names)]


class VersionAdapter(Protocol):
    """The class that adapts one version."""

    layout: ClassVar[Any]


Adapted = TypeVar("Adapted", bound=VersionAdapter)


class Package:
    """One package and its adapters, by version.

    name: on the package index, and that of its top-level module. folder: the environment variable that names the folder
    which contains it. values and others: see ``Partial``. series: number of leading parts of a version that near
    versions share.
    """

    def __init__(
        self,
        name: str,
        folder: str,
        values: Callable[[], Mapping[str, Mapping[str, object]]],
        others: Collection[str],
        series: int,
    ) -> None:
        self.name = name
        self.folder = folder
        self.values = values
        self.others = others
        self.series = series
        self.adapters: dict[str, type[Any]] = {}
        self._hook: Partial | None = None

    def adapter(self, adapter: type[Adapted]) -> type[Adapted]:
        """Decorates the adapter of one version."""
        self.adapters[adapter.layout.version] = adapter
        return adapter

    @property
    def known(self) -> str:
        """The versions that have an adapter, as a list in words."""
        return ", ".join(self.adapters)

    def located(self) -> tuple[Path, str]:
        """The folder that contains the package, and its version. Raises BackendError, in one line, if there is none."""
        named = os.environ.get(self.folder) or (str(self._hook.folder) if self._hook else None)
        if named is None:
            spec = importlib.util.find_spec(self.name)
            if spec is None or not spec.submodule_search_locations:
                raise BackendError(
                    f"{self.name} is not installed; set {self.folder} to the folder of an unpacked wheel"
                )
            folder = Path(next(iter(spec.submodule_search_locations))).parent
        else:
            folder = Path(named)
        file = folder / self.name / "_version.py"
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise BackendError(
                f"{folder} contains no {self.name}/_version.py; set {self.folder} to an unpacked wheel"
            ) from None
        version = re.search(r"^__version__ = (?:version = )?['\"](.+?)['\"]", text, re.MULTILINE)
        if version is None:
            raise BackendError(f"{file} names no version; known versions are {self.known}")
        return folder, version[1]

    def load(self, layout: PackageLayout, module: str) -> ModuleType:
        """The module. Raises BackendError, in one line, if the version that was found is not that of ``layout``."""
        folder, found = self.located()
        if found != layout.version:
            raise BackendError(
                f"{self.name} {found} in {folder}, not {layout.version}; known versions are {self.known}"
            )
        if self._hook is None:
            real = (*layout.real, *layout.kernels)
            others = [name for name in self.others if name not in layout.installed]
            hook = Partial(self.name, folder, real, self.values(), others, layout.kernels)
            try:
                hook.install()
            except ImportError as error:
                raise BackendError(f"{self.name}: {error}; judge it in a process of its own") from None
            self._hook = hook
        try:
            return importlib.import_module(module)
        except (ImportError, OSError) as error:
            raise BackendError(f"{self.name} {found} in {folder} has another layout: {error}") from None

    def stand_ins(self) -> list[str]:
        """Which parts are not the package's own, and what was called that nothing stands for."""
        if self._hook is None:
            return []
        return [*sorted(self._hook.used), *(name + REFUSED for name in sorted(self._hook.refused))]

    def nearest_to(self, version: str) -> str | None:
        """The known version nearest to ``version`` in its series, the later of two; None if there is none."""
        try:
            wanted = Version(version)
        except InvalidVersion:
            return None

        def distance(one: Version) -> tuple[int, ...]:
            parts = zip(_parts(one), _parts(wanted), strict=True)
            return (*(abs(a - b) for a, b in parts), *(-part for part in _parts(one)))

        series = slice(self.series)
        near = [one for one in map(Version, self.adapters) if _parts(one)[series] == _parts(wanted)[series]]
        found = min(near, key=distance, default=None)
        return None if found is None else str(found)

    def chosen(self, name: str) -> type[Any]:
        """For a module's ``__getattr__``: ``installed`` is the adapter of the version that is found, ``nearest`` that
        of the nearest known version, if it has none. Raises BackendError if there is none for it.
        """
        if name not in ("installed", "nearest"):
            raise AttributeError(name)
        folder, found = self.located()
        near = self.nearest_to(found) if name == "nearest" else None
        if found in self.adapters:
            return self.adapters[found]
        if near is None:
            raise BackendError(f"{self.name} {found} in {folder}; known versions are {self.known}")
        adapter = self.adapters[near]
        return type(adapter.__name__, (adapter,), {"layout": replace(adapter.layout, version=found)})


def _parts(version: Version) -> tuple[int, int, int]:
    return version.major, version.minor, version.micro
