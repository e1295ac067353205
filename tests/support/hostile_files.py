"""Files that claim to be saved cases and are not, or ask for too much: some hundreds, the same in every run."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.project import PROJECT

SOURCES = 30  # saved cases that are spoilt
SIZES = {"page_size": 1, "max_context_len": 20, "index_topk": 4, "num_steps": 1, "num_draft_tokens": 1, "pool_size": 2}
CAPTURE = {"event": "capture", "mode": "DECODE", "buckets": [1]}
JOIN, REPLAY = {"event": "join", "seq_len": 3}, {"event": "replay", "mode": "DECODE"}
LONG = 1 << 20
WIDE = {"max_context_len": LONG, "pool_size": 8}
ESCAPES = "\x1b[2J\u202e\u2028\r\n\x07\x9b31m"
Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Hostile:
    """One file. content: its bytes, or what makes it at a path. says: parts of the refusal. loads: it is no mistake."""

    name: str
    content: bytes | Callable[[Path], None]
    says: tuple[str, ...] = ()
    loads: bool | None = None  # None: either

    def write(self, folder: Path, number: int) -> Path:
        path = folder / f"{number:04}.json"
        if isinstance(self.content, bytes):
            path.write_bytes(self.content)
        else:
            self.content(path)
        return path


def text_of(document: object) -> bytes:
    return json.dumps(document).encode()


def case(events: list[Any] | None = None, setup: dict[str, Any] | None = None, **more: Any) -> bytes:
    document = {
        "schema_version": 1,
        "setup": {**SIZES, **(setup or {})},
        "events": [REPLAY] if events is None else events,
    }
    return text_of(document | more)


def sources() -> list[tuple[str, Any]]:
    files = sorted([*PROJECT.glob("tests/cases/*.json"), *PROJECT.glob("tests/bugs/*.json")])
    return [(file.stem, json.loads(file.read_text())) for file in random.Random(0).sample(files, SOURCES)]


def places(document: Any, before: Place = ()) -> Iterator[Place]:
    """The places of all names and elements of a document."""
    pairs = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in pairs:
        yield (*before, key)
        yield from places(value, (*before, key))


def written(place: Place) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


def owner_of(document: Any, place: Place) -> Any:
    for part in place[:-1]:
        document = document[part]
    return document


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


WRONG = {
    "null": None, "true": True, "half": 1.5, "whole float": 4.0, "text": "4", "no text": "", "list": [], "object": {},
    "deep": nested(150), "NaN": float("nan"), "infinity": float("inf"), "escapes": ESCAPES,
}  # fmt: skip
NUMBERS = {"-1": -1, "-10**40": -(10**40), "10**9": 10**9, "2**63": 2**63, "10**40": 10**40, "10**4000": 10**4000}


def spoilt_values(name: str, document: Any, chance: random.Random) -> Iterator[Hostile]:
    """A value of the wrong type or size, somewhere."""
    everywhere = [place for place in places(document) if place != ("note",)]
    for kind, value in {**WRONG, **NUMBERS}.items():
        place = chance.choice(everywhere)
        if kind in NUMBERS:
            numbers = [p for p in everywhere if type(owner_of(document, p)[p[-1]]) is int]
            place = chance.choice(numbers)
        changed = copy.deepcopy(document)
        owner_of(changed, place)[place[-1]] = value
        # An event's kind is part of the event; a size may be refused for what it means elsewhere.
        says = written(place[:-1] if place[-1] == "event" else place) if kind in WRONG else ""
        old = owner_of(document, place)[place[-1]]
        harmless = type(old) is type(value) or place[-1] in ("layer", "prefix_of", "bucket")
        yield Hostile(f"{name}: {kind} for {written(place)}", text_of(changed), () if harmless else (says,))


def spoilt_names(name: str, document: Any, chance: random.Random) -> Iterator[Hostile]:
    """Fields that are missing, unknown, misspelt or given twice."""
    named = [place for place in places(document) if isinstance(place[-1], str)]
    required = [p for p in named if p[-1] in (*SIZES, "seq_len", "buckets", "mode", "accept_lengths", "schema_version")]

    def changed(place: Place, change: Callable[[dict[str, Any], str], None]) -> bytes:
        other = copy.deepcopy(document)
        change(owner_of(other, place), str(place[-1]))
        return text_of(other)

    place = chance.choice(required)
    yield Hostile(f"{name}: no {written(place)}", changed(place, lambda o, k: o.pop(k)), (written(place), "add"), False)
    place = chance.choice([p for p in named if p[-1] not in ("event", "schema_version")])
    misspelt = written((*place[:-1], f"{place[-1]}x"))
    yield Hostile(
        f"{name}: {misspelt}",
        changed(place, lambda o, k: o.update({f"{k}x": o.pop(k)})),
        (f"{misspelt}: there is no such field", f"did you mean {place[-1]}?"),
        False,
    )
    place = chance.choice(named)
    for unknown in ("zzz", ESCAPES, "x" * 5000, ""):
        says = ("there is no such field", "zzz") if unknown == "zzz" else ("there is no such field",)
        yield Hostile(
            f"{name}: unknown {unknown[:5]!r}", changed(place, lambda o, k, u=unknown: o.update({u: 1})), says, False
        )  # type: ignore[misc]
    twice = text_of(document).replace(b'"setup": {', b'"setup": {"page_size": 1, ')
    yield Hostile(f"{name}: page_size twice", twice, ("'page_size' is given twice",), False)


def spoilt_text(name: str, document: Any, chance: random.Random) -> Iterator[Hostile]:
    """Bytes that are not JSON, or not in UTF-8."""
    text = text_of(document)
    cut = chance.randrange(1, len(text) - 1)
    yield Hostile(f"{name}: cut at {cut}", text[:cut], ("is not JSON", "cut short"), False)
    for byte in (0x00, 0xFF, 0x7B, 0x22):
        at = chance.randrange(len(text))
        yield Hostile(f"{name}: byte {byte:#x} at {at}", text[:at] + bytes([byte]) + text[at:])
    yield Hostile(f"{name}: trailing comma", text[:-1] + b",}", ("is not JSON",), False)
    yield Hostile(f"{name}: in UTF-16", text.decode().encode("utf-16"), ("save it as UTF-8",), False)
    yield Hostile(f"{name}: byte order mark", b"\xef\xbb\xbf" + text, ("byte order mark",), False)


def by_hand() -> Iterator[Hostile]:
    """Files that ask for too much, and such as no editor makes."""
    for name, content in {
        "nothing": b"", "space": b" \n", "NUL": bytes(100), "Python": b"__import__('os').abort()", "YAML": b"a: 1",
        "comments": b"// a case\n{}", "100,000 brackets": b"[" * 100_000, "balanced": b"[" * 10**5 + b"]" * 10**5,
        "100,000 braces": b'{"setup":' * 100_000, "lone surrogate": b'{"note": "\\ud800"}',
        "number of 5,000 digits": b'{"seed": ' + b"9" * 5000 + b"}", "pickle": b"\x80\x04\x95\x00K\x01.",
    }.items():  # fmt: skip
        yield Hostile(name, content, (), False)
    for name, text in {"null": "null", "number": "7", "text": '"case"', "list": "[]", "true": "true"}.items():
        yield Hostile(f"only {name}", text.encode(), ("the file: must be an object in braces",), False)
    yield Hostile("empty object", b"{}", ("schema_version is missing",), False)
    for version, says in {
        "7": "schema_version 7 is newer than this version of nsa-oracle reads (1): update it",
        "0": "schema_version 0 does not exist; this version of nsa-oracle reads 1",
        "true": "schema_version must be the number 1, not true",
        "1.0": "schema_version must be the number 1, not 1.0",
        '"1"': 'schema_version must be the number 1, not "1"',
        "null": "schema_version must be the number 1, not null",
        "1e999": "schema_version must be the number 1, not infinity",
        "NaN": "schema_version must be the number 1, not NaN",
        "9" * 99: "is newer than this version of nsa-oracle reads (1)",
    }.items():
        content = b'{"schema_version": ' + version.encode() + b', "colour": "red", "setup": {}}'
        yield Hostile(f"version {version[:9]}", content, (says,), False)
    raw = case([JOIN], seed=123456789)
    for number in ("1e999", "-1e999", "1e400", "NaN", "-Infinity", "0x10", "1_000", "+1", "01", ".5", "1e2"):
        yield Hostile(f"seed {number}", raw.replace(b"123456789", number.encode()), (), False)
    yield Hostile(
        "340,000 events that are none", b'{"schema_version":1,"events":[' + b"[]," * 340_000 + b"[]]}", (), False
    )
    yield Hostile(
        "100,000 unknown fields", text_of({f"{i:x}": 1 for i in range(80_000)} | {"schema_version": 1}), (), False
    )
    yield Hostile("300,000 names that are numbers", case(optimizations=[1] * 300_000), ("optimizations[0]",), False)
    yield Hostile(
        "300,000 buckets of 0", case([{**CAPTURE, "buckets": [0] * 300_000}]), ("events[0].buckets[0]",), False
    )
    yield Hostile("4,097 events", case([REPLAY] * 4097), ("events: ", "at most 4,096"), False)
    yield Hostile("1,025 graphs", case([{**CAPTURE, "buckets": [1] * 1025}]), ("events: ", "at most 1,024"), False)
    yield Hostile("pool", case(setup={**WIDE, "pool_size": 9}), ("setup.max_context_len: ", "at most 8,388,608"), False)
    yield Hostile("all sizes", case(setup={**WIDE, "pool_size": 4096}), ("setup.max_context_len: ",), False)
    yield Hostile("tables", case([{**CAPTURE, "buckets": [64]}], WIDE), ("setup.max_context_len: ",), False)
    yield Hostile("work", case([CAPTURE, *[{**REPLAY, "times": 16}] * 600], WIDE), ("events: ", "cells to fill"), False)
    crowd = {"event": "join", "seq_len": LONG - 10, "count": 4096}
    for kind in ({"event": "accept", "accept_lengths": [1]}, {"event": "remap", "request": 0, "prefix_of": 1}, crowd):
        says = ("events: ", "on the host")
        yield Hostile(f"4,000 times {kind['event']}", case([crowd, *[kind] * 4000], WIDE), says, False)
    yield Hostile(
        "caches",
        case([JOIN], {**WIDE, "layer": {"regime": "random", "kv_lora_rank": 512}}),
        ("setup.layer: its caches would have",),
        False,
    )
    yield Hostile("layer of odd pages", case([JOIN], {"page_size": 6, "layer": {}}), ("setup.page_size: ",), False)
    yield Hostile("no room", case([], {"max_context_len": 8, "num_steps": 8}), ("setup.max_context_len: ",), False)
    yield Hostile("too long", case([JOIN, {**JOIN, "seq_len": 10**30}]), ("events[1].seq_len: ",), False)
    # These are odd, but mean something.
    remaps = [{"event": "remap", "request": i, "prefix_of": i + 1, "prefix_pages": LONG} for i in range(200)]
    yield Hostile("200 remaps of whole contexts", case([crowd, *remaps], WIDE), (), True)
    yield Hostile("crowd beyond the pool", case([{**JOIN, "count": 4096}] * 4000), (), True)
    yield Hostile("largest pool", case([crowd, {"event": "accept", "accept_lengths": [8]}], WIDE), (), True)
    yield Hostile("largest pool, shuffled", case([crowd], {**WIDE, "page_layout": "shuffled"}), (), True)
    yield Hostile("escapes in the note", case([JOIN], note=ESCAPES), (), True)
    yield Hostile("long note", case([JOIN], note="x" * 500_000), (), True)
    yield Hostile("escapes in a switch", case([JOIN], optimizations=[ESCAPES] * 99), (), True)
    yield Hostile("10,000 switches", case([REPLAY], optimizations=["x" * 50] * 10_000), (), True)
    yield Hostile("huge request", case([JOIN, {"event": "finish", "request": 10**4000, "count": 4096}]), (), True)


def special() -> Iterator[Hostile]:
    """What is at the path is no ordinary file."""
    yield Hostile("directory", lambda path: path.mkdir(), ("cannot be read: Is a directory",), False)
    yield Hostile("pipe", lambda path: os.mkfifo(path), ("is not a regular file",), False)
    yield Hostile("device", lambda path: path.symlink_to("/dev/zero"), ("is not a regular file",), False)
    yield Hostile("link to nothing", lambda path: path.symlink_to("absent"), ("No such file",), False)
    yield Hostile("link to itself", lambda path: path.symlink_to(path), ("cannot be read: Too many",), False)
    yield Hostile("absent", lambda path: None, ("No such file",), False)

    def sparse(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(1 << 40)

    yield Hostile("sparse", sparse, ("has more than 1,048,576 bytes",), False)
    yield Hostile("1 MiB and a byte", case() + b" " * (1 << 20), ("has more than 1,048,576 bytes",), False)


def hostile_files() -> list[Hostile]:
    files = [*special(), *by_hand()]
    for number, (name, document) in enumerate(sources()):
        chance = random.Random(number)
        for spoil in (spoilt_values, spoilt_names, spoilt_text):
            files += spoil(name, document, chance)
    return files
