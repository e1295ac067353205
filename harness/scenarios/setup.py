"""What a test case chooses: sizes and flags of the backend, of the engine around it, and of the layer behind it."""

from __future__ import annotations

import enum
import math

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nsa_oracle.reference.types import AttentionConfig, BackendConfig, KVCacheDtype, StepSemantics

MAX_BATCH = 4096
MAX_STEPS = 16
MAX_CONTEXT = 1 << 20
MAX_POOL_CELLS = 1 << 23  # of req_to_token, of which the host keeps lists as well
SCALE_OF_EXACT_REGIMES = math.log(2)  # q.k is then the logit in the exp2 domain
MAX_CODE_BITS = 24


class PageLayout(enum.Enum):
    """Order in which free pages are handed to requests."""

    CONTIGUOUS = "contiguous"
    DESCENDING = "descending"
    INTERLEAVED = "interleaved"  # neighbouring pages belong to different requests
    SHUFFLED = "shuffled"


class Reuse(enum.Enum):
    """Order in which rows and pages that requests have left are handed out again."""

    STACK = "stack"  # what was left last comes first, so that the next request gets the same row and pages
    QUEUE = "queue"  # rows as above; pages only after all others, so that the same row gets other pages
    SHUFFLED = "shuffled"  # free rows in any order; pages too, those left last among those that were next


class Mirror(enum.Enum):
    """State of the host copy ``seq_lens_cpu``, and with it of ``seq_lens_sum``, when the backend is called."""

    EQUAL = "equal"
    STALE = "stale"  # from before the last accept
    AHEAD = "ahead"  # as if every draft token had been accepted
    ABSENT = "absent"


class Order(enum.Enum):
    """Order of the running requests within a batch."""

    JOINED = "joined"
    REVERSED = "reversed"
    SHUFFLED = "shuffled"


class Drive(enum.Enum):
    """Whose methods the engine calls: the N-step backend's, or those of each of its single-step backends."""

    MULTI_STEP = "multi_step"
    SINGLE_STEP = "single_step"


class IntDtype(enum.Enum):
    INT32 = "int32"
    INT64 = "int64"


class Regime(enum.Enum):
    """Kind of content of a layer's inputs, the simplest first."""

    DOMINATING = "dominating"  # one key has all the weight; the output is its value, which encodes its slot
    EQUAL = "equal"  # all keys weigh the same and all index scores are equal
    LATTICE = "lattice"  # weights 2^0 .. 2^-8, many tied index scores
    RANDOM = "random"  # ordinary numbers; nothing is exact

    @property
    def is_exact(self) -> bool:
        """Whether ``logits`` and ``out`` have a single right bit pattern, given that sm_scale is ln 2."""
        return self is not Regime.RANDOM


def most_coded_slots(attention: AttentionConfig) -> int:
    """Number of slots that can have distinct keys in the DOMINATING regime."""
    return 1 << min(attention.qk_rope_head_dim - 1, MAX_CODE_BITS)


class FieldError(ValueError):
    """A rule between several fields is broken. ``field`` is the place of one to change, within the judged record."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field


class CasePart(BaseModel):
    """A part of a scenario: frozen, and without fields that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Inputs(CasePart):
    """Layout of the engine's input tensors: dtypes, and whether they are views with gaps between the elements.

    accept_length: also the dtype of ``extend_seq_lens`` and ``extend_prefix_lens``. strided: per-request inputs are
    columns of wider tensors; with a layer, the rows and heads of its inputs are slices of wider tensors too.
    wide_req_to_token: a view of a wider tensor. far_req_to_token: a view whose rows lie so far apart that the offset
    of the last one, in elements, needs more than 32 bits, as in a large pool; requests get its last rows first.
    """

    seq_lens: IntDtype = IntDtype.INT64
    req_pool_indices: IntDtype = IntDtype.INT64
    accept_length: IntDtype = IntDtype.INT32
    strided: bool = False
    wide_req_to_token: bool = False
    far_req_to_token: bool = False


class Layer(CasePart):
    """The sparse attention layer behind the metadata: its sizes and the content of its inputs. See ``AttentionConfig``.

    far_slots: the caches are views whose slots and pages lie so far apart that 32-bit offsets wrap. padding_slot: where
    rows that stand for no token write their keys; -1 for nowhere. extra_rows: rows of the inputs of each pass behind
    those of the metadata, as where an engine pads the tensors of a call to those of the busiest rank. slots_by_step:
    the slots of all steps lie behind each other, as where an engine prepares them together; each pass gets a view.
    """

    num_heads: int = Field(default=2, ge=1, le=128)
    kv_lora_rank: int = Field(default=64, ge=64, le=512, multiple_of=64)
    qk_rope_head_dim: int = Field(default=16, ge=16, le=64, multiple_of=16)
    index_n_heads: int = Field(default=2, ge=1, le=64)
    index_head_dim: int = Field(default=32, ge=32, le=128, multiple_of=32)
    kv_cache_dtype: KVCacheDtype = KVCacheDtype.BF16
    regime: Regime = Regime.DOMINATING
    far_slots: bool = False
    padding_slot: int = Field(default=0, ge=-1, le=0)
    extra_rows: int = Field(default=0, ge=0, le=64)
    slots_by_step: bool = False

    def attention_config(self) -> AttentionConfig:
        exact = self.regime is not Regime.RANDOM
        return AttentionConfig(
            num_heads=self.num_heads,
            kv_lora_rank=self.kv_lora_rank,
            qk_rope_head_dim=self.qk_rope_head_dim,
            index_n_heads=self.index_n_heads,
            index_head_dim=self.index_head_dim,
            kv_cache_dtype=self.kv_cache_dtype,
            sm_scale=SCALE_OF_EXACT_REGIMES if exact else (self.kv_lora_rank + self.qk_rope_head_dim) ** -0.5,
        )


