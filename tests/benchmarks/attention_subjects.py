"""What the attention benchmarks put side by side: the stages of a layer, production kernels, and floors.

A load holds the inputs of one case; each of its methods gives a call to time. Where a stage reads a cache, its calls go
through the caches of several layers in turn, as a model does: nothing is in the L2 cache that would not be there then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import torch

from docs.examples.peers import FOLDER, sgl_kernel
from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.subjects.adapters.deep_gemm import deep_gemm
from nsa_oracle.optimized import attention, indexer, kv_cache, topk
from nsa_oracle.optimized.layer import SparseAttention
from nsa_oracle.reference.kv_cache import store_index_k, store_kv
from nsa_oracle.reference.types import AttentionCaches, AttentionConfig, AttentionInputs, ForwardMode, KVCacheDtype
from tests.benchmarks.subjects import CONTEXT, DRAFT_TOKENS, PAGE_SIZE, TOPK, Workload

DEVICE = "cuda"
LAYERS = 16  # caches that a stage reads in turn: what it reads of all is at least twice the L2 cache of an H200
REQUESTS = 8  # that the tokens of a sparse MLA case belong to
REQUEST_LENGTH = 32_768
DEEP_GEMM_TOKENS = 2  # of one request, at most, that its kernel for Hopper takes together
CHUNK = 65_536  # slots that are filled at once
OUTPUT_TILES = 1536, 2816  # sides of a product that is one tile of 128 x 256 for each of 132 multiprocessors
DEPTH_MULTIPLE = 8  # of that product: rows of bf16 that start on 16 bytes

Call = Callable[[], object]


def peers() -> Any | None:
    """SGLang's operators, or None where they are not given."""
    return sgl_kernel() if FOLDER in os.environ else None


@dataclass
class SparseMLA:
    """Query tokens of ``REQUESTS`` requests, each with ``TOPK`` slots of its request, in ascending order."""

    tokens: int
    heads: int
    cache: KVCacheDtype
    config: AttentionConfig = field(init=False)

    def __post_init__(self) -> None:
        self.config = AttentionConfig(num_heads=self.heads, kv_cache_dtype=self.cache)
        self.q = randn(self.tokens, self.heads, self.config.qk_head_dim).bfloat16()
        self.caches = layers(filled_kv(self.config, REQUESTS * REQUEST_LENGTH))
        self.indices = [self._select() for _ in self.caches]  # each [tokens, TOPK]

    def _select(self) -> torch.Tensor:
        chosen = torch.rand(self.tokens, REQUEST_LENGTH, device=DEVICE).topk(TOPK).indices.sort().values
        request = torch.arange(self.tokens, device=DEVICE) % REQUESTS
        return (chosen + REQUEST_LENGTH * request[:, None]).int()

    def ours(self) -> Call:
        return in_turn(partial(attention.sparse_mla, self.config, self.q), self.caches, self.indices)

    def flash_mla(self) -> Call | None:
        """FlashMLA: its prefill kernel over a bf16 cache, its decode kernel over an FP8 cache.

        The schedule of the decode kernel is made beforehand, since the layers of a model share one.
        """
        operators, config = peers(), self.config
        if operators is None:
            return None
        indices = [selected[:, None] for selected in self.indices]
        if self.cache is KVCacheDtype.BF16:
            prefill = operators.sparse_prefill_fwd.default
            return in_turn(
                lambda kv, selected: prefill(self.q, kv, selected, config.sm_scale, config.kv_lora_rank, None, None),
                self.caches,
                indices,
            )
        shape = (-1, PAGE_SIZE, 1, config.kv_token_bytes)
        pages = [kv.view(shape).view(torch.float8_e4m3fn) for kv in self.caches]

        def decode(kv: torch.Tensor, selected: torch.Tensor, *schedule: torch.Tensor | None) -> Any:
            return operators.sparse_decode_fwd.default(
                *(self.q[:, None], kv, selected, None, None, *schedule, None, None, None),
                *(config.kv_lora_rank, config.sm_scale),
            )

        *_, scheduler_metadata, num_splits = decode(pages[0], indices[0], None, None)
        return in_turn(lambda kv, selected: decode(kv, selected, scheduler_metadata, num_splits), pages, indices)

    def copy_floor(self) -> Call:
        """Each slot that any token selected once, the indices, the queries and the output."""
        keys = self.indices[0].unique().numel() * self.caches[0][0].nbytes
        outputs = self.tokens * self.heads * (2 * self.config.kv_lora_rank + 4)
        return copy(keys + self.indices[0].nbytes + self.q.nbytes + outputs, LAYERS)

    def matmul_floor(self) -> Call:
        """A bf16 product of as many operations as the scores and the weighted sum."""
        pairs = self.tokens * self.heads * TOPK
        return matmul(pairs * (self.config.qk_head_dim + self.config.kv_lora_rank))


