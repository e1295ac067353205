"""vLLM's metadata builders of DeepSeek sparse attention: the indexer's, and FlashMLA sparse.

``NSA_ORACLE_VLLM`` names the folder that contains ``vllm/``; without it an installed package is taken. ``installed``,
``nearest`` and the versions are as in ``sglang``. The builders, what they compute with and their Triton kernels are
vLLM's own. The rest of the engine is a stand-in, the model runner as well (``vllm_runner``). The reference functions of
what vLLM has and the contract has not are in ``vllm_reference``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.fields import Axis
from nsa_oracle.harness.scenarios.batch import Padding
from nsa_oracle.harness.subjects.adapters import vllm_reference as reference
from nsa_oracle.harness.subjects.adapters import vllm_stand_ins as stand_ins
from nsa_oracle.harness.subjects.adapters.packages import Package, PackageLayout
from nsa_oracle.harness.subjects.adapters.vllm_reference import BLACKWELL, HOPPER, OLDER_HOPPER, Convention
from nsa_oracle.harness.subjects.adapters.vllm_runner import Runner
from nsa_oracle.harness.subjects.declarations import OwnField, Waiver
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata

PUBLISHED = Package("vllm", "NSA_ORACLE_VLLM", stand_ins.values, ("deep_gemm",), series=1)
_DRAFTS = ("TARGET_VERIFY", "DRAFT_EXTEND_V2")
_IN_GRAPHS = ("DECODE", *_DRAFTS)
_BACKENDS = "vllm.v1.attention.backends."
_MODULES = (_BACKENDS + "mla.indexer", _BACKENDS + "mla.flashmla_sparse", "vllm.v1.attention.backend")
_OF_ALL = (
    *_MODULES,
    *(_BACKENDS + name for name in ("mla.sparse_utils", "registry", "utils")),
    "vllm.v1.kv_cache_interface",
    "vllm.utils.deep_gemm",
    "vllm.utils.math_utils",
)


class Builders:
    """Both builders of one role behind the protocol's methods: a single step, by today's names."""

    def __init__(self, adapter: type[Vllm], config: BackendConfig, req_to_token: torch.Tensor) -> None:
        self.adapter = adapter
        self.config = config
        self.pool = req_to_token
        self.forward_metadata: Any = None
        self.captured: dict[tuple[ForwardMode, int], SimpleNamespace] = {}

    @contextmanager
    def current(self) -> Iterator[None]:
        """Calls inside are of this instance, on a machine without memory that can be pinned."""
        stand_ins.Current.config, stand_ins.Current.family = self.config, self.adapter.convention.family
        kept, torch.zeros = torch.zeros, lambda *size, pin_memory=False, **more: kept(*size, **more)
        try:
            yield
        finally:
            torch.zeros = kept

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        reqs, tokens = max(max_bs, len(self.pool)), max(max_num_tokens, self.pool.numel())
        indexer, sparse, common = (PUBLISHED.load(self.adapter.layout, name) for name in _MODULES)
        self.runner = Runner(
            self.adapter.convention, self.config, self.pool, reqs, tokens, common.CommonAttentionMetadata
        )
        spec, settings = stand_ins.kv_cache_spec(self.config), stand_ins.vllm_config(self.config, reqs, tokens)
        given = (spec, [stand_ins.LAYER], settings, self.pool.device)
        builder = indexer.DeepseekV32IndexerMetadataBuilder
        width = {"block_table_width": self.runner.width} if hasattr(builder, "requires_block_table_width") else {}
        with self.current():
            self.indexer = builder(*given, **width)
            self.sparse = sparse.FlashMLASparseMetadataBuilder(*given)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        given, order = self.runner.prepared(forward_batch, in_graph=False)
        with self.current():
            built = self.indexer.build(0, given), self.sparse.build(0, dataclasses.replace(given))
        columns = -(-built[1].max_seq_len // self.config.page_size)
        if forward_batch.forward_mode is ForwardMode.EXTEND:
            self.forward_metadata = metadata_of(self.adapter, built[1], order.batch_fields(*built, columns))
        else:
            self.forward_metadata = metadata_of(self.adapter, built[1], both_fields(*built, columns))

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        given, _ = self.runner.prepared(forward_batch, in_graph=True, in_capture=in_capture)
        key, both = (forward_batch.forward_mode, forward_batch.batch_size), (given, dataclasses.replace(given))
        with self.current():
            built = [
                builder.build_for_cudagraph_capture(one) if in_capture else builder.build(0, one)
                for builder, one in zip((self.indexer, self.sparse), both, strict=True)
            ]
        self.forward_metadata = metadata_of(self.adapter, built[1], both_fields(built[0], built[1], self.runner.blocks))
        kept = self.captured.setdefault(key, self.forward_metadata)
        self.forward_metadata.max_seq_len_k = kept.max_seq_len_k  # that with which the graph was recorded

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Nothing: vLLM builds before each replay."""


