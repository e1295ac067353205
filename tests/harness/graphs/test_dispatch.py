"""Judging imports torch's compiler only if judged code does, and then the compiler does not look into the harness."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
JUDGING = """
import json, sys
import torch
from pathlib import Path
from nsa_oracle.harness.judge import judge_subject
from nsa_oracle.harness.processes import prepare_process
from nsa_oracle.harness.scenarios.files import load
from nsa_oracle.harness.search.spec import SubjectSpec

device = torch.device("cpu")
prepare_process("cpu")
subject = SubjectSpec(None, None, None).build(device)
for name in ("layer-one-key", "rows-longer-than-a-copy-chunk"):
    judge_subject(subject, load(Path("tests/cases", name + ".json")), device)
print(json.dumps(["torch" in sys.modules, "torch._dynamo" in sys.modules]))
"""
COMPILING = """
import json, torch
from nsa_oracle.harness.graphs.dispatch import DispatchMode

class Mode(DispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

def run(function):
    mode = Mode()
    mode.seen = []
    with mode:
        function(torch.ones(2))
    return mode.seen

def plain(x):
    return x.sin()

seen = [run(plain)]  # before the compiler is imported
compiled = torch.compile(plain, backend="eager")
from torch._dynamo.utils import counters
seen += [run(compiled), run(compiled)]
print(json.dumps([seen, counters["frames"]["total"]]))
"""


def said_by(program: str) -> list[object]:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    answer: list[object] = json.loads(done.stdout)
    return answer


def test_judging_does_not_import_the_compiler_of_torch() -> None:
    assert said_by(JUDGING) == [True, False]


def test_the_compiler_does_not_look_into_a_mode() -> None:
    """Under a mode torch compiles nothing; the frames that it counts would be those of the mode."""
    assert said_by(COMPILING) == [[["ones", "sin"]] * 3, 0]
