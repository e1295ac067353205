"""The finding of a capture that was refused."""

from __future__ import annotations

import traceback
from pathlib import Path

from nsa_oracle import reference
from nsa_oracle.harness.errors import CaptureError
from nsa_oracle.harness.findings import Finding, Kind
from nsa_oracle.harness.graphs.callers import innermost_user_frame, is_harness

_REFERENCE = Path(reference.__file__).parent
_STAGES = {_REFERENCE / f"{name}.py" for name in ("attention", "indexer", "kv_cache", "layer", "topk")}
_MEND = "the reference's layer is for eager calls: derive yours from nsa_oracle.optimized.layer.SparseAttention instead"


def capture_finding(error: CaptureError) -> Finding:
    """The finding of ``error``. It says what to do if a layer that is judged has called a stage of the reference."""
    reason = f"{error.reason} ({_MEND})" if _came_from_the_reference(error) else error.reason
    return Finding(Kind.CAPTURE, error.operation, reason, "a capturable operation", place=error.where)


def _came_from_the_reference(error: BaseException) -> bool:
    """Whether the innermost line of judged code that ``error``, or what it translates, passed is the reference's."""
    for raised in (error, error.__cause__, error.__context__):
        frame = innermost_user_frame(_without_the_harness(raised))
        if frame is not None and Path(frame.filename) in _STAGES:
            return True
    return False


def _without_the_harness(error: BaseException | None) -> traceback.StackSummary:
    frames = traceback.extract_tb(None if error is None else error.__traceback__)
    return traceback.StackSummary.from_list([frame for frame in frames if not is_harness(frame.filename)])
