"""What cannot be judged at all is refused in one line."""

from __future__ import annotations

import pytest
import torch

from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.subjects.subject import Subject

REFUSED_BACKENDS = {
    "NeedsMore": "cannot be called with (config, req_to_token): missing a required argument: 'stream'",
    "NeedsLess": "cannot be called with (config, req_to_token): too many positional arguments",
    "gives_none": "returned None; return the backend",
    "NothingForSteps": "attn_backends must be a list of single-step backends, not NoneType",
    "NumberOfSteps": "attn_backends must be a list of single-step backends, not int",
    "SizesOfAnotherKind": "sizes must map fields to allowed values",
    "SizesOfALayer": "sizes: no backend has 'num_heads'",
    "UnknownMode": "modes: there is no PREFILL",
}
REFUSED_LAYERS = {
    "LayerNeedsMore": "cannot be called with (config, attention): missing a required argument: 'stream'",
    "NumberForAStage": "NumberForAStage.sparse_mla is not a method",
    "no_layer": "returned None; return the layer",
    "WeakerList": "weaker must map stages to a Strictness; it is a list",
    "WeakerText": "weaker: 'out' must be an nsa_oracle.harness.protocol.Strictness",
    "WeakerCache": "weaker: 'kv_cache' cannot be BOUND; it fits logits, out, lse",
    "WeakerNothing": "weaker: there is no stage 'output'; did you mean out?",
    "SetOfOutputs": "weaker: 'out' cannot be SAME_SET; it fits topk_indices, indices, topk_ragged",
}


@pytest.mark.parametrize(("name", "cause"), REFUSED_BACKENDS.items())
def test_backend_is_refused_in_one_line(name: str, cause: str, device: torch.device) -> None:
    with pytest.raises(BackendError) as caught:
        Subject.load(f"tests.support.strangers:{name}", None, device)
    assert str(caught.value).startswith(f"backend 'tests.support.strangers:{name}'")
    assert cause in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("name", "cause"), REFUSED_LAYERS.items())
def test_layer_is_refused_in_one_line(name: str, cause: str, device: torch.device) -> None:
    with pytest.raises(BackendError) as caught:
        Subject.load(None, f"tests.support.strangers:{name}", device)
    assert str(caught.value).startswith(f"layer 'tests.support.strangers:{name}'")
    assert cause in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