class FusedDraft(Builders):
    """The drafter's loop in one graph: the indexer's metadata is built at capture, and refreshed in the graph."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        given, _ = self.runner.prepared(forward_batch, in_graph=False)
        with self.current():
            self.forward_metadata = self._shown(self.indexer.build(0, given))

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        given, _ = self.runner.prepared(forward_batch, in_graph=True, in_capture=in_capture)
        key = forward_batch.forward_mode, forward_batch.batch_size
        if in_capture:
            with self.current():
                self.bound = self.indexer.build_for_cudagraph_capture(given)
            self.captured[key] = self._shown(self.bound)
        self.forward_metadata = self.captured[key]

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        with self.current():
            self.indexer.update_draft_decode_metadata(self.bound)

    def _shown(self, indexer: Any) -> SimpleNamespace:
        columns = -(-indexer.max_seq_len // self.config.page_size)
        scalars = SimpleNamespace(
            block_size=self.config.page_size, max_query_len=1, max_seq_len=indexer.max_seq_len, req_id_per_token=None
        )
        return metadata_of(self.adapter, scalars, row_fields(indexer, scalars, columns))


def metadata_of(adapter: type[Vllm], sparse: Any, fields: dict[str, Any]) -> SimpleNamespace:
    """Metadata with the contract's names; what vLLM does not have is None.

    Raises BackendError for a field that the contract does not have and the adapter does not declare.
    """
    found = SimpleNamespace(**dict.fromkeys(field.name for field in dataclasses.fields(Metadata)))
    known = {*vars(found), *(own.name for own in adapter.own_fields)}
    if unknown := [name for name, value in fields.items() if value is not None and name not in known]:
        raise BackendError(f"the metadata has {unknown[0]}, which the adapter does not declare")
    found.page_size = sparse.block_size
    found.max_seq_len_q, found.max_seq_len_k = sparse.max_query_len, sparse.max_seq_len
    vars(found).update(fields)
    return found


def row_fields(indexer: Any, sparse: Any, columns: int) -> dict[str, Any]:
    """The same tensors by the contract's names, of a batch without prefill. columns: of the block table, to show."""
    decode = indexer.decode
    return {
        "cache_seqlens_int32": indexer.seq_lens,
        "seqlens_expanded": decode.seq_lens.view(-1),
        "real_page_table": decode.block_table[:, :columns],
        "paged_mqa_schedule_metadata": decode.schedule_metadata,
        "token_to_batch_idx": sparse.req_id_per_token,
        "decode_lens": decode.decode_lens,
        "per_req_decode_lens": getattr(decode, "per_req_decode_lens", None),
        "varlen_indices": getattr(decode, "indices", None),
    }


def both_fields(indexer: Any, sparse: Any, columns: int) -> dict[str, Any]:
    """The same, with what attention's builder makes for an FP8 cache."""
    return {**row_fields(indexer, sparse, columns), "attention_seq_lens": sparse.fp8_extra_metadata.decode.seq_lens}


TOGETHER = "vLLM counts the query tokens of a request, the contract the rows that are requests of their own"


def _own_fields(convention: Convention) -> tuple[OwnField, ...]:
    own = (
        OwnField("cache_seqlens_int32", reference.lengths_of_requests, ("TARGET_VERIFY",)),
        OwnField("seqlens_expanded", reference.lengths, ("TARGET_VERIFY",)),
        OwnField(
            "seqlens_expanded", reference.lengths_of_rows, ("DRAFT_EXTEND_V2",), dead=reference.before_first_token
        ),
        OwnField("real_page_table", convention.blocks, _DRAFTS, dead=reference.of_padding_requests),
        OwnField("paged_mqa_schedule_metadata", convention.schedule, _DRAFTS),
        OwnField("token_to_batch_idx", reference.requests_of_rows, _IN_GRAPHS),
        OwnField("decode_lens", convention.tokens_of_entries, _IN_GRAPHS, (Axis.FLAT,)),
        OwnField("per_req_decode_lens", reference.tokens_of_requests, _IN_GRAPHS, (Axis.REQUEST,)),
        OwnField("attention_seq_lens", reference.lengths_of_requests, _IN_GRAPHS, (Axis.REQUEST,)),
        OwnField("topk_indices_offset", convention.offsets_of_prefills, ("EXTEND",)),
        OwnField("kv_to_batch_idx", convention.requests_of_kv, ("EXTEND",), (Axis.FLAT,)),
    )
    varlen = OwnField("varlen_indices", reference.requests_of_entries, _IN_GRAPHS, (Axis.ROW,))
    return (*own, varlen) if convention.is_varlen else own


