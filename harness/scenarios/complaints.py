"""Says in one line what is wrong with a scenario file, in the file's own names, and how to mend it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from nsa_oracle.harness.errors import meant, one_line
from nsa_oracle.harness.scenarios.scenario import SCHEMA_VERSION, Event, Scenario
from nsa_oracle.harness.scenarios.setup import FieldError, Layer, Setup

MOST = 3  # mistakes that one line names
MOST_CHARACTERS = 40  # of a value or a name of the file
_EVENTS: dict[str, type[BaseModel]] = {
    kind.model_fields["event"].default: kind for kind in get_args(get_args(Event)[0])
}
_RECORDS: dict[tuple[str | int, ...], type[BaseModel]] = {
    (): Scenario,
    ("setup",): Setup,
    ("setup", "inputs"): Setup.model_fields["inputs"].annotation,  # type: ignore[dict-item]
    ("setup", "layer"): Layer,
}
Details = Mapping[str, Any]  # of one mistake, as pydantic describes it


def complaint(error: ValidationError) -> str:
    """What is wrong, in one line: up to three mistakes, each with its place in the file, such as events[3].seq_len.

    A wrong version is named alone, since a file of another version may have other fields. Unknown names come before
    missing ones: the one is often a misspelling of the other.
    """
    mistakes: Sequence[Details] = error.errors(include_url=False)
    versions = [mistake for mistake in mistakes if mistake["loc"] == ("schema_version",)]
    if versions:
        return _version(versions[0]["input"])
    places = [mistake["loc"] for mistake in mistakes]
    mistakes = [  # a list whose elements are refused counts as empty
        mistake
        for mistake in mistakes
        if mistake["type"] != "too_short"
        or not any(
            len(place) > len(mistake["loc"]) and place[: len(mistake["loc"])] == mistake["loc"] for place in places
        )
    ]
    ordered = sorted(mistakes, key=lambda mistake: mistake["type"] != "extra_forbidden")
    named = [_one(ordered[0])]
    for mistake in ordered[1:MOST]:
        named.append(_one(mistake, brief=True))
    more = f"; and {len(ordered) - MOST:,} more" if len(ordered) > MOST else ""
    return "; ".join(named) + more


def complaint_about_value(error: ValidationError) -> str:
    """What is wrong with a single value, such as "must be at least 1, not -64"."""
    return _one(error.errors(include_url=False)[0]).removeprefix("the file: ")


def path_of(location: Sequence[str | int]) -> str:
    """A place in the file as people write it: ("events", 3, "join", "seq_len") is events[3].seq_len."""
    text = ""
    for part in _in_the_file(location):
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + one_line(part, MOST_CHARACTERS)
    return text


def _in_the_file(location: Sequence[str | int]) -> tuple[str | int, ...]:
    """``location`` without the kind of an event, which pydantic names behind its number."""
    if len(location) > 2 and location[0] == "events":
        return (*location[:2], *location[3:])
    return tuple(location)


def _version(version: object) -> str:
    if isinstance(version, int) and not isinstance(version, bool):
        if version > SCHEMA_VERSION:
            return (
                f"schema_version {_shown(version)} is newer than this version of nsa-oracle reads ({SCHEMA_VERSION}): "
                f"update it"
            )
        return f"schema_version {_shown(version)} does not exist; this version of nsa-oracle reads {SCHEMA_VERSION}"
    return f"schema_version must be the number {SCHEMA_VERSION}, not {_shown(version)}"


def _one(mistake: Details, brief: bool = False) -> str:
    """One mistake. brief: without the names to choose from, which the line has already."""
    location, kind = mistake["loc"], mistake["type"]
    if kind == "extra_forbidden":
        return _unknown(location, brief)
    if kind == "json_invalid":
        reason = one_line(mistake["ctx"]["error"], 80)
        return f"the file is not JSON: {reason}; {'is it cut short?' if 'EOF' in reason else 'mend it there'}"
    place = path_of(location) or "the file"
    if kind == "value_error":
        return _own(mistake["ctx"]["error"], location, place)
    say = _SENTENCES.get(kind)
    reason = f"cannot be {_shown(mistake['input'])}" if say is None else say(mistake)
    return f"{place}: {reason}"


def _own(error: Exception, location: Sequence[str | int], place: str) -> str:
    """The message of one of the scenario's own rules, which may name a field within the record that it judges."""
    if isinstance(error, FieldError):
        within = path_of(location)
        return f"{within}{'.' if within else ''}{error}"
    return f"{place}: {one_line(str(error))}"


