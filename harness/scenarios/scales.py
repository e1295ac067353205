"""How large drawn scenarios get, on a CPU and on a GPU, with and without a layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nsa_oracle.harness.scenarios.limits import EVERYTHING, Limits, Sizes, shown
from nsa_oracle.harness.scenarios.regime import Regime
from nsa_oracle.harness.scenarios.scenario import Drive, IntDtype, PageLayout
from nsa_oracle.reference.types import KVCacheDtype, StepSemantics

RARELY = (False,) * 5 + (True,)
MORE_RARELY = (False,) * 11 + (True,)  # on a GPU it takes gigabytes, for which processes wait
NARROW_TABLE = 67  # columns: a page table for which an interpreter, too, has time in many rows


@dataclass(frozen=True)
class Scale:
    """How large scenarios get. Small ones keep Triton's interpreter quick; a GPU takes larger ones for free."""

    max_context_lens: tuple[int, ...]
    max_requests: int
    many_requests: int  # as many instead, where tables are narrow and rows not too many
    max_events: int  # after the first requests; what engines do one right after the other counts as one
    max_rows: int  # of one request over all steps
    crowds: tuple[int, ...]  # how many requests may join at once, beside 1
    parts: tuple[int, ...]  # multiprocessors or parts that a schedule is dealt over; 0 leaves it out
    layers: tuple[Sizes, ...] = ()  # of the attention layer behind the metadata, alternatives; none: metadata alone
    page_sizes: tuple[int, ...] = (1, 16, 32, 64)
    index_topks: tuple[int, ...] = (4, 8, 17, 64, 200, 2048)
    num_steps: tuple[int, ...] = (1, 2, 3, 4, 8)
    num_draft_tokens: tuple[int, ...] = (1, 2, 3, 4, 8)
    most_new_tokens: int | None = None  # of one request in a prefill; None: any number
    far_slots: tuple[bool, ...] = RARELY
    far_req_to_token: tuple[bool, ...] = RARELY  # not both, if the limits leave a choice
    limits: Limits = EVERYTHING

    def most_requests(self, max_context_len: int, rows: int) -> int:
        """Of one scenario. rows: of one request over all steps; short ones cost half."""
        cheap = max_context_len <= NARROW_TABLE and rows * self.many_requests <= 2 * self.max_rows * self.max_requests
        return self.many_requests if cheap else self.max_requests

    def drawn(self) -> Sizes:
        """What is drawn of each field, on its own, that ``limits`` can name."""
        both = (False, True)
        sizes: dict[str, tuple[Any, ...]] = {
            "page_size": self.page_sizes,
            "max_context_len": self.max_context_lens,
            "index_topk": self.index_topks,
            "num_steps": self.num_steps,
            "num_draft_tokens": self.num_draft_tokens,
            "step_semantics": tuple(StepSemantics),
            "paged_mqa_num_sms": self.parts,
            "flashmla_num_sm_parts": self.parts,
            "pool_size": tuple(range(1, max(self.max_requests, self.many_requests) + 3)),
            "page_layout": tuple(PageLayout),
            "drive": tuple(Drive),
            "seq_lens": (IntDtype.INT64, IntDtype.INT32),
            "req_pool_indices": (IntDtype.INT64, IntDtype.INT32),
            "accept_length": (IntDtype.INT32, IntDtype.INT64),
            "strided": both,
            "wide_req_to_token": both,
            "far_req_to_token": tuple(sorted(set(self.far_req_to_token))),
        }
        if self.layers:
            sizes |= {
                "kv_cache_dtype": tuple(KVCacheDtype),
                "regime": tuple(Regime),
                "far_slots": tuple(sorted(set(self.far_slots))),
            }
        for layer in self.layers:
            for name, choices in layer.items():
                sizes[name] = tuple(dict.fromkeys((*sizes.get(name, ()), *choices)))
        return sizes


