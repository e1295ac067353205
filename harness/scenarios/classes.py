"""The names of the boundary classes: corners of the scenario space, which ``coverage`` finds in a scenario.

``all_classes`` lists all of them. ``goals`` has a way to each, so that a run can ask for all.
"""

from __future__ import annotations

from nsa_oracle.harness.scenarios.scenario import GRAPH_MODES
from nsa_oracle.harness.scenarios.setup import Drive, Mirror, Order, PageLayout, Regime, Reuse
from nsa_oracle.harness.scenarios.switches import Switches
from nsa_oracle.reference.types import ForwardMode, KVCacheDtype, StepSemantics

COPY_CHUNK = 2048  # tokens; kernels copy a longer row in several pieces
MQA_SEGMENT = 256  # tokens that the paged-MQA schedule deals at once
FLASHMLA_BLOCK = 64  # tokens that the FlashMLA schedule deals at once
MANY_STEPS = 4
MANY_HEADS = 32
MANY_KEYS = 512  # kernels cut the keys of a row into parts of about as many, and join the results of the parts
MANY_SUMMED = f"more than {MANY_KEYS} keys that count"
WIDE = 16_384  # tokens; top-k kernels sort what is wider in several passes
MANY_NEW = 128  # rows; layers divide a longer prefill into chunks
LONG_PREFILL = f"prefill of more than {MANY_NEW} rows"

PREFILLS = ("cached prefix extended", "prefill from the first token", "prefill of several requests")
AROUND_K = ("prefill beyond K", "prefill within K", "K between the lengths")
PAIRS = (  # two calls of which the second shows what the first left behind
    "same batch on other pages",
    "same batch on other pages, eager",
    "row grown on other pages",
    "eager after the longest left",
    "small after large in one bucket",
    "smaller draft extend, other accepts",
)
# Two replays of one graph that differ in one thing alone, which a backend may have left out of what it compares.
ONE_DIFFERENCE = (
    *("same lengths, other accepts", "other pages between the same ends"),
    "a length grown within its page",
)
MIRROR_IN_ANOTHER_ORDER = "host mirror in another order"  # a backend may believe one whose sum or ends agree
MANY_REPLAYS = 128
OFTEN_REPLAYED = f"more than {MANY_REPLAYS} replays of one graph"
ROWS_OF_STEPS = (
    *(f"replay {mode.value}, N > 1" for mode in GRAPH_MODES),
    *(f"eager {mode.value}, N > 1" for mode in ForwardMode if mode is not ForwardMode.IDLE),
)
CYCLES = ("drafts behind a verification", "prefill between replays")
MIXED = "prefill mixed with decodes"
PLAIN_PREFILL = "prefill of several strided requests, no switch"  # code that kernels replace has strides of its own
PRODUCTION_INDEX_SIZES = {"index_n_heads": 64, "index_head_dim": 128, "page_size": 64}
PRODUCTION_INDEX = "64 index heads of 128, pages of 64"  # for which a layer may have a kernel of its own
COMPANY = ("second backend", "second backend, alike", "prepared twice")
IDLE_IN_COMPANY = "second backend, idle replay"
IN_COMPANY = (  # buffers may be shared in one mode only
    *(f"second backend, {mode.value} replay" for mode in GRAPH_MODES),
    IDLE_IN_COMPANY,
    *(f"second backend, {mode.value} eagerly" for mode in ForwardMode),
)
IDLE_AFTER_SEGMENTS = "graph idle after several segments"
# Of several steps that one call prepares, which may take another way in one mode. The goals' case of eager DECODE is
# driven step by step.
NO_MIRROR = (
    *(f"no host mirror, {mode.value} replay" for mode in GRAPH_MODES),
    *(f"no host mirror, {mode.value} eagerly" for mode in ForwardMode if mode.value not in ("DECODE", "IDLE")),
)
NO_NEW_TOKEN = (
    *("prefill without a new token", "prefill of cached tokens alone"),
    "prefill without a new token between others",
)
FEWER_STEPS = ("fewer draft steps, replay", "fewer draft steps, eager")
SLOTS_BY_STEP = "slots of several steps in one tensor"
OVER_COMMITTED = "more tokens than slots"
SEGMENTS = (
    *("steps cross a paged-MQA segment", "steps cross a FlashMLA block"),
    *("N >= 4 steps cross a paged-MQA segment", "N >= 4 steps cross a FlashMLA block"),
    "N >= 4 multi-step replay of several paged-MQA segments",
)
# Classes that metadata alone visits as well, but that a layer must visit too: it has state of its own.
ALSO_WITH_A_LAYER = (
    *(*ROWS_OF_STEPS, *PREFILLS, *AROUND_K, *PAIRS[:1], *PAIRS[2:5], *COMPANY, OVER_COMMITTED),
    *(*NO_NEW_TOKEN, MIXED, FEWER_STEPS[1]),
)

