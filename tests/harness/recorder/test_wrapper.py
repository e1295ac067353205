"""A recorded backend is the backend: nothing changes, nothing raises, and what was given is in the file."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_oracle.harness import record
from nsa_oracle.harness.engine.drivers import prepares_in_graph
from nsa_oracle.harness.judge import OracleFailure, judge
from nsa_oracle.harness.protocol import BackendFactory
from nsa_oracle.harness.recorder.wrapper import flush
from nsa_oracle.harness.scenarios.recorded import read_record
from nsa_oracle.harness.scenarios.scenario import Accept, Capture, Eager, Finish, Join, Replay, Scenario
from nsa_oracle.harness.scenarios.setup import Drive, Mirror
from nsa_oracle.reference.multi_step import MultiStepBackend as Reference
from nsa_oracle.reference.types import BackendConfig
from tests.support.backends import declared, replays
from tests.support.command_line import environment_of_children
from tests.support.metadata_cases import DECODE, DRAFT_EXTEND, EXTEND, VERIFY, case, factory_of
from tests.support.project import PROJECT
from tests.support.recordings import Spy, batch, lines, recorded_run

LOGGER = "nsa_oracle.harness.recorder"
POOL = torch.arange(48, dtype=torch.int32).view(3, 16)
CONFIG = BackendConfig(4, 16, 8, 1, 2)
ALL_ACTS = case(
    *(Capture(mode=mode, buckets=(2,)) for mode in (DECODE, VERIFY, DRAFT_EXTEND)),
    Join(seq_len=3),
    Join(seq_len=6),
    Accept(accept_lengths=(0, 2)),
    *(Replay(mode=mode, mirror=Mirror.STALE) for mode in (DECODE, VERIFY, DRAFT_EXTEND)),
    Eager(mode=EXTEND, extend_lens=(2, 3)),
    Finish(request=0),
    Replay(mode=DECODE, mirror=Mirror.ABSENT),
    num_steps=2,
)


def recording(build: Any, file: Path) -> BackendFactory:
    inner = factory_of(build)
    return lambda config, pool, names: record(inner(config, pool, names), file, config=config, req_to_token=pool)


@pytest.mark.parametrize("drive", Drive)
@pytest.mark.parametrize("build", [Reference, declared.Todays, declared.TodaysInGraph])
def test_verdicts_are_those_of_the_backend(build: Any, drive: Drive, tmp_path: Path, device: torch.device) -> None:
    scenario = Scenario(setup=ALL_ACTS.setup.model_copy(update={"drive": drive}), events=ALL_ACTS.events)
    assert judge(scenario, recording(build, tmp_path / "r.jsonl"), device).replays == 8
    with pytest.raises(OracleFailure, match="real_page_table"):
        judge(scenario, recording(replays.KeepsRealPageTable, tmp_path / "s.jsonl"), device)


def test_every_argument_attribute_and_exception_passes_through(tmp_path: Path) -> None:
    spy = Spy()
    wrapped: Any = record(spy, tmp_path / "r.jsonl")
    given = batch()
    assert wrapped.init_forward_metadata(given) == "returned"
    assert spy.calls[0][0] is given
    wrapped.init_forward_metadata_replay_cuda_graph(given, bs=2)
    assert spy.calls[1] == ((given,), {"bs": 2})
    assert (wrapped.known, isinstance(wrapped, Spy), wrapped.__class__) == (7, True, Spy)
    wrapped.changed = wrapped.new = "yes"
    assert (spy.changed, vars(spy)["new"]) == ("yes", "yes")
    del wrapped.new
    assert not hasattr(spy, "new")
    assert not hasattr(wrapped, "init_forward_metadata_in_graph")
    assert repr(wrapped) == repr(spy)
    with pytest.raises(LookupError, match="own"):
        wrapped.init_forward_metadata("raise")


class Copies(Spy):
    """A backend with a copy and a pickle of its own, which would be of the backend and not recorded."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Copies:
        return self

    __copy__ = __reduce__ = __deepcopy__  # type: ignore[assignment]


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickle.dumps, lambda wrapped: copy.deepcopy([wrapped])])
@pytest.mark.parametrize("backend", [Spy(), Copies()], ids=["plain", "copies itself"])
def test_a_copy_or_a_pickle_is_refused_in_one_line(backend: Any, again: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError) as refused:
        again(record(backend, tmp_path / "r.jsonl"))
    assert str(refused.value) == (
        "a recorded backend has no copy and no pickle: copy or pickle the backend, and record what comes of it"
    )


