"""Mutation targets in ``optimized/`` that several bugs share."""

from __future__ import annotations

STEPS = "nsa_oracle.optimized.multi_step:MultiStepBackend"

FORWARD = "nsa_oracle.optimized.layer:SparseAttention.forward"
STORE = "nsa_oracle.optimized.kernels.kv_cache:store_cache_kernel"
QUANTIZE = "nsa_oracle.optimized.kernels.kv_cache:quantize"
TO_E4M3 = "nsa_oracle.optimized.kernels.fp8:to_e4m3_bits"
INDEXER = "nsa_oracle.optimized.kernels.indexer:indexer_logits_kernel"
FILTER = "nsa_oracle.optimized.kernels.topk:topk_filter_kernel"
TOPK = "nsa_oracle.optimized.kernels.topk:topk_kernel"
SELECT = "nsa_oracle.optimized.kernels.topk:select"
ATTEND = "nsa_oracle.optimized.kernels.attention:sparse_mla_kernel"
FETCH_ON_HOPPER = "nsa_oracle.optimized.kernels.attention_hopper:fetch_quantised_keys"
LOAD_KEYS = "nsa_oracle.optimized.kernels.attention:load_keys"
RESULT = "nsa_oracle.optimized.kernels.attention:write_result"
COMBINE = "nsa_oracle.optimized.kernels.attention:sparse_mla_combine_kernel"

STEP = "nsa_oracle.optimized.multi_step:SingleStepBackend"