SMALL = Scale(
    max_context_lens=(20, 33, 67, 130, 261, 520, 2300),
    max_requests=4,
    many_requests=12,
    max_events=9,
    max_rows=16,
    crowds=(2,),
    parts=(0, 1, 3, 6),  # 6: neither fills whole vectors with a schedule nor comes near it by chance
)
LARGE = Scale(
    max_context_lens=(33, 261, 2300, 4100, 9001),
    max_requests=48,
    many_requests=48,
    max_events=18,
    max_rows=512,
    crowds=(3,),
    parts=(0, 1, 7, 132),
    far_slots=MORE_RARELY,
    far_req_to_token=MORE_RARELY,
)
# With a layer behind: what the interpreter computes must stay few numbers; a GPU takes the sizes of production.
SMALL_LAYER = Scale(
    max_context_lens=(20, 33, 67, 130, 261, 1100),  # several tiles and several chunks of keys
    max_requests=3,
    many_requests=6,
    max_events=4,
    max_rows=6,
    crowds=(2,),
    parts=(0,),
    layers=(
        *4
        * (
            {
                "num_heads": (1, 2, 3, 16),
                "kv_lora_rank": (64, 64, 128),  # what takes longest is drawn least
                "qk_rope_head_dim": (16, 32),
                "index_n_heads": (1, 2, 3, 1, 2, 3, 17),
                "index_head_dim": (32, 32, 96),
            },
        ),
        {  # keys of production, for which there may be a kernel of their own
            "num_heads": (1, 3, 20),
            "kv_lora_rank": (512,),
            "qk_rope_head_dim": (64,),
            "index_n_heads": (1, 2),
            "index_head_dim": (32,),
            "regime": (*Regime, Regime.DOMINATING, Regime.EQUAL, Regime.LATTICE),  # random ones are run several times
        },
    ),
    index_topks=(4, 8, 17, 64, 200, 520, 1030),
    num_steps=(1, 2, 3),
    most_new_tokens=16,
)
LARGE_LAYER = Scale(
    max_context_lens=(33, 261, 2300, 4100, 9001),  # the last: wider than top-k's largest block
    max_requests=8,
    many_requests=20,
    max_events=9,
    max_rows=32,
    crowds=(3,),
    parts=(0, 132),
    layers=(
        {
            "num_heads": (16, 32, 64, 128),
            "kv_lora_rank": (512,),
            "qk_rope_head_dim": (64,),
            "index_n_heads": (64,),
            "index_head_dim": (128,),
        },
        {
            "num_heads": (1, 3, 20, 100),
            "kv_lora_rank": (64, 256),
            "qk_rope_head_dim": (16, 32),
            "index_n_heads": (1, 4, 32),
            "index_head_dim": (32, 64),
        },
    ),
    index_topks=(4, 64, 200, 512, 2048),
    num_steps=(1, 2, 4),
    most_new_tokens=64,
    far_slots=MORE_RARELY,
    far_req_to_token=MORE_RARELY,
)


def restricted(scale: Scale, limits: Limits) -> Scale:
    """``scale`` with nothing drawn beyond ``limits``. Raises ValueError, in one line, if that leaves nothing."""
    for name, choices in scale.drawn().items():
        if not limits.of(name, choices):
            allowed, drawn = (", ".join(map(shown, values)) for values in (limits.sizes[name], choices))
            raise ValueError(
                f"none of the sizes that are drawn here fits: {name} may be {allowed}, and is one of {drawn}"
            )
    layers = tuple({name: limits.of(name, choices) for name, choices in layer.items()} for layer in scale.layers)
    left = tuple(layer for layer in layers if all(layer.values()))
    if scale.layers and not left:
        raise ValueError(f"no layer that is drawn here has all of the sizes {dict(limits.sizes)} at once")
    if not limits.modes:
        raise ValueError("backend and layer have no mode in common")
    return replace(scale, layers=left, limits=limits)
