"""Whatever a backend or a layer returns is judged: never a traceback of the harness, and never a pass."""

from __future__ import annotations

import pytest
import torch

from nsa_oracle.harness.findings import Kind
from nsa_oracle.harness.judge import OracleFailure, judge_subject
from nsa_oracle.harness.scenarios.scenario import Capture, Eager, Join, Replay
from nsa_oracle.harness.subjects.result_checks import DENSE
from nsa_oracle.harness.subjects.subject import Subject
from tests.support.layer_cases import case, lattice
from tests.support.metadata_cases import DECODE, EXTEND, VERIFY

METADATA = case(
    *(Join(seq_len=6), Eager(mode=VERIFY), Capture(mode=DECODE, buckets=(2,)), Replay(mode=DECODE)),
    num_steps=2,
).model_copy(update={"setup": case(num_steps=2).setup.model_copy(update={"layer": None})})
EAGER = case(Join(seq_len=11), Eager(mode=EXTEND, extend_lens=(3,)), layer=lattice())
REPLAY = case(Capture(mode=DECODE, buckets=(2,)), Join(seq_len=11), Replay(mode=DECODE), layer=lattice())
METADATA_OF = "WithMetadata.attn_backends[0].forward_metadata"
METADATA_FIELDS = "an object with the fields of Metadata (nsa_oracle.reference.types)"
STRANGE_BACKENDS = {
    "exits": (Kind.CRASH, "SystemExit", "0", "no exception"),
    "ExitsAtReplay": (Kind.CRASH, "SystemExit", "0", "no exception"),
    "CannotTell": (Kind.CRASH, "Mute", "no text", "no exception"),
    "OneTooMany": (Kind.SHAPE, "attn_backends", "3 steps", "2 steps"),
    "NoSteps": (Kind.SHAPE, "attn_backends", "0 steps", "2 steps"),
    "ListField": (Kind.MISSING, "cu_seqlens_k", "a list of 2", "a tensor of shape [2]"),
    "ArrayField": (Kind.MISSING, "cu_seqlens_k", "a ndarray", "a tensor of shape [2]"),
    "BoolField": (Kind.DTYPE, "seqlens_expanded", "torch.bool", "torch.int32"),
    "ScalarField": (Kind.SHAPE, "cu_seqlens_k", "[]", "[2]"),
    "SparseField": (Kind.RESULT, "cu_seqlens_k", "a tensor of layout torch.sparse_coo", DENSE),
    "MetaField": (Kind.DEVICE, "cu_seqlens_k", "meta", "cpu"),
    "HalfAPair": (Kind.UNEXPECTED, "indexer_k_start", "a tuple of 1", "None"),
    "TensorForScalar": (Kind.HOST_SCALAR, "max_seq_len_k", "tensor(8)", "8, an int of Python"),
    "TrueForOne": (Kind.HOST_SCALAR, "max_seq_len_q", "True", "1, an int of Python"),
    "NoMetadata": (Kind.RESULT, METADATA_OF, "", METADATA_FIELDS),
    "DictOfMetadata": (
        Kind.RESULT,
        METADATA_OF,
        "a dict (types.SimpleNamespace(**fields) has them as attributes)",
        METADATA_FIELDS,
    ),
}
ISOLATED, CHAIN, GRAPH = "isolated stage", "eager chain", "captured chain"
SHAPE_OF_LOGITS = (Kind.SHAPE, "logits", "[2, 11]", "[3, 11]", ISOLATED)
STRANGE_LAYERS = {
    "NoLogits": (Kind.RESULT, "logits", "None", "a tensor", ISOLATED),
    "ListOfLogits": (Kind.RESULT, "logits", "a list of 3", "a tensor", ISOLATED),
    "TupleOfLogits": (Kind.RESULT, "logits", "a tuple of 1", "a tensor", ISOLATED),
    "ScalarLogits": (Kind.SHAPE, "logits", "[]", "[3, 11]", ISOLATED),
    "HalfLogits": (Kind.DTYPE, "logits", "torch.float16", "torch.float32", ISOLATED),
    "LogitsOfTooFewRows": SHAPE_OF_LOGITS,
    "LogitsElsewhere": (Kind.DEVICE, "logits", "meta", "the device", ISOLATED),
    "NoPositions": (Kind.RESULT, "topk_indices", "None", "a tensor", ISOLATED),
    "ScalarPositions": (Kind.SHAPE, "topk_indices", "[]", "[3, 8]", ISOLATED),
    "NoSlots": (Kind.RESULT, "indices", "None", "a tensor", ISOLATED),
    "WideSlots": (Kind.DTYPE, "indices", "torch.int64", "torch.int32", ISOLATED),
    "SlotsOfTooFewRows": (Kind.SHAPE, "indices", "[2, 8]", "[3, 8]", ISOLATED),
    "NoPlaces": (Kind.RESULT, "topk_ragged", "None", "a tensor", ISOLATED),
    "NoAttention": (Kind.RESULT, "sparse_mla", "None", "a tuple (out, lse)", ISOLATED),
    "OutAlone": (Kind.RESULT, "sparse_mla", "a tensor of shape [3, 2, 64]", "a tuple (out, lse)", ISOLATED),
    "OutLseAndMore": (Kind.RESULT, "sparse_mla", "a tuple of 3", "a tuple (out, lse)", ISOLATED),
    "Floats": (Kind.RESULT, "out", "a float", "a tensor", ISOLATED),
    "NoLse": (Kind.RESULT, "lse", "None", "a tensor", ISOLATED),
    "ScalarOut": (Kind.SHAPE, "out", "[]", "[3, 2, 64]", ISOLATED),
    "OutElsewhere": (Kind.DEVICE, "out", "meta", "the device", ISOLATED),
    "OutOfTooFewRows": (Kind.SHAPE, "out", "[2, 2, 64]", "[3, 2, 64]", ISOLATED),
    "NoOutputs": (Kind.RESULT, "forward", "None", "AttentionOutputs: logits, indices, out, lse", CHAIN),
    "TupleOfOutputs": (Kind.RESULT, "forward", "a tuple of 4", "AttentionOutputs: logits, indices, out, lse", CHAIN),
    "OutputsWithoutOut": (Kind.RESULT, "out", "None", "a tensor", CHAIN),
    "OutputsOfTooFewRows": (Kind.SHAPE, "out", "[2, 2, 64]", "[3, 2, 64]", CHAIN),
    "ExitsInAttention": (Kind.LAYER_CRASH, "SystemExit", "0", "no exception", ""),
    "ExitsAtOnce": (Kind.LAYER_CRASH, "SystemExit", "0", "no exception", ""),
}
IN_NO_GRAPH = {"NoPositions", "ScalarPositions", "NoPlaces"}  # by themselves they are no part of ``forward``