def _unknown(location: Sequence[str | int], brief: bool) -> str:
    """An unknown name, with the one that was probably meant."""
    *owner, name = location
    fields = _fields_of(location)
    near = meant(str(name), fields, cutoff=0.5)
    choice = "" if brief else f", or choose from {', '.join(fields)}"
    mend = f"did you mean {near}?" if near else f"remove it{choice}"
    return f"{path_of(location)}: there is no such field of {_record(owner)}; {mend}"


def _record(owner: Sequence[str | int]) -> str:
    if len(owner) > 2 and owner[0] == "events":
        return f"the event {owner[2]}"
    return path_of(owner) or "a case"


def _fields_of(location: Sequence[str | int]) -> list[str]:
    """The fields of the record in which ``location`` lies."""
    owner = tuple(location[:-1])
    if len(owner) == 3 and owner[0] == "events":
        return [name for name in _EVENTS[str(owner[2])].model_fields if name != "event"]
    return list(_RECORDS[owner].model_fields)


def _missing(mistake: Details) -> str:
    *_, name = mistake["loc"]
    return f"is missing; add {one_line(str(name), MOST_CHARACTERS)}"


def _tag(mistake: Details) -> str:
    tag = str(mistake["ctx"]["tag"])
    near = meant(tag, _EVENTS)
    mend = f"did you mean {near}?" if near else f"choose from {', '.join(_EVENTS)}"
    return f"there is no event '{one_line(tag, MOST_CHARACTERS)}'; {mend}"


def _choice(mistake: Details) -> str:
    return f"cannot be {_shown(mistake['input'])}; choose from {mistake['ctx']['expected']}"


def _must_be(what: str) -> Callable[[Details], str]:
    return lambda mistake: f"must be {what}, not {_shown(mistake['input'])}"


def _limit(key: str, words: str) -> Callable[[Details], str]:
    return lambda mistake: f"must be {words} {mistake['ctx'][key]}, not {_shown(mistake['input'])}"


_SENTENCES: dict[str, Callable[[Details], str]] = {
    "missing": _missing,
    "union_tag_invalid": _tag,
    "union_tag_not_found": lambda _: f"has no 'event'; add one of {', '.join(_EVENTS)}",
    "enum": _choice,
    "literal_error": _choice,
    "int_type": _must_be("a whole number"),
    "int_parsing_size": _must_be("a whole number of fewer digits"),
    "bool_type": _must_be("true or false"),
    "string_type": _must_be("a text in quotes"),
    "tuple_type": _must_be("a list in square brackets"),
    "model_type": _must_be("an object in braces"),
    "model_attributes_type": _must_be("an object in braces"),
    "dict_type": _must_be("an object in braces"),
    "greater_than_equal": _limit("ge", "at least"),
    "greater_than": _limit("gt", "more than"),
    "less_than_equal": _limit("le", "at most"),
    "less_than": _limit("lt", "less than"),
    "multiple_of": _limit("multiple_of", "a multiple of"),
    "too_short": lambda mistake: f"must name at least {mistake['ctx']['min_length']}; it is empty",
}


def _shown(value: object) -> str:
    """A value of the file as the file writes it, cut short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value) if value.bit_length() < 80 else f"a number of {value.bit_length():,} bits"
    if isinstance(value, float):
        return str(value) if math.isfinite(value) else {True: "NaN", False: "infinity"}[math.isnan(value)]
    if isinstance(value, str):
        return f'"{one_line(value, MOST_CHARACTERS)}"'
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
