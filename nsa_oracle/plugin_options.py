"""The ``--oracle-*`` options of pytest: their types, and the settings of the same names in its configuration file.

Imports nothing of the oracle until an option needs it, as the plugin does.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest

from nsa_oracle.starting import (
    FILES_OF_PYTEST,
    FILES_OF_THE_HARNESS,
    LIMITS,
    LONGEST_LIMIT,
    SHORTEST_LIMIT,
    check_open_files,
    ended_in_one_line,
    open_files_told,
)

MOST_SHARDS = 1000


def add_options(parser: pytest.Parser) -> None:
    """Add the options of the command line, and the settings of the configuration file."""
    group = parser.getgroup("oracle", "correctness oracle for multi-step attention backends")

    def option(name: str, text: str, metavar: str, default: str = "", **how: Any) -> None:
        """An option of the command line, and a setting of the same name in the configuration file."""
        ending = f" (default: {default})" if default else ""
        group.addoption(f"--oracle-{name}", help=text + ending, metavar=metavar, **how)
        parser.addini(f"oracle_{name.replace('-', '_')}", f"{text}, as --oracle-{name}{ending}", default=None)

    option(
        "profile",
        "how many cases to draw: smoke, dev and pr draw the same ones in every run, nightly new ones",
        "NAME",
        "pr",
        type=_profile,
    )
    option(
        "device",
        "where the backend runs; cuda: real CUDA graphs; cpu: kernels compiled for the CPU, a simulated graph; auto: "
        "cuda if it is there",
        "auto|cpu|cuda",
        "auto",
        type=_device,
    )
    option(
        "backend",
        "backend to judge: a callable of (config, req_to_token)",
        "MODULE:ATTRIBUTE",
        "optimized/",
        type=_name,
    )
    option(
        "layer",
        "attention layer to judge: a callable of (config, attention) that returns a layer or single stages of one",
        "MODULE:ATTRIBUTE",
        "optimized/",
        type=_name,
    )
    option("save", "folder to save failing cases in", "DIR", "failures", type=_name)
    option("cases", "folder of saved cases that are judged first", "DIR", "tests/cases", type=_name)
    option(
        "case-timeout",
        "a case that is still running in judged code after this time has failed; 0: no limit",
        "SECONDS",
        "600",
        type=_time_limit,
    )
    group.addoption(
        "--oracle-replay",
        metavar="FILE",
        action="append",
        default=[],
        help="judge this saved case and run nothing else; may be given several times",
    )
    group.addoption(
        "--oracle-budget",
        metavar="SECONDS",
        type=_seconds,
        help="judge no new case after this time; a failure found by then is still shrunk and reported (default: no "
        "limit)",
    )
    group.addoption(
        "--oracle-seed",
        metavar="N",
        type=_seed,
        help="draw the cases of this seed, as another run reported it (default: 0; nightly: a new one)",
    )
    group.addoption(
        "--oracle-shard",
        metavar="I/N",
        type=_shard,
        help="judge the I-th of N disjoint parts of each test, on one of N machines (default: all of it)",
    )
    group.addoption(
        "--oracle-json", metavar="FILE", type=_name, help="write all that the run found to this file, for machines"
    )
    group.addoption("--oracle-html", metavar="FILE", type=_name, help="write it to this file as a page to look at")
    parser.addini(
        "oracle_in_process",
        "judge in pytest's own process and not in a child, for which its kernels are interpreted if there is no GPU",
        type="bool",
        default=False,
    )


def _name(text: str) -> str:
    """The type of options that name something: an unset variable of a CI job must not stand for the default."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty; give one, or leave the option out")
    return text


def _check_files_before_imports() -> None:
    """What an option imports opens files, too, and pytest then fails before it can say that there are too few."""
    if "nsa_oracle.harness" not in sys.modules:
        check_open_files(FILES_OF_PYTEST + FILES_OF_THE_HARNESS, argparse.ArgumentTypeError)


def _profile(name: str) -> str:
    """The type of --oracle-profile."""
    _check_files_before_imports()
    with open_files_told(argparse.ArgumentTypeError), ended_in_one_line(quiet="PYTEST_XDIST_WORKER" in os.environ):
        from nsa_oracle.harness.search.drawing import PROFILES

    if name not in PROFILES:
        raise argparse.ArgumentTypeError(f"invalid choice: '{name}' (choose from {', '.join(PROFILES)})")
    return name


def _device(name: str) -> str:
    """The type of --oracle-device."""
    if name not in ("auto", "cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"invalid choice: '{name}' (choose from auto, cpu, cuda)")
    return name


def _seconds(text: str) -> float:
    """The type of options in seconds."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds, 0 or more")
    return seconds


def _time_limit(text: str) -> float:
    """The type of --oracle-case-timeout."""
    seconds = _seconds(text)
    if seconds and not SHORTEST_LIMIT <= seconds <= LONGEST_LIMIT:
        raise argparse.ArgumentTypeError(f"'{text}' is not in the range {LIMITS}")
    return seconds


def _seed(text: str) -> int:
    """The type of --oracle-seed: a whole number below 2**48."""
    if not text.isdecimal() or int(text) >= 1 << 48:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 to {(1 << 48) - 1}")
    return int(text)


def _shard(text: str) -> Any:
    """The type of --oracle-shard, such as 3/8."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) <= MOST_SHARDS):
        raise argparse.ArgumentTypeError(f"'{text}' is not a part of at most {MOST_SHARDS}, such as 3/8")
    _check_files_before_imports()
    with open_files_told(argparse.ArgumentTypeError), ended_in_one_line(quiet="PYTEST_XDIST_WORKER" in os.environ):
        from nsa_oracle.harness.plugin.parts import Shard

    return Shard(int(number), int(count))


SETTINGS: dict[str, Callable[[str], Any]] = {
    "profile": _profile,
    "device": _device,
    "backend": _name,
    "layer": _name,
    "save": _name,
    "cases": _name,
    "case_timeout": _time_limit,
}
"""The types of the settings of the configuration file, by name without ``oracle_``."""


def setting(config: pytest.Config, name: str) -> Any:
    """The option ``name``, or else the setting in the configuration file, or else None.

    Raises UsageError for a setting that the option would refuse.
    """
    given, text = config.getoption(f"oracle_{name}"), config.getini(f"oracle_{name}")
    if given is not None or text is None:
        return given
    try:
        return SETTINGS[name](text)
    except argparse.ArgumentTypeError as error:
        raise pytest.UsageError(f"oracle_{name}: {error}") from None


def has_options(options: argparse.Namespace) -> bool:
    """Whether an option of the oracle was given."""
    return any(value not in (None, []) for name, value in vars(options).items() if name.startswith("oracle_"))
