"""Mistakes in the stages of a layer, and in what judged code leaves changed in torch."""

from __future__ import annotations

from collections.abc import Iterator

from tests.support.adapter_mistakes.mistake import FILE, PASSES, Mistake, field, init, layer, layer_class


def layers() -> Iterator[Mistake]:
    """The layer and its stages."""
    for name, weaker, says in (
        ("a list", "['out']", ("weaker must map stages to a Strictness; it is a list",)),
        ("a text", "{'out': 'bound'}", ("weaker: 'out' must be an nsa_oracle.harness.protocol.Strictness",)),
        ("unknown stage", "{'output': Strictness.BOUND}", ("weaker: there is no stage 'output'; did you mean out?",)),
        (
            "not for this stage",
            "{'out': Strictness.SAME_SET}",
            ("weaker: 'out' cannot be SAME_SET", "it fits topk_indices"),
        ),
        ("of the cache", "{'kv_cache': Strictness.BOUND}", ("weaker: 'kv_cache' cannot be BOUND",)),
        ("the class", "Strictness", ("weaker must map stages to a Strictness",)),
    ):
        yield layer_class(f"weaker: {name}", f"class Mine(Layer):\n    weaker = {weaker}\n", *says)
    yield layer_class(
        "layer of more",
        "class Mine(Layer):\n    def __init__(self, c, a, s): pass\n",
        "missing a required argument: 's'",
    )
    yield layer_class("layer is None", "def Mine(c, a): Layer(c, a)\n", "returned None", "return the layer")
    yield layer_class(
        "layer is a class", "def Mine(c, a): return Layer\n", "returned the class SparseAttention", "instance"
    )
    yield layer_class(
        "layer without stages", "class Mine:\n    def __init__(self, c, a): pass\n", "has none of the methods"
    )
    yield layer_class(
        "layer with a misspelt stage",
        "class Mine:\n    def __init__(self, c, a): pass\n    def sparse_mle(self, *a): pass\n",
        "has none of the methods",
        "it has sparse_mle: did you mean sparse_mla?",
    )
    yield layer_class(
        "stage is a number",
        "class Mine:\n    sparse_mla = 3\n    def __init__(self, c, a): pass\n",
        "Mine.sparse_mla is not a method",
    )
    yield layer_class(
        "layer: modes",
        "class Mine(Layer):\n    modes = ('EXTEND', 'decode')\n",
        "there is no decode; did you mean DECODE?",
    )
    yield layer_class(
        "layer: sizes",
        "class Mine(Layer):\n    sizes = {'heads': (2,)}\n",
        "neither a layer nor its setup has 'heads'",
        "did you mean",
    )
    yield layer_class(
        "stage of fewer",
        "class Mine(Layer):\n    def sparse_mla(self, q, kv_cache): pass\n",
        "TypeError",
        "Mine.sparse_mla() takes 3",
    )
    yield layer_class(
        "layer raises",
        "class Mine(Layer):\n    def __init__(self, c, a): raise RuntimeError('no kernel')\n",
        "RuntimeError",
        FILE + ":11",
        "no kernel",
    )
    yield layer(
        "logits None", "indexer_logits", "return None", "logits", "Mine.indexer_logits", "got None, expected a tensor"
    )
    yield layer(
        "logits in a tuple",
        "indexer_logits",
        "return right,",
        "Mine.indexer_logits",
        "got a tuple of 1, expected a tensor",
    )
    yield layer(
        "logits in half",
        "indexer_logits",
        "return right.half()",
        "Mine.indexer_logits",
        "torch.float16, expected torch.float32",
    )
    yield layer("logits too narrow", "indexer_logits", "return right[:, :-1]", "Mine.indexer_logits", "wrong shape")
    yield layer("logits elsewhere", "indexer_logits", "return right.to('meta')", "Mine.indexer_logits", "wrong device")
    yield layer(
        "logits sparse",
        "indexer_logits",
        "return right.to_sparse()",
        "wrong result: logits",
        "got a tensor of layout torch.sparse_coo, expected a tensor of layout torch.strided",
    )
    yield layer(
        "positions sparse",
        "topk_indices",
        "return right.to_sparse()",
        "wrong result: topk_indices",
        "torch.sparse_coo, expected",
        names="topk_indices",
    )
    yield layer("stops", "sparse_mla", "raise StopIteration", "layer raised: StopIteration", FILE + ":13")
    yield layer(
        "stops in a graph only",
        "forward",
        "assert a[2].max_seq_len_k == 20 or next(iter(()))\n        return right",
        "layer raised: StopIteration",
        FILE + ":13",
    )
    yield layer("logits wrong", "indexer_logits", "return right + 1", "wrong value: logits", names="logits")
    yield layer(
        "positions None",
        "topk_indices",
        "return None",
        "topk_indices",
        "got None, expected a tensor",
        names="topk_indices",
    )
    yield layer(
        "positions in int64",
        "topk_indices",
        "return right.long()",
        "wrong dtype",
        "torch.int64, expected torch.int32",
        names="topk_indices",
    )
    yield layer(
        "slots in int64",
        "topk_transform_paged",
        "return right.long()",
        "Mine.topk_transform_paged",
        "torch.int64, expected torch.int32",
    )
    yield layer(
        "slots are the logits",
        "topk_transform_paged",
        "return a[0]",
        "Mine.topk_transform_paged",
        "torch.float32, expected torch.int32",
    )
    yield layer("out alone", "sparse_mla", "return right[0]", "Mine.sparse_mla", "a tuple (out, lse)")
    yield layer(
        "three results",
        "sparse_mla",
        "return *right, None",
        "Mine.sparse_mla",
        "a tuple of 3, expected a tuple (out, lse)",
    )
    yield layer(
        "no lse", "sparse_mla", "return right[0], None", "Mine.sparse_mla", "lse", "got None, expected a tensor"
    )
    yield layer("lse first", "sparse_mla", "return right[1], right[0]", "Mine.sparse_mla", "wrong")
    yield layer(
        "out in float32",
        "sparse_mla",
        "return right[0].float(), right[1]",
        "Mine.sparse_mla",
        "torch.float32, expected torch.bfloat16",
    )
    yield layer("out of one row less", "sparse_mla", "return right[0][:-1], right[1]", "Mine.sparse_mla", "wrong shape")
    yield layer("writes its query", "sparse_mla", "a[0].zero_(); return right", "input modified: q", names="q")
    yield layer(
        "writes the cache",
        "indexer_logits",
        "a[2].zero_(); return right",
        "input modified: index_k_cache",
        names="index_k_cache",
    )
    yield layer("store writes its keys", "store_cache", "a[1].k.zero_()", "input modified: k", names="k")
    yield layer_class(
        "store does nothing",
        "class Mine(Layer):\n    def store_cache(self, caches, inputs): pass\n",
        "wrong value: kv_cache",
        names="kv_cache",
    )
    yield layer("forward None", "forward", "return None", "Mine.forward", "AttentionOutputs")
    yield layer("forward a tuple", "forward", "return tuple(vars(right).values())", "Mine.forward", "AttentionOutputs")
    yield layer(
        "raises for many",
        "sparse_mla",
        "assert False, 'only 64 heads'",
        "AssertionError",
        FILE + ":13",
        "only 64 heads",
    )
    yield layer("exits", "sparse_mla", "sys.exit(1)", "SystemExit", FILE + ":13")
    yield layer(
        "raises in a graph only",
        "forward",
        "assert a[2].max_seq_len_k != 20, 'width'; return right",
        "AssertionError",
        FILE + ":13",
    )
    yield layer(
        "item in a graph",
        "forward",
        "right.out.sum().item(); return right",
        "capture rejected",
        "item",
        FILE + ":13",
        names="{module}",
    )
    yield layer(
        "cpu in a graph", "forward", "right.out.cpu(); return right", "capture rejected", FILE + ":13", names="{module}"
    )
    # What is right stays right, however it came about.
    yield layer(
        "with a gradient",
        "sparse_mla",
        "return right[0] * torch.ones((), dtype=right[0].dtype, requires_grad=True), right[1]",
        PASSES,
    )
    yield layer(
        "keeps its result, overwrites it",
        "topk_indices",
        "old = getattr(self, 'old', None); self.old = right\n        "
        "if old is not None: old.fill_(-7)\n        return right",
        PASSES,
    )
    yield layer("a list for a tuple", "sparse_mla", "return list(right)", PASSES)
    yield layer("prints", "sparse_mla", "print('here'); return right", PASSES)
    yield layer("warns", "sparse_mla", "import warnings; warnings.warn('slow'); return right", PASSES)


