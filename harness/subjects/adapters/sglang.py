"""SGLang's NSA and DSA backends of three versions, from an installed package or an unpacked wheel.

``NSA_ORACLE_SGLANG`` names the folder that contains ``sglang/``; without it an installed package is taken. The
attribute ``installed`` is the version found there; ``v0_5_8``, ``v0_5_15`` and ``v0_5_23`` insist on one, and
``nearest`` tries any version with the adapter of the nearest known one. The backend,
its precomputation and its Triton kernels are SGLang's own; the rest of the engine is a stand-in, whether or not it
could be imported, so that the same is judged on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_oracle.harness.errors import BackendError
from nsa_oracle.harness.fields import FIELDS, Axis, Field
from nsa_oracle.harness.scenarios.batch import Padding
from nsa_oracle.harness.subjects.adapters import sglang_stand_ins as stand_ins
from nsa_oracle.harness.subjects.adapters.packages import Package, PackageLayout
from nsa_oracle.harness.subjects.declarations import Call, OwnField, Waiver, behind_last_token, of_negative_lengths
from nsa_oracle.reference import schedules
from nsa_oracle.reference.types import BackendConfig, ForwardBatch, ForwardMode, Metadata, SpecInfo

PUBLISHED = Package(
    "sglang",
    "NSA_ORACLE_SGLANG",
    stand_ins.values,
    ("sgl_kernel", "deep_gemm", "flash_mla", "flashinfer", "aiter"),
    series=2,
)
_unknown: set[str] = set()  # tensors of the metadata of a version without an adapter
_ATTENTION = "sglang.srt.layers.attention."


@dataclass(frozen=True, kw_only=True)
class SglangLayout(PackageLayout):
    """Where one version of SGLang has its backend. names: "nsa" or "dsa", the prefix of its fields."""

    names: str
    module: str
    multi_step: str
    single_step: str


def _attention(*names: str) -> tuple[str, ...]:
    """Modules of SGLang's attention package, unless they are full names."""
    return tuple(name if name.startswith("sglang.") else _ATTENTION + name for name in names)


class Adapter:
    """SGLang's instance for one role. ``draft`` is the multi-step backend, the other roles have one step."""

    def __init__(self, declared: type[Sglang], config: BackendConfig, req_to_token: torch.Tensor) -> None:
        self.declared = declared
        self.config = config
        self.server = stand_ins.Server(config, req_to_token)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Calls inside are of this instance: stand-ins answer for its configuration, on a GPU that they name."""
        stand_ins.Current.config = self.config
        kept, torch.cuda.get_device_capability = torch.cuda.get_device_capability, lambda *_: stand_ins.CAPABILITY
        utils = sys.modules.get(f"{_ATTENTION}dsa.utils")
        if hasattr(utils, "resolve_num_sms"):
            utils.resolve_num_sms.cache_clear()  # type: ignore[union-attr]  # it is the server's, once per process
        try:
            yield
        finally:
            torch.cuda.get_device_capability = kept

    def batch(self, batch: ForwardBatch) -> SimpleNamespace:
        """The batch as SGLang's engine hands it over: one that a backend may write to, with numbers as lists."""
        runner, mode = self.server.runner, batch.forward_mode
        numbers = {name: list(value) for name, value in vars(batch).items() if isinstance(value, tuple)}
        given = {
            **vars(batch),
            **numbers,
            "forward_mode": stand_ins.Mode[mode.value],
            "spec_info": self.spec_info(mode, batch.spec_info, batch.extend_seq_lens),
            "req_to_token_pool": runner.req_to_token_pool,
            "token_to_kv_pool": runner.token_to_kv_pool,
            "get_max_chunk_capacity": lambda: 1 << 30,
            "global_num_tokens_cpu": None,
            "attn_cp_metadata": None,
        }
        return SimpleNamespace(**given)

    def spec_info(
        self, mode: ForwardMode, given: SpecInfo | None, new: torch.Tensor | None
    ) -> SimpleNamespace | SpecInfo | None:
        """In DRAFT_EXTEND_V2 the engine extends every request by all draft tokens, and its accept lengths say so."""
        if mode is ForwardMode.DRAFT_EXTEND_V2 and new is not None:
            return SimpleNamespace(accept_length=new, num_accept_tokens=new)
        return given

    def metadata(self, theirs: Any) -> Any:
        """SGLang's metadata by the contract's names: the same tensors. Fields of its own keep theirs.

        Raises BackendError for a tensor that nothing declares. Of a version without an adapter it is listed instead.
        """
        if theirs is None:
            return None
        prefix = self.declared.layout.names
        if unknown := self.declared.undeclared(theirs):
            if self.declared.layout.version in PUBLISHED.adapters:
                raise BackendError(
                    f"the metadata has {unknown[0]}, which the adapter neither judges nor lists as unread"
                )
            _unknown.update(unknown)
        flashmla = theirs.flashmla_metadata
        renamed = {
            "seqlens_expanded": getattr(theirs, f"{prefix}_seqlens_expanded"),
            **{f"nsa_{name}": getattr(theirs, f"{prefix}_{name}")
               for name in ("cache_seqlens_int32", "cu_seqlens_q", "cu_seqlens_k")},
            "flashmla_metadata": None if flashmla is None else flashmla.flashmla_metadata,
            "flashmla_num_splits": None if flashmla is None else flashmla.num_splits,
        }  # fmt: skip
        return SimpleNamespace(**{**vars(theirs), **renamed})