LAYER_CLASSES: tuple[str, ...] = (
    *(f"content {regime.value}" for regime in Regime),
    *(f"cache {dtype.value}" for dtype in KVCacheDtype),
    *("far slots", "more heads than one", "more keys than K", "fewer keys than K", "rows without a key"),
    *(MANY_SUMMED, "ordinary numbers in an FP8 cache"),
    *("rows of more than 16,384 tokens", "32 heads or more, FP8 cache", "rows of slot -1", LONG_PREFILL),
    PRODUCTION_INDEX,
    *("rows behind the metadata, replay", "rows behind the metadata, eager", SLOTS_BY_STEP),
    *(f"layer: {name}" for name in ALSO_WITH_A_LAYER),
)
METADATA_CLASSES: tuple[str, ...] = (
    *(f"replay {mode.value}" for mode in GRAPH_MODES),
    *(f"eager {mode.value}" for mode in ForwardMode),
    *("batch of 5..8", "batch of more than 8"),
    *("batch empty", "batch padded", "batch fills bucket", "batch outgrows buckets", "padding of length 0"),
    *("eager call padded", "eager IDLE of padding"),
    *("graph empty after requests", "full graph, nothing accepted"),
    *("length 1", "length P-1", "length P", "length P+1", "length K-1", "length K", "length K+1", "length limit"),
    *("accept 0", "accept 1", "accept partial", "accept all", "accept mixed", "accept none at all"),
    "draft extend over 8 tokens",
    *("N 1", "N 2..8", "N over 8", "nd 1", "nd 2..8", "nd over 8"),
    *("page size 1", "page size 16", "page size 32", "page size 64", "W not a multiple of P"),
    *(f"pages {layout.value}" for layout in PageLayout),
    *("shared prefix", "prefix re-mapped", "cached prefix extended"),
    *("int32 lengths", "int64 lengths", "strided inputs", "wide req_to_token", "far req_to_token"),
    *(f"mirror {mirror.value}" for mirror in Mirror),
    *(f"order {order.value}" for order in Order),
    *(f"drive {drive.value}" for drive in Drive),
    *(f"steps {semantics.value}" for semantics in StepSemantics),
    *("several buckets", "small after large", "small, large, small", "mode change", "eager between replays"),
    *("request finishes", "request joins between replays", "pool row recycled", "page recycled"),
    *("paged MQA schedule", "FlashMLA schedule", "several copy chunks"),
    *(*ROWS_OF_STEPS, "eager IDLE, N > 1", *PREFILLS[1:], *AROUND_K, *PAIRS, *SEGMENTS),
    *(f"reuse {reuse.value}" for reuse in Reuse),
    *(*COMPANY, *IN_COMPANY, *NO_MIRROR),
    *(*CYCLES, *ONE_DIFFERENCE, MIRROR_IN_ANOTHER_ORDER, OFTEN_REPLAYED),
    *(OVER_COMMITTED, *NO_NEW_TOKEN, MIXED, *FEWER_STEPS, IDLE_AFTER_SEGMENTS, PLAIN_PREFILL),
)


def switch_classes(switches: Switches) -> tuple[str, ...]:
    """One class per switch and one for cases without switches; none for a backend that has no switches."""
    return (*(f"switch {name}" for name in switches.names), "no switch") if switches.names else ()


def all_classes(switches: Switches) -> tuple[str, ...]:
    """Every class that cases of a backend with ``switches`` can visit, in report order."""
    return (*METADATA_CLASSES, *switch_classes(switches), *LAYER_CLASSES)