def global_state() -> Iterator[Mistake]:
    """State of the process that judged code leaves changed: an error where other code would suffer, else put back."""
    dtype = "torch.set_default_dtype(torch.float64)"
    says = "global state left changed: torch.get_default_dtype()", "got torch.float64, expected torch.float32"
    names = "torch.get_default_dtype"
    yield Mistake("default dtype in the constructor", init("", dtype).source, says, names=names)
    yield field("default dtype in a call", f"{dtype}; return metadata", *says, names=names)
    yield layer("default dtype in a stage", "sparse_mla", f"{dtype}; return right", *says, names=names)
    yield layer("default dtype in a graph", "forward", f"{dtype}; return right", *says, names=names)
    device = "torch.set_default_device('meta')"
    says = "global state left changed: torch.get_default_device()", "got meta, expected cpu"
    yield field("default device in a call", f"{device}; return metadata", *says, names="torch.get_default_device")
    yield layer(
        "default device in a stage",
        "indexer_logits",
        f"{device}; return right",
        *says,
        names="torch.get_default_device",
    )
    mode = "self.mode = torch.inference_mode(); self.mode.__enter__()"
    says = "global state left changed: torch.is_inference_mode_enabled()", "got True, expected False"
    yield field("inference mode in a call", f"{mode}; return metadata", *says, names="torch.is_inference_mode_enabled")
    yield layer(
        "inference mode in a stage",
        "sparse_mla",
        f"{mode}; return right",
        *says,
        names="torch.is_inference_mode_enabled",
    )
    says = "global state left changed: os.getcwd()", "got /, expected"
    yield Mistake(
        "current folder in the constructor", init("", "import os; os.chdir('/')").source, says, names="os.getcwd"
    )
    yield layer(
        "current folder in a stage", "sparse_mla", "import os; os.chdir('/'); return right", *says, names="os.getcwd"
    )
    sums = "cumsum = torch.cumsum; torch.cumsum = lambda *numbers, **options: cumsum(*numbers, **options) + 1"
    says = "global state left changed: torch.cumsum: got replaced by", "expected torch's own function"
    yield Mistake("a function of torch in the constructor", init("", sums).source, says, names="in <lambda>")
    none = "torch.Tensor.any = lambda self, *dim, **options: torch.zeros((), dtype=torch.bool)"
    says = "global state left changed: torch.Tensor.any: got replaced by", "expected torch's own function"
    yield field("a method of tensors in a call", f"{none}; return metadata", *says, names="in <lambda>")
    says = "global state left changed: builtins.len: got replaced", "expected Python's own"
    none = "import builtins; builtins.len = None"
    yield Mistake("a function of Python in the constructor", init("", none).source, says, names="builtins.len")
    yield field("a function of Python in a call", f"{none}; return metadata", *says, names="builtins.len")
    yield layer("a function of Python in a stage", "sparse_mla", f"{none}; return right", *says, names="builtins.len")
    for name, body in {
        "seed": "torch.manual_seed(3)",
        "denormals": "torch.set_flush_denormal(True)",
        "threads": "torch.set_num_threads(3)",
        "no gradients": "torch.set_grad_enabled(False)",
        "deterministic": "torch.use_deterministic_algorithms(True)",
        "precision": "torch.set_float32_matmul_precision('medium')",
    }.items():
        yield init(f"changes {name} in the constructor", body, PASSES)
        yield layer(f"changes {name} in a stage", "sparse_mla", f"{body}; return right", PASSES)