@dataclass
class TopK:
    """Rows of normal logits, all columns live. They are in the L2 cache, where the indexer would have left them."""

    rows: int
    width: int

    def __post_init__(self) -> None:
        self.logits = randn(self.rows, self.width)
        self.lengths = torch.full((self.rows,), self.width, dtype=torch.int32, device=DEVICE)
        self.table = torch.randint(0, 1 << 20, (self.rows, self.width), dtype=torch.int32, device=DEVICE)
        self.selected = torch.empty(self.rows, TOPK, dtype=torch.int32, device=DEVICE)

    def ours(self) -> Call:
        return partial(topk.topk_indices, self.logits, self.lengths, TOPK)

    def ours_paged(self) -> Call:
        return partial(topk.topk_transform_paged, self.logits, self.lengths, self.table, TOPK)

    def fast_topk(self) -> Call | None:
        operators = peers()
        if operators is None:
            return None
        return partial(operators.fast_topk.default, self.logits, self.selected, self.lengths, None)

    def fast_topk_paged(self) -> Call | None:
        operators = peers()
        if operators is None:
            return None
        rows = torch.arange(self.rows + 1, dtype=torch.int32, device=DEVICE)
        fused = operators.fast_topk_transform_fused.default
        return partial(fused, self.logits, self.lengths, self.selected, self.table, rows, None)

    def torch_topk(self) -> Call:
        return partial(torch.topk, self.logits, TOPK, sorted=False)

    def copy_floor(self) -> Call:
        """The logits read once, the selected written once."""
        return copy(self.logits.nbytes + self.selected.nbytes)


@dataclass
class Indexer:
    """Requests of ``width`` tokens, each with pages of its own, in random order, and with as many query tokens.

    query_tokens: of a request, each a row; the last one sees all tokens.
    """

    requests: int
    query_tokens: int
    width: int
    config: AttentionConfig = field(default_factory=AttentionConfig)

    def __post_init__(self) -> None:
        rows = self.requests * self.query_tokens
        self.q, self.weights = index_queries(self.config, rows)
        self.caches = layers(filled_index_k(self.config, self.requests * self.width))
        pages = torch.randperm(len(self.caches[0]), device=DEVICE).int().view(self.requests, -1)
        self.table = pages.repeat_interleave(self.query_tokens, 0)  # [rows, pages of a request]
        behind = torch.arange(self.query_tokens - 1, -1, -1, device=DEVICE).repeat(self.requests)
        self.lengths = (self.width - behind).int()

    def ours(self) -> Call:
        def score(cache: torch.Tensor) -> torch.Tensor:
            return indexer.indexer_logits(
                self.config, self.q, self.weights, cache, self.table, self.lengths, self.width
            )

        return in_turn(score, self.caches)

    def deep_gemm(self) -> Call | None:
        """DeepGEMM's paged MQA logits. Its schedule is made beforehand: the layers of a model share one.

        Two query tokens are those of one request, as its kernel for Hopper has them; more are requests of their own, as
        SGLang calls it then. Cells behind a row's length are not cleared.
        """
        try:
            package = deep_gemm()
        except BackendError:
            return None
        together = self.query_tokens if self.query_tokens <= DEEP_GEMM_TOKENS else 1
        lengths, config = self.lengths.view(-1, together), self.config
        q = self.q.view(len(lengths), together, config.index_n_heads, config.index_head_dim)
        table = self.table.view(len(lengths), together, -1)[:, -1].contiguous()
        multiprocessors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
        schedule = package.get_paged_mqa_logits_metadata(lengths, PAGE_SIZE, multiprocessors)
        pages = [cache.view(-1, PAGE_SIZE, 1, config.index_page_bytes(1)) for cache in self.caches]

        def score(cache: torch.Tensor) -> Any:
            return package.fp8_paged_mqa_logits(
                q, cache, self.weights, lengths, table, schedule, self.width, clean_logits=False
            )

        return in_turn(score, pages)

    def copy_floor(self) -> Call:
        """Index keys and queries read once, the logits written once."""
        logits = 4 * len(self.q) * self.width
        return copy(self.caches[0].nbytes + self.q.nbytes + self.weights.nbytes + logits, LAYERS)


