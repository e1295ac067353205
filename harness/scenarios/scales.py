"""The ranges that scenarios are drawn from, on a CPU and on a GPU, with and without a layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from nsa_oracle.harness.scenarios.limits import EVERYTHING, Limits, Sizes, shown
from nsa_oracle.harness.scenarios.setup import Drive, IntDtype, PageLayout, Regime, Reuse, Setup
from nsa_oracle.reference.types import KVCacheDtype, StepSemantics

RARELY = (False,) * 5 + (True,)
PADDING_SLOTS = (0, 0, -1)
EXTRA_ROWS = (0, 0, 0, 1, 3)
MORE_RARELY = (False,) * 11 + (True,)  # on a GPU, far memory takes gigabytes, and processes wait for each other
OWN_KERNELS = 512  # values of a latent part, from which on a layer may have kernels of its own, as for production's
NARROW_TABLE = 67  # columns; the interpreter is fast enough for many rows of a page table this narrow


@dataclass(frozen=True)
class Scale:
    """Ranges to draw from. Small sizes keep Triton's interpreter fast; a GPU handles larger ones at no cost."""

    max_context_lens: tuple[int, ...]
    max_requests: int
    many_requests: int  # used instead of max_requests if page tables are narrow and rows few
    max_events: int  # after the first requests have joined; a sequence that engines run back to back counts as one
    max_rows: int  # of one request over all draft steps
    crowds: tuple[int, ...]  # numbers of requests that may join at once, besides 1
    parts: tuple[int, ...]  # multiprocessors or parts that a schedule is dealt over; 0: no schedule
    parts_if_required: tuple[int, ...] = ()  # drawn only for a subject that allows none of those
    layers: tuple[Sizes, ...] = ()  # alternative sizes of the layer behind the metadata; empty: metadata alone
    page_sizes: tuple[int, ...] = (1, 16, 32, 64)
    index_topks: tuple[int, ...] = (4, 8, 17, 64, 200, 2048)
    num_steps: tuple[int, ...] = (1, 2, 3, 4, 8, 9)
    num_draft_tokens: tuple[int, ...] = (1, 2, 3, 4, 8, 9)
    throng: int = (
        0  # requests of a case that a goal asks for, where tables are narrow and rows few; 0: as many_requests
    )
    wide_context_lens: tuple[int, ...] = ()  # drawn only if a goal asks for them: the interpreter takes seconds
    most_new_tokens: int | None = None  # of one request in a prefill; None: no limit
    most_slow_keys: int | None = None  # that these select over all steps, for kernels that may be interpreted
    long_prefills: tuple[int, ...] = ()  # new tokens of one request in a case that a goal asks for; empty: no such case
    long_prefill_sizes: Sizes = field(default_factory=dict)  # of that case, where the limits leave any of them
    far_slots: tuple[bool, ...] = RARELY
    far_req_to_token: tuple[bool, ...] = RARELY  # not together with far_slots, unless the limits require it
    limits: Limits = EVERYTHING

    def most_requests(self, max_context_len: int, rows: int) -> int:
        """Largest number of requests in one scenario. rows: of one request over all steps; narrow ones cost half."""
        cheap = max_context_len <= NARROW_TABLE and rows * self.many_requests <= 2 * self.max_rows * self.max_requests
        return self.many_requests if cheap else self.max_requests

    def most_new_tokens_of(self, setup: Setup) -> int | None:
        """Most new tokens of one request in a prefill; None: no limit."""
        layer = setup.layer
        if self.most_new_tokens is None or self.most_slow_keys is None or layer is None:
            return self.most_new_tokens
        slow = layer.kv_lora_rank >= OWN_KERNELS
        fitting = self.most_slow_keys // (setup.num_steps * setup.index_topk) if slow else self.most_new_tokens
        return min(self.most_new_tokens, max(1, fitting))

    @property
    def pools(self) -> tuple[int, ...]:
        """The sizes of the pool, but for that of a throng."""
        return tuple(range(1, max(self.max_requests, self.many_requests) + 3))

    def drawn(self) -> Sizes:
        """The values that are drawn for each field that ``limits`` can name, regardless of the other fields."""
        both = (False, True)
        sizes: dict[str, tuple[Any, ...]] = {
            "page_size": self.page_sizes,
            "max_context_len": (*self.max_context_lens, *self.wide_context_lens),
            "index_topk": self.index_topks,
            "num_steps": self.num_steps,
            "num_draft_tokens": self.num_draft_tokens,
            "step_semantics": tuple(StepSemantics),
            "paged_mqa_num_sms": (*self.parts, *self.parts_if_required),
            "flashmla_num_sm_parts": (*self.parts, *self.parts_if_required),
            "pool_size": (*self.pools, *((self.throng + 2,) if self.throng else ())),
            "page_layout": tuple(PageLayout),
            "reuse": tuple(Reuse),
            "drive": tuple(Drive),
            "padding_len": (1, 1, 0),
            "eager_padding": (0,) if self.layers else (0, 0, 0, 1, 3),
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
                "padding_slot": PADDING_SLOTS,
                "extra_rows": EXTRA_ROWS,
                "slots_by_step": both,
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
    throng=70,  # more than two warps have lanes
    parts=(0, 1, 3, 6),  # a schedule over 6 neither fills whole vectors nor comes close to it by chance
)
LARGE = Scale(
    max_context_lens=(33, 261, 2300, 4100, 9001),
    max_requests=48,
    many_requests=48,
    max_events=18,
    max_rows=512,
    crowds=(3,),
    throng=140,
    parts=(0, 1, 7, 132),
    far_slots=MORE_RARELY,
    far_req_to_token=MORE_RARELY,
)
# With a layer behind the metadata. The interpreter can compute few numbers only; a GPU handles production's sizes.
SMALL_LAYER = Scale(
    max_context_lens=(20, 33, 67, 130, 261, 1100),  # up to several tiles and several chunks of keys
    max_requests=3,
    many_requests=6,
    max_events=4,
    max_rows=6,
    crowds=(2,),
    parts=(0,),
    parts_if_required=SMALL.parts[1:],
    layers=(
        *4
        * (
            {
                "num_heads": (1, 2, 3, 16, 32),
                "kv_lora_rank": (64, 64, 128),  # the slowest size is drawn least often
                "qk_rope_head_dim": (16, 32),
                "index_n_heads": (1, 2, 3, 1, 2, 3, 17),
                "index_head_dim": (32, 32, 96),
            },
        ),
        {  # production's key sizes, for which a layer may have a separate kernel
            "num_heads": (1, 3, 20),
            "kv_lora_rank": (512,),
            "qk_rope_head_dim": (64,),
            "index_n_heads": (1, 2),
            "index_head_dim": (32,),
            "regime": (*Regime, Regime.DOMINATING, Regime.EQUAL, Regime.LATTICE),  # random content runs several times
        },
        {  # production's sizes of the indexer, for the same reason
            "num_heads": (1, 2),
            "kv_lora_rank": (64,),
            "qk_rope_head_dim": (16,),
            "index_n_heads": (64,),
            "index_head_dim": (128,),
        },
    ),
    index_topks=(4, 8, 17, 64, 200, 520, 1030),
    num_steps=(1, 2, 3),
    wide_context_lens=(16_500,),
    most_new_tokens=16,
    most_slow_keys=4096,  # a Gluon kernel takes half a millisecond for each
    long_prefills=(129, 150, 193),
    # The judged kernels take most of the time of a long prefill: half a second at these sizes, six at the largest.
    long_prefill_sizes={"num_heads": (1, 2, 3), "kv_lora_rank": (64, 128), "index_n_heads": (1, 2, 3)},
)
LARGE_LAYER = Scale(
    max_context_lens=(33, 261, 2300, 4100, 9001),  # 9001 is wider than top-k's largest block
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
    wide_context_lens=(16_500, 40_000),
    most_new_tokens=64,
    long_prefills=(300, 513),
    long_prefill_sizes={"num_heads": (1, 3, 16, 20, 32)},
    far_slots=MORE_RARELY,
    far_req_to_token=MORE_RARELY,
)


def restricted(scale: Scale, limits: Limits) -> Scale:
    """``scale`` restricted to ``limits``. Raises ValueError, in one line, if nothing is left to draw."""
    for name, choices in scale.drawn().items():
        if not limits.of(name, choices):
            allowed, drawn = (", ".join(map(shown, values)) for values in (limits.sizes[name], choices))
            raise ValueError(
                f"none of the sizes drawn on this device fits: {name} may be {allowed}, but is drawn from {drawn}"
            )
    layers = tuple({name: limits.of(name, choices) for name, choices in layer.items()} for layer in scale.layers)
    left = tuple(layer for layer in layers if all(layer.values()))
    if scale.layers and not left:
        raise ValueError(f"no layer drawn on this device has all of the sizes {dict(limits.sizes)} at once")
    if not limits.modes:
        raise ValueError("backend and layer have no mode in common")
    return replace(scale, layers=left, limits=limits)
