"""Reads hostile files in a process of its own, with a limit on memory: ``python -m tests.support.hostile_child``.

Lines of stdin are JSON: a path, or the words of a command line. Lines of stdout are what came of each, in order.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

MOST_MORE = 1 << 30  # bytes of address space beyond what the imports take


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MOST_MORE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def read(path: str) -> dict[str, Any]:
    from nsa_oracle.harness.errors import ScenarioError
    from nsa_oracle.harness.scenarios.files import load
    from nsa_oracle.harness.scenarios.story import story

    try:
        return {"story": story(load(Path(path)))}
    except ScenarioError as error:
        return {"refusal": str(error)}
    except BaseException as error:  # what must not happen is told, and the next file is read
        return {"fault": f"{type(error).__name__}: {error}"}


def command(words: list[str]) -> dict[str, Any]:
    from typer.testing import CliRunner

    from nsa_oracle.harness.__main__ import app

    done = CliRunner().invoke(app, words)
    fault = "" if done.exception is None or isinstance(done.exception, SystemExit) else repr(done.exception)
    return {"code": done.exit_code, "out": done.stdout, "err": done.stderr, "fault": fault}


def main() -> None:
    import nsa_oracle.harness.__main__  # noqa: F401  # the limit begins behind the imports

    limit_memory()
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # with CUDA the libraries alone take more than 1 GiB
    for line in sys.stdin:
        given = json.loads(line)
        outcome = read(given) if isinstance(given, str) else command(given)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({**outcome, "peak": (peak - base) << 10}), flush=True)


if __name__ == "__main__":
    main()