class Setup(CasePart):
    """Sizes of the backend and of the engine around it. See ``reference.types.BackendConfig`` for the first eight.

    neighbour_context_len: if it is not 0, a second backend of this max_context_len lives in the process, and prepares
    batches of its own between each preparation and what reads it. padding_len: length of requests that only pad a
    batch. cache_pages: pages that requests can hold, 0 for as many as the pool's rows; a request that finds too few
    does not join, and one that cannot grow finishes. eager_padding: requests of padding in each eager call but a
    prefill, as where data-parallel ranks pad to the busiest one; without a layer only.
    """

    page_size: int = Field(ge=1, le=1024)
    max_context_len: int = Field(ge=2, le=MAX_CONTEXT)
    index_topk: int = Field(ge=1, le=MAX_CONTEXT)
    num_steps: int = Field(ge=1, le=MAX_STEPS)
    num_draft_tokens: int = Field(ge=1, le=MAX_STEPS)
    step_semantics: StepSemantics = StepSemantics.SHARED
    paged_mqa_num_sms: int = Field(default=0, ge=0, le=1024)
    flashmla_num_sm_parts: int = Field(default=0, ge=0, le=1024)
    pool_size: int = Field(ge=1, le=MAX_BATCH)
    page_layout: PageLayout = PageLayout.CONTIGUOUS
    reuse: Reuse = Reuse.STACK
    drive: Drive = Drive.MULTI_STEP
    inputs: Inputs = Inputs()
    layer: Layer | None = None  # None: metadata alone
    neighbour_context_len: int = Field(default=0, ge=0, le=MAX_CONTEXT)
    padding_len: int = Field(default=1, ge=0, le=1)
    cache_pages: int = Field(default=0, ge=0, le=MAX_POOL_CELLS)
    eager_padding: int = Field(default=0, ge=0, le=64)

    @property
    def pages_per_request(self) -> int:
        return -(-self.max_context_len // self.page_size)

    @property
    def num_pages(self) -> int:
        """Pages of the caches: the dummy page 0, those that requests can hold, and two that nothing may read."""
        return 1 + self.held_pages + 2

    @property
    def num_slots(self) -> int:
        return self.num_pages * self.page_size

    @property
    def held_pages(self) -> int:
        """Number of pages that requests can hold together."""
        return self.cache_pages or self.pool_size * self.pages_per_request

    @property
    def cache_bytes(self) -> int:
        """Of both caches of the layer, with keys of two bytes a number."""
        # The sentinel in page tables is the number of an existing slot; as a page number it has to exist as well.
        config = (self.layer or Layer()).attention_config()
        return self.num_slots * (2 * config.qk_head_dim + config.index_page_bytes(self.page_size))

    @property
    def is_far(self) -> bool:
        """Whether any memory is spread so far that it takes gigabytes on a GPU."""
        return self.inputs.far_req_to_token or (self.layer is not None and self.layer.far_slots)

    @property
    def draft_overshoot(self) -> int:
        """Number of tokens beyond ``seq_lens`` that drafting and verification may address."""
        return max(self.num_draft_tokens, self.num_steps)

    @property
    def max_seq_len(self) -> int:
        """Largest length, in tokens, of a request with room for another draft."""
        return self.max_context_len - self.draft_overshoot

    @model_validator(mode="after")
    def _leaves_room_for_drafts(self) -> Setup:
        if self.max_seq_len < 1:
            raise FieldError(
                "max_context_len",
                f"{self.max_context_len} must exceed the {self.draft_overshoot} tokens that a draft may overshoot",
            )
        if self.eager_padding and self.layer is not None:
            raise FieldError("eager_padding", "must be 0 in a case with a layer")
        most = self.pool_size * self.pages_per_request
        if self.cache_pages and not self.pages_per_request <= self.cache_pages <= most:
            raise FieldError("cache_pages", f"{self.cache_pages} must be 0, or {self.pages_per_request} to {most:,}")
        if 0 < self.neighbour_context_len <= self.draft_overshoot:
            raise FieldError(
                "neighbour_context_len",
                f"{self.neighbour_context_len} must be 0 or exceed the {self.draft_overshoot} tokens that a draft may "
                "overshoot",
            )
        return self

    def backend_config(self) -> BackendConfig:
        return BackendConfig(
            page_size=self.page_size,
            max_context_len=self.max_context_len,
            index_topk=self.index_topk,
            speculative_num_steps=self.num_steps,
            speculative_num_draft_tokens=self.num_draft_tokens,
            step_semantics=self.step_semantics,
            paged_mqa_num_sms=self.paged_mqa_num_sms,
            flashmla_num_sm_parts=self.flashmla_num_sm_parts,
        )