@dataclass
class Store:
    """Rows whose keys go to random slots. The keys are in the L2 cache, where the projections would have left them."""

    rows: int
    cache: KVCacheDtype
    config: AttentionConfig = field(init=False)

    def __post_init__(self) -> None:
        self.config = AttentionConfig(kv_cache_dtype=self.cache)
        num_slots = REQUESTS * REQUEST_LENGTH
        self.caches = AttentionCaches(filled_kv(self.config, num_slots), filled_index_k(self.config, num_slots))
        self.inputs = layer_inputs(self.config, torch.randperm(num_slots, device=DEVICE)[: self.rows])

    def ours(self) -> Call:
        return partial(kv_cache.store_cache, self.config, self.caches, self.inputs)

    def copy_floor(self) -> Call:
        """Keys, index keys and slots read once, their places in both caches written once."""
        read = self.inputs.k.nbytes + self.inputs.index_k.nbytes + self.inputs.out_cache_loc.nbytes
        slot = self.caches.kv[0].nbytes + self.config.index_page_bytes(1)
        return copy(read + self.rows * slot)


@dataclass
class Step:
    """One captured step of a batch: its metadata, then one layer. FP8 cache, 128 heads, tables ``CONTEXT`` wide."""

    mode: ForwardMode
    bs: int
    length: int
    config: AttentionConfig = field(default_factory=AttentionConfig)

    def __post_init__(self) -> None:
        self.load = Workload(self.bs, self.length, 1, self.mode)
        pages_each = -(-(self.length + DRAFT_TOKENS) // PAGE_SIZE)
        num_slots = self.bs * pages_each * PAGE_SIZE
        pages = torch.randperm(self.bs * pages_each, dtype=torch.int32, device=DEVICE)
        slots = pages.view(self.bs, -1, 1) * PAGE_SIZE + torch.arange(PAGE_SIZE, dtype=torch.int32, device=DEVICE)
        self.load.req_to_token = torch.zeros(self.bs, CONTEXT, dtype=torch.int32, device=DEVICE)  # dead beyond
        self.load.req_to_token[:, : pages_each * PAGE_SIZE] = slots.flatten(1)
        self.backend = self.load.backend("one_launch", "in_graph")
        self.meta = self.backend.attn_backends[0].forward_metadata

        own = self.meta.seqlens_expanded.long() - 1  # [R] position of the row's own token
        self.inputs = layer_inputs(self.config, self.meta.page_table_1.gather(1, own[:, None])[:, 0].long())
        kv, index_k = filled_kv(self.config, num_slots), filled_index_k(self.config, num_slots)
        self.caches = [AttentionCaches(*pair) for pair in zip(layers(kv), layers(index_k), strict=True)]
        self.layer = SparseAttention(self.load.config, self.config)
        self.outputs = self.layer.forward(self.inputs, self.caches[0], self.meta)

    def whole(self) -> Call:
        def step(caches: AttentionCaches) -> None:
            self._prepare()
            self.layer.forward(self.inputs, caches, self.meta)

        return in_turn(step, self.caches)

    def metadata(self) -> Call:
        return self._prepare

    def store(self) -> Call:
        return in_turn(lambda caches: self.layer.store_cache(caches, self.inputs), self.caches)

    def indexer(self) -> Call:
        inputs, meta = self.inputs, self.meta

        def score(caches: AttentionCaches) -> torch.Tensor:
            return self.layer.indexer_logits(
                *(inputs.index_q, inputs.index_weights, caches.index_k),
                *(meta.real_page_table, meta.seqlens_expanded, meta.max_seq_len_k),
            )

        return in_turn(score, self.caches)

    def top_k(self) -> Call:
        select = self.layer.topk_transform_paged
        return partial(select, self.outputs.logits, self.meta.seqlens_expanded, self.meta.page_table_1)

    def attention(self) -> Call:
        attend = self.layer.sparse_mla
        return in_turn(lambda caches: attend(self.inputs.q, caches.kv, self.outputs.indices), self.caches)

    def copy_floor(self) -> Call:
        """Index pages and selected slots read once, what is stored written once, and what goes in and comes out.

        Each live slot of a request is read from the pool once, and written to each of its rows.
        """
        caches, inputs, outputs = self.caches[0], self.inputs, self.outputs
        read = caches.index_k.nbytes + outputs.indices.unique().numel() * caches.kv[0].nbytes
        stored = len(inputs.q) * (caches.kv[0].nbytes + self.config.index_page_bytes(1))
        given = sum(tensor.nbytes for tensor in vars(inputs).values())
        rows = int(self.meta.seqlens_expanded.sum())  # slots in all rows
        return copy(self.load.bytes_moved(0) + 4 * rows + read + stored + given + outputs.out.nbytes, LAYERS)

    def matmul_floor(self) -> Call:
        """A bf16 product of as many operations as the indexer's scores, the attention's and its weighted sum."""
        config, rows = self.config, len(self.inputs.q)
        scores = int(self.meta.seqlens_expanded.sum()) * config.index_n_heads * config.index_head_dim
        pairs = rows * config.num_heads * TOPK
        return matmul(scores + pairs * (config.qk_head_dim + config.kv_lora_rank))

    def _prepare(self) -> None:
        self.backend.init_forward_metadata_in_graph(self.load.batch, self.bs)


def in_turn(call: Callable[..., object], *arguments: Sequence[Any]) -> Call:
    """``call`` with the first of each, then with the second of each, and so on; after the last, the first."""
    turns = cycle(zip(*arguments, strict=True))
    return lambda: call(*next(turns))


def copy(num_bytes: int, buffers: int = 1) -> Call:
    """A device-to-device copy that reads and writes ``num_bytes`` in all, from and to each of the buffers in turn."""
    sources = [torch.zeros(num_bytes // 2, dtype=torch.uint8, device=DEVICE) for _ in range(buffers)]
    return in_turn(torch.Tensor.copy_, [torch.empty_like(source) for source in sources], sources)


def matmul(multiplications: int) -> Call:
    """A bf16 product of about as many multiplications, whose tiles occupy every multiprocessor just once."""
    height, width = OUTPUT_TILES
    depth = DEPTH_MULTIPLE * round(multiplications / (height * width * DEPTH_MULTIPLE))
    left, right = randn(height, depth).bfloat16(), randn(width, depth).bfloat16()
    product = torch.empty(height, width, dtype=torch.bfloat16, device=DEVICE)
    return lambda: torch.mm(left, right.t(), out=product)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def layers(cache: torch.Tensor) -> list[torch.Tensor]:
    """The cache of each layer: the same content elsewhere."""
    return [cache, *(cache.clone() for _ in range(LAYERS - 1))]


def filled_kv(config: AttentionConfig, num_slots: int) -> torch.Tensor:
    """A KV cache of normal keys."""
    fp8 = config.kv_cache_dtype is KVCacheDtype.FP8
    width, dtype = (config.kv_token_bytes, torch.uint8) if fp8 else (config.qk_head_dim, torch.bfloat16)
    cache = torch.empty(num_slots, 1, width, dtype=dtype, device=DEVICE)
    for slots in _chunks(num_slots):
        store_kv(config, cache, randn(len(slots), config.qk_head_dim).bfloat16(), slots)
    return cache


def filled_index_k(config: AttentionConfig, num_slots: int) -> torch.Tensor:
    """An index-K cache of normal keys, in whole pages."""
    shape = num_slots // PAGE_SIZE, config.index_page_bytes(PAGE_SIZE)
    cache = torch.empty(shape, dtype=torch.uint8, device=DEVICE)
    for slots in _chunks(num_slots):
        store_index_k(config, cache, randn(len(slots), config.index_head_dim).bfloat16(), slots)
    return cache


def _chunks(num_slots: int) -> Iterator[torch.Tensor]:
    yield from torch.arange(num_slots, device=DEVICE).split(CHUNK)


def index_queries(config: AttentionConfig, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """index_q and index_weights."""
    queries = randn(rows, config.index_n_heads, config.index_head_dim).to(torch.float8_e4m3fn)
    return queries, randn(rows, config.index_n_heads)


def layer_inputs(config: AttentionConfig, out_cache_loc: torch.Tensor) -> AttentionInputs:
    """Normal inputs of rows that write to the slots ``out_cache_loc`` int64 [R]."""
    rows = len(out_cache_loc)
    index_q, index_weights = index_queries(config, rows)
    return AttentionInputs(
        q=randn(rows, config.num_heads, config.qk_head_dim).bfloat16(),
        k=randn(rows, config.qk_head_dim).bfloat16(),
        index_q=index_q,
        index_weights=index_weights,
        index_k=randn(rows, config.index_head_dim).bfloat16(),
        out_cache_loc=out_cache_loc,
    )