def test_a_wrapper_of_nothing_has_no_attributes(tmp_path: Path) -> None:
    """As those that make an object without its __init__ find it."""
    kind = type(record(Spy(), tmp_path / "r.jsonl"))
    bare = kind.__new__(kind)
    for name in ("known", "attn_backends", "_nsa_oracle_backend"):
        with pytest.raises(AttributeError):
            getattr(bare, name)


def test_protocols_and_steps_are_those_of_the_backend(tmp_path: Path) -> None:
    reference = Reference(CONFIG, POOL)
    wrapped = record(reference, tmp_path / "r.jsonl")
    assert prepares_in_graph(wrapped) == prepares_in_graph(reference)
    assert len(wrapped.attn_backends) == len(reference.attn_backends)
    assert wrapped.attn_backends[0] is wrapped.attn_backends[0]
    wrapped.init_forward_metadata(batch(mode=DECODE))
    assert wrapped.attn_backends[0].forward_metadata is reference.attn_backends[0].forward_metadata


@pytest.mark.parametrize("drive", Drive)
@pytest.mark.parametrize("build", [Reference, declared.Todays, declared.TodaysInGraph])
def test_what_was_given_is_in_the_file(build: Any, drive: Drive, tmp_path: Path, device: torch.device) -> None:
    if device.type == "cuda" and build is declared.TodaysInGraph:
        pytest.skip("launches on CPU tensors need the interpreter")
    scenario = Scenario(setup=ALL_ACTS.setup.model_copy(update={"drive": drive}), events=ALL_ACTS.events)
    head, *called = lines(recorded_run(scenario, factory_of(build), tmp_path / "r.jsonl", "whole"))
    assert head["config"]["page_size"] == 4
    assert head["pool"] == [3, 16]
    assert {line.get("step") for line in called} == {0 if drive is Drive.SINGLE_STEP else None}
    acts = [(line["act"], line["mode"], line["bs"]) for line in called if line.get("act", "in_graph") != "in_graph"]
    modes = ("DECODE", "TARGET_VERIFY", "DRAFT_EXTEND")
    assert acts == [
        *(("capture", mode, 2) for mode in modes),
        *(("replay", mode, 2) for mode in modes),
        ("eager", "EXTEND", 2),
        ("replay", "DECODE", 2),
    ]
    *_, draft_extend, eager, last = called
    assert (draft_extend["seq_lens"], draft_extend["pool_rows"]) == ([3, 8], [0, 1])
    assert (draft_extend["accept_lengths"], draft_extend["seq_lens_cpu"][1]) == ([0, 2], 6)
    assert draft_extend["table"][1][0] == [12, 10]  # 8 tokens and room for 2 drafts, from page 3 on
    assert eager["extend_lens"] == [2, 3]
    assert (last["seq_lens"], last.get("seq_lens_cpu")) == ([8, 1], None)
    assert all("seq_lens" not in line for line in called if line.get("act") == "in_graph")


def test_separate_arguments_of_a_single_step(tmp_path: Path) -> None:
    wrapped: Any = record(Spy(), tmp_path / "r.jsonl")
    numbers = torch.tensor([3, 4])
    wrapped.init_forward_metadata_replay_cuda_graph(
        2, numbers, numbers, 7, None, forward_mode=DECODE, spec_info=None, seq_lens_cpu=numbers
    )
    numbers += 1  # the engine's own, which it changes at once
    assert flush(wrapped)
    said = lines(tmp_path / "r.jsonl")[1]
    assert (said["mode"], said["bs"], said["seq_lens"], said["seq_lens_cpu"]) == ("DECODE", 2, [3, 4], [3, 4])