class Vllm:
    """What all versions and GPUs declare."""

    layout: ClassVar[PackageLayout]
    convention: ClassVar[Convention] = HOPPER
    builders: ClassVar[type[Builders]] = Builders
    sizes: ClassVar[dict[str, Sequence[Any]]] = {
        "page_size": (64,),
        "step_semantics": ("shared",),
        "num_steps": (1,),
        "drive": ("single_step",),
        "max_context_len": (67, 130, 520, 2300),
        "paged_mqa_num_sms": (2, 6, 132),
        "flashmla_num_sm_parts": (0,),
        "eager_padding": (0,),
        "strided": (False,),
    }
    modes: ClassVar[tuple[str, ...]] = ("EXTEND", *_IN_GRAPHS)
    roles: ClassVar[dict[str, tuple[str, ...]]] = {
        "target": ("EXTEND", "TARGET_VERIFY"),
        "draft": ("DECODE", "DRAFT_EXTEND_V2"),
    }
    mirrors: ClassVar = {"graph": ("equal", "ahead"), "eager": ("equal",)}
    padding: ClassVar = {mode: Padding(seq_len=0) for mode in _IN_GRAPHS}
    empty_batches = empty_replays = empty_chunks = False
    absent: ClassVar = {
        "*": (
            "cu_seqlens_q", "cu_seqlens_k", "nsa_cache_seqlens_int32", "nsa_cu_seqlens_q", "nsa_cu_seqlens_k",
            "page_table_1",
        ),
        "EXTEND": ("page_table_1_flattened",),
    }  # fmt: skip
    own_fields = _own_fields(HOPPER)
    waivers: ClassVar[tuple[Waiver, ...]] = tuple(
        Waiver(mode, "max_seq_len_q", TOGETHER, reference.several_rows) for mode in _DRAFTS
    )
    stand_ins = staticmethod(PUBLISHED.stand_ins)

    def __new__(cls, config: BackendConfig, req_to_token: torch.Tensor, role: str) -> Any:
        """The builders for ``role``: every role has builders of its own."""
        return cls.builders(cls, config, req_to_token)


@PUBLISHED.adapter
class v0_24(Vllm):  # noqa: N801
    """The builders of 0.24.0 on a Hopper GPU."""

    layout = PackageLayout(version="0.24.0", real=_OF_ALL)
    convention = OLDER_HOPPER
    own_fields = tuple(own for own in _own_fields(OLDER_HOPPER) if own.name != "per_req_decode_lens")


@PUBLISHED.adapter
class v0_33(Vllm):  # noqa: N801
    """The builders of 0.33.0 on a Hopper GPU."""

    layout = PackageLayout(
        version="0.33.0",
        real=(
            *_OF_ALL,
            "vllm.v1.attention.ops.metadata",
            "vllm.v1.kv_cache_layout",
            "vllm.model_executor.layers.attention.sparse_mla_attention",
            "vllm.model_executor.warmup.jit_warmup",
            "vllm.model_executor.warmup.jit_warmup_triton_helper",
        ),
    )


class v0_33_blackwell(v0_33):  # noqa: N801
    """The same on a Blackwell GPU, where a kernel of vLLM's own makes the indexer's metadata."""

    convention = BLACKWELL
    own_fields = _own_fields(BLACKWELL)


class v0_33_fused_draft(v0_33):  # noqa: N801
    """The drafter's loop in one graph. FlashMLA's builder has no part in it."""

    builders = FusedDraft
    modes = ("DECODE",)
    roles: ClassVar = {"draft": ("DECODE",)}
    own_fields = (
        OwnField("decode_lens", reference.ones, ("DECODE",), (Axis.FLAT,)),
        OwnField("per_req_decode_lens", reference.ones, ("DECODE",), (Axis.REQUEST,)),
    )
    padding: ClassVar = {"DECODE": Vllm.padding["DECODE"]}
    absent: ClassVar = {"*": Vllm.absent["*"]}
    waivers = ()


def __getattr__(name: str) -> type[Vllm]:
    """``installed`` and ``nearest``: see ``Package.chosen``."""
    return PUBLISHED.chosen(name)