class Step:
    """One backend of SGLang, or its multi-step backend, with the methods that both versions of the protocol have."""

    def __init__(self, inner: Any, adapter: Adapter) -> None:
        self.inner = inner
        self.adapter = adapter

    @property
    def forward_metadata(self) -> Any:
        return self.adapter.metadata(getattr(self.inner, "forward_metadata", None))

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        with self.adapter.current():
            self.inner.init_forward_metadata(self.adapter.batch(forward_batch))

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        with self.adapter.current():
            self.inner.init_cuda_graph_state(max_bs, max_num_tokens)


class OlderStep(Step):
    """By the older names."""

    def init_forward_metadata_capture_cuda_graph(
        self, bs: int, num_tokens: int, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None, forward_mode: ForwardMode, spec_info: SpecInfo | None,
    ) -> None:  # fmt: skip
        mode = stand_ins.Mode[forward_mode.value]
        with self.adapter.current():
            self.inner.init_forward_metadata_capture_cuda_graph(
                bs, num_tokens, req_pool_indices, seq_lens, encoder_lens, mode, spec_info
            )

    def init_forward_metadata_replay_cuda_graph(
        self, bs: int, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor, seq_lens_sum: int | None,
        encoder_lens: torch.Tensor | None, forward_mode: ForwardMode, spec_info: SpecInfo | None,
        seq_lens_cpu: torch.Tensor | None, out_cache_loc: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        every = torch.full((bs,), self.adapter.config.speculative_num_draft_tokens, device=seq_lens.device)
        info = self.adapter.spec_info(forward_mode, spec_info, every)
        mode = stand_ins.Mode[forward_mode.value]
        with self.adapter.current():
            self.inner.init_forward_metadata_replay_cuda_graph(
                bs, req_pool_indices, seq_lens, seq_lens_sum, encoder_lens, mode, info, seq_lens_cpu, out_cache_loc
            )


class OlderSteps(Step):
    """The multi-step backend, by the older names. Its last step is never prepared eagerly, so it is left out."""

    def __init__(self, inner: Any, adapter: Adapter) -> None:
        super().__init__(inner, adapter)
        self.attn_backends = [OlderStep(step, adapter) for step in inner.attn_backends[:-1]]

    def init_forward_metadata_capture_cuda_graph(self, forward_batch: ForwardBatch) -> None:
        with self.adapter.current():
            self.inner.init_forward_metadata_capture_cuda_graph(self.adapter.batch(forward_batch))

    def init_forward_metadata_replay_cuda_graph(self, forward_batch: ForwardBatch, bs: int) -> None:
        with self.adapter.current():
            self.inner.init_forward_metadata_replay_cuda_graph(self.adapter.batch(forward_batch), bs)


class TodaysStep(Step):
    """By today's names, for one step."""

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        with self.adapter.current():
            self.inner.init_forward_metadata_out_graph(self.adapter.batch(forward_batch), in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        with self.adapter.current():
            self.inner.init_forward_metadata_in_graph(self.adapter.batch(forward_batch))


class TodaysSteps(TodaysStep):
    """The multi-step backend, by today's names."""

    def __init__(self, inner: Any, adapter: Adapter) -> None:
        super().__init__(inner, adapter)
        self.attn_backends = [TodaysStep(step, adapter) for step in inner.attn_backends]


def _live(lengths: torch.Tensor, call: Call) -> torch.Tensor:
    """The lengths of the rows that a batch of DRAFT_EXTEND has, without the tail of its graph."""
    return lengths[: sum(call.rows_of_requests)]


def mqa_schedule_of_live_rows(expected: Metadata, call: Call) -> torch.Tensor:
    """In DRAFT_EXTEND the paged MQA schedule is made for the live rows alone."""
    return schedules.paged_mqa_schedule(_live(expected.seqlens_expanded, call), call.config.paged_mqa_num_sms)


def flashmla_of_live_rows(expected: Metadata, call: Call) -> torch.Tensor | None:
    """FlashMLA's schedule too; 0.5.8 makes one in EXTEND as well."""
    parts = call.config.flashmla_num_sm_parts
    return schedules.flashmla_schedule(_live(expected.nsa_cache_seqlens_int32, call), parts)[0] if parts else None


def flashmla_splits_of_live_rows(expected: Metadata, call: Call) -> torch.Tensor | None:
    """The splits of that schedule; bounds behind them are dead."""
    parts, rows = call.config.flashmla_num_sm_parts, len(expected.nsa_cache_seqlens_int32)
    if not parts:
        return None
    splits = schedules.flashmla_schedule(_live(expected.nsa_cache_seqlens_int32, call), parts)[1]
    return torch.nn.functional.pad(splits, (0, rows + 1 - len(splits)))


def lengths_in_a_column(expected: Metadata, call: Call) -> torch.Tensor:
    """The lengths that the paged MQA schedule is made for, as the indexer's kernel takes them: [rows, 1]."""
    return expected.seqlens_expanded[:, None]


def lengths_of_plan(expected: Metadata, call: Call) -> torch.Tensor:
    """The stand-in's plan for top-k is a copy of the lengths."""
    return expected.seqlens_expanded


TAIL = "rows behind the last token keep what an earlier batch left there; the engine throws their results away"

NEGATIVE = "lengths are not clamped at 0 in this version (sgl-project/sglang#30378); later ones do"
_LENGTHS = ("seqlens_expanded", "nsa_cache_seqlens_int32", "nsa_cu_seqlens_k")


class Sglang:
    """What all versions declare. The constructor raises BackendError unless the version of the class is there."""

    layout: ClassVar[SglangLayout]
    steps: ClassVar[type[Step]]
    one_step: ClassVar[type[Step]]
    sizes: ClassVar[dict[str, Sequence[Any]]] = {
        "step_semantics": ("shared",),
        "max_context_len": (67, 520, 2300, 4100, 9001),  # some are longer than a segment of the schedule
        "drive": ("multi_step",),
        "num_steps": (2, 3, 4, 8),
        "padding_len": (1,),
        "paged_mqa_num_sms": (1, 3, 6, 7, 132),
        "seq_lens": ("int64",),
        "req_pool_indices": ("int64",),
        "accept_length": ("int32",),
        "strided": (False,),
    }
    modes: ClassVar[tuple[str, ...]] = ("EXTEND", "DECODE", "IDLE", "TARGET_VERIFY", "DRAFT_EXTEND_V2")
    roles: ClassVar[dict[str, tuple[str, ...]]] = {
        "draft": ("DECODE", "IDLE"),
        "target": ("EXTEND", "TARGET_VERIFY"),
        "draft_extend_v2": ("DRAFT_EXTEND_V2",),
    }
    step_backends: ClassVar[dict[str, str]] = {"draft": "N-1", "target": "1", "draft_extend_v2": "1"}
    empty_batches = False
    fewer_steps = False  # its adaptive speculation has a backend for each number of steps
    own_fields: ClassVar[tuple[OwnField, ...]] = ()
    unread: ClassVar[tuple[str, ...]] = ("indexer_seq_lens_cpu",)  # an input, passed on in EXTEND

    @classmethod
    def undeclared(cls, theirs: Any) -> list[str]:
        """The tensors of SGLang's metadata that are neither judged nor listed in ``unread``."""
        prefix, names = f"{cls.layout.names}_", {field.name for field in FIELDS}
        prefixed = {prefix + name.removeprefix("nsa_") for name in names if name.startswith(("nsa_", "seqlens_"))}
        known = {*names, *prefixed, *cls.unread, *(own.name for own in cls.own_fields)}
        return [name for name, value in vars(theirs).items() if isinstance(value, torch.Tensor) and name not in known]

    def __new__(cls, config: BackendConfig, req_to_token: torch.Tensor, role: str) -> Any:
        """SGLang's instance for ``role`` behind the adapter."""
        module = PUBLISHED.load(cls.layout, _ATTENTION + cls.layout.module)
        adapter = Adapter(cls, config, req_to_token)
        count = config.speculative_num_steps
        with adapter.current():
            if role == "draft":
                return cls.steps(getattr(module, cls.layout.multi_step)(adapter.server.runner, 1, count), adapter)
            single = getattr(module, cls.layout.single_step)
            return cls.one_step(single(adapter.server.runner, topk=1, speculative_num_steps=count), adapter)

    @staticmethod
    def stand_ins() -> list[str]:
        """Which parts are not SGLang's, and tensors that no adapter knows."""
        return [*PUBLISHED.stand_ins(), *(f"metadata.{name} (no adapter knows it)" for name in sorted(_unknown))]


@PUBLISHED.adapter
class v0_5_8(Sglang):  # noqa: N801
    """The NSA backend of 0.5.8, which trusts its host mirror."""

    layout = SglangLayout(
        version="0.5.8",
        names="nsa",
        module="nsa_backend",
        multi_step="NativeSparseAttnMultiStepBackend",
        single_step="NativeSparseAttnBackend",
        real=_attention("nsa_backend", "nsa.nsa_backend_mtp_precompute", "nsa.utils", "sglang.srt.environ"),
    )
    steps, one_step = OlderSteps, OlderStep
    modes = (*Sglang.modes, "DRAFT_EXTEND")
    roles: ClassVar = {**Sglang.roles, "draft_extend": ("DRAFT_EXTEND",)}
    step_backends: ClassVar = {**Sglang.step_backends, "draft_extend": "1"}
    mirrors: ClassVar = {"graph": ("equal",), "eager": ("equal",)}
    padding: ClassVar = {"DRAFT_EXTEND": Padding(accept_length="all")}
    absent: ClassVar = {"DRAFT_EXTEND_V2": ("paged_mqa_schedule_metadata",)}  # left to the indexer
    own_fields = (
        OwnField("paged_mqa_schedule_metadata", mqa_schedule_of_live_rows, ("DRAFT_EXTEND",)),
        OwnField("flashmla_metadata", flashmla_of_live_rows, ("EXTEND", "DRAFT_EXTEND")),
        OwnField(
            "flashmla_num_splits", flashmla_splits_of_live_rows, ("EXTEND", "DRAFT_EXTEND"), dead=behind_last_token
        ),
    )
    waivers = (
        *(Waiver("DRAFT_EXTEND", name, TAIL, behind_last_token, in_graph=True) for name in _LENGTHS),
        *(Waiver(mode, name, NEGATIVE, of_negative_lengths)
          for mode in ("DRAFT_EXTEND", "DRAFT_EXTEND_V2") for name in _LENGTHS),
    )  # fmt: skip


class _Dsa(Sglang):
    """What the DSA backends declare: the mirror may lie in graphs, and two more fields."""

    steps, one_step = TodaysSteps, TodaysStep
    unread = (*Sglang.unread, "indexer_seq_lens")
    mirrors: ClassVar = {"eager": ("equal", "absent"), "EXTEND": ("equal",)}
    own_fields: ClassVar[tuple[OwnField, ...]] = (
        OwnField(
            "paged_mqa_ctx_lens_2d",
            lengths_in_a_column,
            ("DECODE", "IDLE", "TARGET_VERIFY", "DRAFT_EXTEND_V2"),
            (Axis.ROW, Axis.ENTRY),
        ),
        OwnField("topk_v2_plan", lengths_of_plan, axes=(Axis.ROW,)),
    )


def _dsa_layout(version: str, real: tuple[str, ...], kernels: tuple[str, ...]) -> SglangLayout:
    everywhere = ("dsa_backend", "dsa.dsa_backend_mtp_precompute", "dsa.dsa_topk_backend", "dsa.utils")
    real = _attention(*everywhere, "sglang.srt.environ", *real)
    return SglangLayout(
        version=version,
        names="dsa",
        module="dsa_backend",
        multi_step="DeepseekSparseAttnMultiStepBackend",
        single_step="DeepseekSparseAttnBackend",
        real=real,
        kernels=_attention(*kernels),
    )


@PUBLISHED.adapter
class v0_5_15(_Dsa):  # noqa: N801
    """The DSA backend of 0.5.15."""

    layout = _dsa_layout("0.5.15", ("utils",), ("triton_ops.dsa_metadata", "triton_ops.pad"))


@PUBLISHED.adapter
class v0_5_23(_Dsa):  # noqa: N801
    """The DSA backend of 0.5.23."""

    layout = _dsa_layout(
        "0.5.23",
        ("dsa.dsa_metadata_manager", "dsa.dsa_backend_kpool"),
        ("sglang.kernels.ops.attention.dsa.metadata", "sglang.kernels.ops.attention.pad"),
    )


# Lengths from which on clusters may take a row, and up to how many rows of such lengths they do so; on Hopper.
PLANNED_LENGTHS = ((65536, 30), (98304, 45), (131072, 60), (196608, 80), (262144, 112), (393216, 128))
PLANNED_BATCHES = range(31, 513)  # rows: a plan is made for no other batch


def plan_of_lengths(expected: Metadata, call: Call) -> torch.Tensor:
    """The first row of top-k's plan: how long a row must be for the clusters of Hopper to take it, and how many are.

    The rows behind it list those rows in no fixed order. Source: ``topk_plan_cluster`` in
    ``sglang/kernels/jit/csrc/deepseek_v4/topk_v2.cuh``.
    """
    lengths = expected.seqlens_expanded
    threshold = PLANNED_LENGTHS[-1][0]
    for length, most in reversed(PLANNED_LENGTHS):
        if int((lengths > length).sum()) > most:
            break
        threshold = length
    plan = torch.zeros(len(lengths) + 1, 2, dtype=torch.int32, device=lengths.device)
    plan[0, 0], plan[0, 1] = threshold, (lengths > threshold).sum()
    return plan


def behind_the_plan(call: Call, field: Field, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """All but the first row, and that as well for batches that clusters never serve: nothing is written for them."""
    mask = np.ones(shape, dtype=np.bool_)
    mask[0] = shape[0] - 1 not in PLANNED_BATCHES
    return mask


class v0_5_23_on_a_gpu(v0_5_23):  # noqa: N801
    """0.5.23 with its CUDA kernels, which nvcc builds on first use, and DeepGEMM's own schedule, on a Hopper GPU.

    It needs sgl-deep-gemm 0.1.4, apache-tvm-ffi 0.1.11 and msgspec. FlashMLA's schedule stays a stand-in.
    """

    layout = replace(
        v0_5_23.layout,
        real=(
            *v0_5_23.layout.real,
            "sglang.kernels.jit",
            "sglang.kernels.jit.utils.*",
            *(f"sglang.kernels.ops.attention.dsv4.{name}" for name in ("topk", "candidate_table", "utils")),
            "sglang.kernels.ops.attention.dsa.fused_metadata_copy",
        ),
        installed=("deep_gemm",),
    )
    sizes: ClassVar = {
        **_Dsa.sizes,
        "max_context_len": (*_Dsa.sizes["max_context_len"], 65600),  # more than the plan's shortest long rows
        "paged_mqa_num_sms": (132,),
    }
    own_fields = (
        *(own for own in _Dsa.own_fields if own.name != "topk_v2_plan"),
        OwnField("topk_v2_plan", plan_of_lengths, axes=(Axis.FLAT, Axis.ENTRY), dead=behind_the_plan),
    )


def __getattr__(name: str) -> type[Sglang]:
    """``installed`` and ``nearest``: see ``Package.chosen``."""
    return PUBLISHED.chosen(name)