@pytest.mark.parametrize("name", STRANGE_BACKENDS)
def test_backend_is_found_out(name: str, device: torch.device) -> None:
    subject = Subject.load(f"tests.support.strangers:{name}", None, device)
    with pytest.raises(OracleFailure) as caught:
        judge_subject(subject, METADATA, device)
    finding = caught.value.finding
    kind, field, got, expected = STRANGE_BACKENDS[name]
    expected = device.type if kind is Kind.DEVICE else expected
    said = finding.expected.split(":")[0] if kind is Kind.DEVICE else finding.expected
    assert (finding.kind, finding.field, said) == (kind, field, expected), finding.sentence()
    assert finding.got == got or not got, finding.sentence()
    assert len(finding.sentence().splitlines()) == 1


UNSET = (
    r"^wrong result: WithMetadata\.attn_backends\[0\]\.forward_metadata at step 0: got None: it was not set by "
    r"init_forward_metadata_capture_cuda_graph, expected an object with the fields of Metadata "
)


def test_backend_without_metadata_is_found_out_in_a_graph(device: torch.device) -> None:
    subject = Subject.load("tests.support.strangers:NoMetadata", None, device)
    with pytest.raises(OracleFailure, match=UNSET):
        judge_subject(subject, METADATA.model_copy(update={"events": METADATA.events[2:]}), device)


@pytest.mark.parametrize("name", STRANGE_LAYERS)
def test_layer_is_found_out(name: str, device: torch.device) -> None:
    subject = Subject.load(None, f"tests.support.strangers:{name}", device)
    with pytest.raises(OracleFailure) as caught:
        judge_subject(subject, EAGER, device)
    finding = caught.value.finding
    expected = "the device" if finding.expected.split(":")[0] == device.type else finding.expected
    reported = (finding.kind, finding.field, finding.got, expected, finding.how)
    assert reported == STRANGE_LAYERS[name], finding.sentence()


@pytest.mark.parametrize("name", [name for name in STRANGE_LAYERS if name not in IN_NO_GRAPH])
def test_layer_is_found_out_in_a_graph(name: str, device: torch.device) -> None:
    """One request in a bucket of two: a missing row is one of padding."""
    subject = Subject.load(None, f"tests.support.strangers:{name}", device)
    with pytest.raises(OracleFailure) as caught:
        judge_subject(subject, REPLAY, device)
    finding = caught.value.finding
    kind, field, *_ = STRANGE_LAYERS[name]
    assert (finding.kind, finding.field) == (kind, field), finding.sentence()
    assert finding.how == (GRAPH if kind is not Kind.LAYER_CRASH else "")


@pytest.mark.parametrize("name", ["WithGradient", "InAList"])
def test_freedom_passes(name: str, device: torch.device) -> None:
    subject = Subject.load(None, f"tests.support.strangers:{name}", device)
    for scenario in (EAGER, REPLAY):
        assert judge_subject(subject, scenario, device).cases == 1
