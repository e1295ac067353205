"""What a survey of a published backend found, as a record to compare later surveys with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from nsa_oracle.harness.errors import ScenarioError, one_line
from nsa_oracle.harness.scenarios.files import save
from nsa_oracle.harness.search.backend_survey import BackendFound, Property


class RecordedRow(BaseModel):
    """One property that was checked. case: file of the case that broke it, beside the record."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    call: str
    mode: str
    name: str
    broken: bool = False
    steps: list[int] = []
    finding: str = ""
    case: str | None = None

    @property
    def key(self) -> Property:
        return Property(self.call, self.mode, self.name)


class VersionRecord(BaseModel):
    """The verdict on one version of ``engine``. adapter: the known version whose adapter judged it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    engine: str = "sglang"
    version: str
    adapter: str
    cases: int
    seed: int
    rows: list[RecordedRow]

    @property
    def checked(self) -> set[Property]:
        return {row.key for row in self.rows}

    @property
    def broken(self) -> set[Property]:
        return {row.key for row in self.rows if row.broken}


@dataclass(frozen=True)
class Changes:
    """What differs from a record, in the order of the rows."""

    new_breaks: list[Property]
    mended: list[Property]
    no_longer_checked: list[Property]
    newly_checked: list[Property]


def record_of(found: BackendFound, engine: str, version: str, adapter: str, cases: int, seed: int) -> VersionRecord:
    """The verdict of a survey. A broken property names the case that ``save_record`` writes."""
    rows = []
    for key, row in sorted(found.rows.items()):
        case = "-".join([engine, version, *(word for word in key if word != "-")]).replace(" ", "_") + ".json"
        rows.append(
            RecordedRow(
                **key._asdict(),
                broken=bool(row.broken),
                steps=sorted(row.steps),
                finding=row.finding,
                case=case if row.broken else None,
            )
        )
    return VersionRecord(engine=engine, version=version, adapter=adapter, cases=cases, seed=seed, rows=rows)


def changes(old: VersionRecord | None, new: VersionRecord) -> Changes:
    """What changed from ``old`` to ``new``; without ``old`` every break is new. A break that was not checked is new."""
    before, broken = (set(), set()) if old is None else (old.checked, old.broken)
    return Changes(
        sorted(new.broken - broken),
        sorted((broken & new.checked) - new.broken),
        sorted(before - new.checked),
        [] if old is None else sorted(new.checked - before),
    )


def record_file(folder: Path, engine: str, version: str) -> Path:
    """The file of the verdict on ``version``."""
    return folder / f"{engine}-{version}.json"


def load_record(file: Path) -> VersionRecord | None:
    """The verdict in ``file``, or None if there is none. Raises ScenarioError, in one line, if it is malformed."""
    try:
        return VersionRecord.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ScenarioError(
            f"{file}: not a verdict: {where}: {one_line(first['msg'])}; --record writes a new one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{file}: cannot be read: {one_line(str(error))}") from None


def save_record(record: VersionRecord, found: BackendFound, folder: Path) -> Path:
    """Write ``record`` and the case of each broken property to ``folder``. Returns the record's file.

    A case that is there already stays: what is published under a version does not change.

    Raises ScenarioError, in one line, if they cannot be written.
    """
    file = record_file(folder, record.engine, record.version)
    compact = [json.dumps(row.model_dump(exclude_defaults=True)) for row in record.rows]
    head = json.dumps(record.model_dump(exclude={"rows"}), indent=1)[:-2]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for row in record.rows:
            case = found.rows[row.key].case
            if row.case is not None and case is not None and not (folder / row.case).exists():
                save(case.model_copy(update={"note": row.finding}), folder / row.case)
        file.write_text(head + ',\n "rows": [\n  ' + ",\n  ".join(compact) + "\n ]\n}\n", encoding="utf-8")
    except OSError as error:
        raise ScenarioError(
            f"{folder}: cannot be written: {error.strerror or error}; choose another --records"
        ) from None
    return file