def test_digest_tells_live_cells_alone(tmp_path: Path) -> None:
    pool = POOL.clone()
    wrapped = record(Spy(), tmp_path / "r.jsonl", req_to_token=pool, tables="digest")
    for cell, value in ((0, 0), (9, 1), (1, 1)):  # as it is; beyond the 2 tokens of row 1; within
        pool[1, cell] += value
        wrapped.init_forward_metadata(batch())
    assert flush(wrapped)
    first, dead, live = (line["digest"] for line in lines(tmp_path / "r.jsonl")[1:])
    assert first == dead
    assert (first[0], first[1] != live[1]) == (live[0], True)


@pytest.mark.parametrize("given", [None, 3, object()])
def test_a_call_of_no_protocol_ends_the_recording_with_one_warning(
    given: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spy = Spy()
    wrapped = record(spy, tmp_path / "r.jsonl")
    for _ in range(3):
        wrapped.init_forward_metadata(given)
    assert len(spy.calls) == 3
    (warning,) = caplog.records
    assert warning.name == LOGGER
    assert "the recording has ended: ValueError" in warning.getMessage()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
def test_a_full_disk_ends_the_recording_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    spy = Spy()
    wrapped = record(spy, "/dev/full")
    wrapped.init_forward_metadata(batch())
    wrapped.init_forward_metadata(batch())
    assert len(spy.calls) == 2
    (warning,) = caplog.records
    assert "No space left" in warning.getMessage()
    assert not flush(wrapped)


def test_a_file_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrapped = record(Spy(), tmp_path / "absent" / "r.jsonl")
    assert wrapped.init_forward_metadata(batch()) == "returned"
    assert len(caplog.records) == 1


def test_pipes_sockets_and_folders_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for name in ("pipe", "folder", "socket"):
            wrapped = record(Spy(), name)
            assert wrapped.init_forward_metadata(batch()) == "returned"
    assert [warning.getMessage() for warning in caplog.records] == [
        f"{name}: the recording has ended: it cannot be written: it is a {name}; name a file in a folder that can"
        for name in ("pipe", "folder", "socket")
    ]


def test_a_device_is_written_to_and_never_moved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    null = tmp_path / "null"
    null.symlink_to("/dev/null")
    wrapped = record(Spy(), null, max_bytes=4096)
    for _ in range(100):
        wrapped.init_forward_metadata(batch())
    assert flush(wrapped)
    assert list(tmp_path.iterdir()) == [null]
    assert caplog.records == []


def test_a_second_recorder_of_a_file_records_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "server.jsonl"
    first, second = record(Spy(), file, max_bytes=8192), record(Spy(), file)
    assert second.init_forward_metadata(batch()) == "returned"
    (warning,) = caplog.records
    assert warning.getMessage() == (
        f"{file}: the recording has ended: another recorder writes to it; give each one a file of its own, such as "
        f"server-{os.getpid()}.jsonl"
    )
    for _ in range(100):  # more than half of max_bytes
        first.init_forward_metadata(batch())
    assert flush(first)
    assert file.with_name("server.jsonl.1").exists()
    third = record(Spy(), file)  # the file that took the place of the one that was moved
    assert not flush(third)
    assert len(caplog.records) == 2
    assert {line["session"] for line in lines(file) if "session" in line} == {lines(file)[0]["session"]}


def test_a_file_is_free_again_when_its_backend_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "server.jsonl"
    for _ in range(3):
        wrapped = record(Spy(), file, config=CONFIG)
        wrapped.init_forward_metadata(batch())
        del wrapped  # its last call may not be in the file yet
        gc.collect()
    wrapped = record(Spy(), file, config=CONFIG)
    assert flush(wrapped)
    assert caplog.records == []
    assert sum("session" in line for line in lines(file)) == 4
    assert sum("call" in line for line in lines(file)) == 3


def test_a_recording_that_has_ended_lets_its_file_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ended = record(Spy(), tmp_path / "r.jsonl")
    ended.init_forward_metadata(None)
    assert flush(record(Spy(), tmp_path / "r.jsonl"))
    assert len(caplog.records) == 1


def test_tables_without_a_pool_are_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record(Spy(), tmp_path / "r.jsonl", tables="whole")
    assert "give it to record()" in caplog.text


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'none', 'digest' or 'whole'"):
        record(Spy(), tmp_path / "r.jsonl", tables="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 4,096"):
        record(Spy(), tmp_path / "r.jsonl", max_bytes=10)


def test_a_bounded_record_keeps_captures_and_the_last_calls(tmp_path: Path) -> None:
    file, spy = tmp_path / "r.jsonl", Reference(CONFIG, POOL)
    wrapped = record(spy, file, config=CONFIG, max_bytes=8192)
    wrapped.init_cuda_graph_state(2, 4)
    wrapped.init_forward_metadata_capture_cuda_graph(batch(mode=DECODE))
    for _ in range(200):
        wrapped.init_forward_metadata(batch(mode=DECODE))
    assert flush(wrapped)
    older = file.with_name("r.jsonl.1")
    assert file.stat().st_size + older.stat().st_size <= 8192 + 600  # and the line that was one too many
    found = read_record(file).calls
    numbers = [call.n for call in found]
    assert numbers[:2] == [0, 1]
    assert found[1].act == "capture"
    assert numbers[2:] == list(range(numbers[2], 202))


def test_a_restarted_server_begins_a_new_session(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text('{"nsa_oracle_record":1,"session":"killed"}\n{"n":0,"call":"init_forw')
    wrapped = record(Spy(), file, config=CONFIG)
    wrapped.init_forward_metadata(batch(1))
    assert flush(wrapped)
    assert file.read_text().splitlines()[1] == '{"n":0,"call":"init_forw'


def test_a_backend_that_is_gone_is_written_to_the_end(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    wrapped: Any = record(Spy(), file)
    writer = object.__getattribute__(wrapped, "_nsa_oracle_recording").writer
    for _ in range(100):
        wrapped.init_forward_metadata(batch())
    del wrapped
    gc.collect()
    assert writer.closing
    assert writer.flush(10)
    assert len(lines(file)) == 101


KILLED = """
import os, signal, sys
import torch
from nsa_oracle.harness import record
from nsa_oracle.harness.recorder.wrapper import flush
from tests.support.recordings import Spy, batch
wrapped = record(Spy(), sys.argv[1])
for _ in range(20):
    wrapped.init_forward_metadata(batch())
assert flush(wrapped)
if pid := os.fork():
    os.waitpid(pid, 0)
else:
    wrapped.init_forward_metadata(batch())  # a fork has no thread that writes
    os._exit(0)
os.kill(os.getpid(), signal.SIGKILL)
"""


HELD = """
import os, signal, sys, time
from nsa_oracle.harness import record
from tests.support.recordings import Spy
wrapped = record(Spy(), sys.argv[1])
if pid := os.fork():
    print(pid, flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)  # the fork outlives the server
"""


def test_a_file_is_that_of_one_process_until_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "r.jsonl"
    command = [sys.executable, "-c", HELD, str(file)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=PROJECT, env=environment_of_children(), text=True, **pipes) as server:
        fork = int(server.stdout.readline())
        try:
            assert not flush(record(Spy(), file))
            assert "another recorder writes to it" in caplog.text
            server.stdin.write("end\n")
            server.stdin.close()
            assert server.wait() == -9
            assert flush(record(Spy(), file))
        finally:
            os.kill(fork, signal.SIGKILL)
    assert len(caplog.records) == 1


def test_what_is_written_survives_the_end_of_the_process(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    command = [sys.executable, "-c", KILLED, str(file)]
    done = subprocess.run(command, cwd=PROJECT, env=environment_of_children(), capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert [json.loads(line)["n"] for line in file.read_text().splitlines()[1:]] == list(range(20))
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]
