"""Mistakes that authors of backends and layers make: a module's source for each, and what must be said about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PASSES = "passes"  # looks like a mistake, and is right
HEADER = """\
import dataclasses, sys, types
from typing import Any
import numpy as np
import torch
from nsa_oracle.harness.protocol import Strictness
from nsa_oracle.optimized.layer import SparseAttention as Layer
from nsa_oracle.reference.multi_step import MultiStepBackend as Backend, SingleStepBackend as Step
from nsa_oracle.reference.types import AttentionOutputs, Metadata

"""
# A backend that lets a row put something in the place of its metadata, or of one field of it.
CHANGING = """
class Mine(Backend):
    def init_forward_metadata(self, forward_batch):
        super().init_forward_metadata(forward_batch)
        self.change_all()

    def init_forward_metadata_capture_cuda_graph(self, forward_batch):
        super().init_forward_metadata_capture_cuda_graph(forward_batch)
        self.change_all()

    def init_forward_metadata_replay_cuda_graph(self, forward_batch, bs):
        super().init_forward_metadata_replay_cuda_graph(forward_batch, bs)
        self.change_all()

    def change_all(self):
        for step in self.attn_backends:
            step.forward_metadata = self.change(step.forward_metadata)

    def change(self, metadata):
        {body}
"""


@dataclass(frozen=True)
class Mistake:
    """One mistake. says: parts of the line that the author sees, or PASSES. names: how the line names their code."""

    name: str
    source: str
    says: tuple[str, ...]
    spec: str = "{module}:Mine"
    is_layer: bool = False
    names: str = "Mine"

    @property
    def passes(self) -> bool:
        return self.says == (PASSES,)


def backend(name: str, body: str, *says: str, spec: str = "{module}:Mine", names: str = "Mine") -> Mistake:
    return Mistake(name, body, says, spec, names=names)


def init(name: str, body: str, *says: str) -> Mistake:
    """A backend whose constructor ends with ``body``."""
    source = f"class Mine(Backend):\n    def __init__(self, c, r):\n        super().__init__(c, r)\n        {body}\n"
    return Mistake(name, source, says, names=code_of(says))


def code_of(says: tuple[str, ...]) -> str:
    """How a line names the author's code: by file and line where it tells of one, else by class."""
    return "{module}.py:" if any("{module}.py:" in part for part in says) else "Mine"


def field(name: str, body: str, *says: str, names: str = "Mine") -> Mistake:
    """A backend that replaces its metadata or a field of it."""
    return Mistake(name, CHANGING.format(body=body), says, names=names)


def whole(name: str, body: str, *says: str, names: str = "") -> Mistake:
    """A class attribute of a backend."""
    return Mistake(name, f"class Mine(Backend):\n    {body}\n", says, names=names or code_of(says))


def layer(name: str, stage: str, body: str, *says: str, names: str = "") -> Mistake:
    """A layer, a stage of which is ``body``; ``right`` is the result of the reference."""
    source = f"class Mine(Layer):\n    def {stage}(self, *a):\n        right = super().{stage}(*a)\n        {body}\n"
    return Mistake(name, source, says, is_layer=True, names=names or code_of(says))


def layer_class(name: str, source: str, *says: str, names: str = "", spec: str = "{module}:Mine") -> Mistake:
    return Mistake(name, source, says, spec, is_layer=True, names=names or code_of(says))


GOOD = "class Mine(Backend): pass\n"
FILE = "{module}.py"


def naming() -> Iterator[Mistake]:
    """The name on the command line, and what happens at import."""
    yield backend("a path", GOOD, "write {module}:Mine", spec="../{module}:Mine", names="{module}")
    yield backend("a path in a folder", GOOD, "write sub.{module}:Mine", spec="sub/{module}.py:Mine", names="{module}")
    yield backend("a file", GOOD, "write {module}:Mine", spec="{module}.py:Mine", names="{module}")
    yield backend("no attribute", GOOD, "is not of the form module:attribute", spec="{module}", names="{module}")
    yield backend("empty attribute", GOOD, "is not of the form module:attribute", spec="{module}:", names="{module}")
    yield backend("empty module", GOOD, "is not of the form module:attribute", spec=":Mine")
    yield backend(
        "a dot for the colon", GOOD, "is not of the form", "{module}:Mine", spec="{module}.Mine", names="{module}"
    )
    yield backend("nothing", GOOD, "is not of the form module:attribute", spec="", names="backend ''")
    yield backend("two colons", GOOD, "has no attribute Mine:x", spec="{module}:Mine:x")
    yield backend("a relative module", GOOD, "write {module}:Mine", spec=".{module}:Mine", names="{module}")
    yield backend("blanks", GOOD, "write {module}:Mine", spec=" {module} : Mine", names="{module}")
    yield backend("escapes", GOOD, "cannot import", spec="\x1b[2J{module}:Mine", names="{module}")
    yield backend(
        "misspelt class", GOOD, "has no attribute Mien; did you mean Mine?", spec="{module}:Mien", names="{module}"
    )
    yield backend(
        "wrong case", GOOD, "has no attribute mine; did you mean Mine?", spec="{module}:mine", names="{module}"
    )
    yield backend("nothing alike", "x = 1\n", "has no attribute Mine", names="{module}")
    yield backend(
        "a number", "Mine = 3\n", "is not callable; name a class or function of (config, req_to_token), not an int"
    )
    yield backend(
        "an instance",
        "class C: pass\nMine = C()\n",
        "is not callable; name a class or function of (config, req_to_token), not a C",
    )
    yield backend(
        "a module", "Mine = sys\n", "is not callable; name a class or function of (config, req_to_token), not a module"
    )
    yield backend("SyntaxError", "def Mine(:\n", "SyntaxError", "(" + FILE, names="{module}")
    yield backend("IndentationError", "def Mine():\npass\n", "IndentationError", FILE, names="{module}")
    yield backend(
        "raises at import", "1 / 0\n", "raised ZeroDivisionError: division by zero", FILE + ":10", names="{module}"
    )
    yield backend("exits at import", "sys.exit(3)\n", "raised SystemExit: 3", FILE + ":10", names="{module}")
    yield backend("AttributeError at import", "torch.tensr\n", "raised AttributeError", FILE + ":10", names="{module}")
    yield backend(
        "imports what is not there", "import abcent\n", "No module named 'abcent'", FILE + ":10", names="{module}"
    )
    yield backend(
        "imports a name that is not there",
        "from math import tow\n",
        "cannot import name 'tow'",
        FILE + ":10",
        names="{module}",
    )
    yield backend("imports itself", "from {module} import Mine\n", "circular import", FILE, names="{module}")
    yield backend(
        "module of another name", GOOD, "cannot import absent_{module}", "PYTHONPATH", spec="absent_{module}:Mine"
    )
    yield backend(
        "lines in a message", "raise ValueError('a\\nb\\x1b')\n", "raised ValueError: a b", FILE, names="{module}"
    )


def construction() -> Iterator[Mistake]:
    """The constructor, and which methods its result has."""
    yield backend(
        "too many arguments", "class Mine:\n    def __init__(self, c, r, s): pass\n", "missing a required argument: 's'"
    )
    yield backend(
        "too few arguments", "class Mine:\n    def __init__(self, c): pass\n", "too many positional arguments"
    )
    yield backend(
        "keyword arguments", "class Mine:\n    def __init__(self, *, c, r): pass\n", "too many positional arguments"
    )
    yield backend("returns None", "def Mine(c, r):\n    Backend(c, r)\n", "returned None", "return the backend")
    yield backend(
        "returns a class", "def Mine(c, r): return Backend\n", "returned the class MultiStepBackend", "instance"
    )
    yield backend("returns a number", "def Mine(c, r): return 3\n", "lacks int.init_forward_metadata")
    yield init(
        "constructor raises",
        "raise RuntimeError('no stream')",
        "backend raised: RuntimeError",
        FILE + ":13",
        "no stream",
    )
    yield init("constructor exits", "sys.exit(0)", "backend raised: SystemExit", FILE + ":13")
    yield backend("single step alone", "Mine = Step\n", "lacks SingleStepBackend.attn_backends", names="{module}:Mine")
    without = "class Mine:\n    def __init__(self, c, r): self.attn_backends = []\n"
    yield backend("no methods", without, "lacks Mine.init_forward_metadata")
    misspelt = without + "".join(
        f"    def {name}(self, *a): pass\n"
        for name in ("init_forward_metdata", "init_cuda_graph_state", "init_forward_metadata_capture_cuda_graph")
    )
    yield backend("misspelt method", misspelt, "lacks Mine.init_forward_metadata", "it has init_forward_metdata")
    yield whole("method is None", "init_cuda_graph_state = None", "Mine.init_cuda_graph_state is not a method")
    yield whole(
        "method is a property",
        "init_cuda_graph_state = property(lambda self: 3)",
        "Mine.init_cuda_graph_state is not a method",
    )
    yield whole(
        "property raises", "init_cuda_graph_state = property(lambda self: 1 // 0)", "ZeroDivisionError", FILE + ":11"
    )
    yield whole(
        "static method",
        "init_forward_metadata = staticmethod(lambda batch, more: None)",
        "TypeError",
        "init_forward_metadata",
        "missing 1 required",
    )
    yield whole(
        "method of no batch",
        "def init_forward_metadata(self): pass",
        "TypeError",
        "Mine.init_forward_metadata() takes 1",
    )
    yield whole(
        "method of more",
        "def init_forward_metadata(self, a, b): pass",
        "TypeError",
        "Mine.init_forward_metadata() missing 1",
    )
    yield whole(
        "other keyword",
        "def init_cuda_graph_state(self, max_bs): pass",
        "TypeError",
        "Mine.init_cuda_graph_state() takes 2",
    )
    yield whole(
        "coroutine", "async def init_forward_metadata(self, batch): pass", "Mine.init_forward_metadata is a coroutine"
    )
    yield whole(
        "capture raises",
        "def init_forward_metadata_capture_cuda_graph(self, b): raise KeyError('bs')",
        "KeyError",
        FILE + ":11",
        "'bs'",
    )
    yield whole(
        "replay raises",
        "def init_forward_metadata_replay_cuda_graph(self, b, bs): raise NotImplementedError",
        "NotImplementedError",
        FILE + ":11",
    )


def steps() -> Iterator[Mistake]:
    """``attn_backends``."""
    yield init("steps missing", "del self.attn_backends", "lacks Mine.attn_backends")
    yield init(
        "steps misspelt",
        "self.atn_backends = self.__dict__.pop('attn_backends')",
        "lacks Mine.attn_backends",
        "it has atn_backends",
    )
    yield init(
        "steps are None",
        "self.attn_backends = None",
        "attn_backends must be a list of single-step backends, not NoneType",
    )
    yield init(
        "steps are a generator",
        "self.attn_backends = (s for s in self.attn_backends)",
        "must be a list of single-step backends, not generator",
    )
    yield init(
        "steps are a dict",
        "self.attn_backends = dict(enumerate(self.attn_backends))",
        "must be a list of single-step backends, not dict",
    )
    yield init("one step too few", "self.attn_backends.pop()", "attn_backends", "got 1 step, expected 2 steps")
    yield init("one step too many", "self.attn_backends *= 2", "attn_backends", "got 4 steps, expected 2 steps")
    yield init("no steps", "self.attn_backends = []", "attn_backends", "got 0 steps, expected 2 steps")
    yield init("a step is None", "self.attn_backends[1] = None", "attn_backends[1] is None")
    yield init("a step is a class", "self.attn_backends[1] = Step", "attn_backends[1] is the class SingleStepBackend")
    # All steps of this case see the same metadata, so one object may stand for all of them.
    yield init("same step twice", "self.attn_backends = [self.attn_backends[0]] * 2", PASSES)
    bad = "class S:\n    pass\nclass Mine(Backend):\n    def __init__(self, c, r):\n        super().__init__(c, r)\n"
    yield backend(
        "steps without methods",
        bad + "        self.attn_backends = [S(), S()]\n",
        "lacks S.init_forward_metadata",
        names="S.init",
    )


def metadata() -> Iterator[Mistake]:
    """``forward_metadata`` and its fields."""
    shown = "Mine.attn_backends[0].forward_metadata"
    yield whole(
        "metadata never set",
        "def init_forward_metadata(self, batch): pass",
        shown,
        "init_forward_metadata",
        "was not set",
    )
    yield whole(
        "metadata never set for graphs",
        "def init_forward_metadata_capture_cuda_graph(self, b):\n        "
        "for s in self.attn_backends: s.forward_metadata = None",
        shown,
        "init_forward_metadata_capture_cuda_graph",
        "None",
    )
    yield field("metadata None", "return None", shown, "None", "init_forward_metadata")
    yield field(
        "metadata a dict", "return dict(vars(metadata))", shown, "a dict", "an object with the fields of Metadata"
    )
    yield field(
        "metadata a tuple",
        "return tuple(vars(metadata).values())",
        shown,
        "a tuple of",
        "an object with the fields of Metadata",
    )
    yield field("metadata of another class", "return types.SimpleNamespace(**vars(metadata))", PASSES)
    yield field(
        "metadata of other names",
        "return types.SimpleNamespace("
        "**{k.replace('cu_seqlens_k', 'cu_seqlen_k'): v for k, v in vars(metadata).items()})",
        shown,
        "cu_seqlens_k",
        "did you mean cu_seqlen_k?",
    )
    yield field(
        "metadata without a field",
        "other = dict(vars(metadata)); del other['page_table_1']; return types.SimpleNamespace(**other)",
        shown,
        "page_table_1",
    )
    yield field(
        "metadata without a scalar",
        "other = dict(vars(metadata)); del other['page_size']; return types.SimpleNamespace(**other)",
        shown,
        "page_size",
    )
    yield field("metadata with more", "metadata.more = 3; return metadata", PASSES)
    yield field("the class Metadata", "return Metadata", shown, "the class Metadata")
    prop = (
        "class S(Step):\n    @property\n    def forward_metadata(self): return self.metdata\n"
        "    @forward_metadata.setter\n    def forward_metadata(self, m): pass\n"
    )
    yield backend(
        "property raises AttributeError",
        prop + "class Mine(Backend):\n    def __init__(self, c, r):\n        super().__init__(c, r)\n"
        "        self.attn_backends = [S(c, r) for _ in self.attn_backends]\n",
        "AttributeError",
        FILE + ":12",
        "metdata",
        names="forward_metadata",
    )

    def change(name: str, key: str, value: str, *says: str) -> Mistake:
        return field(name, f"x = metadata.{key}; metadata.{key} = {value}; return metadata", *says, names=key)

    yield change(
        "a list for a tensor", "cu_seqlens_k", "x.tolist()", "missing field", "a list of 2", "a tensor of shape [2]"
    )
    yield change("a numpy array", "cu_seqlens_k", "x.numpy()", "a ndarray", "a tensor of shape [2]")
    yield change("None for a tensor", "seqlens_expanded", "None", "missing field", "None", "a tensor of shape")
    yield change("int64", "cache_seqlens_int32", "x.long()", "wrong dtype", "torch.int64, expected torch.int32")
    yield change("float", "nsa_cu_seqlens_k", "x.float()", "wrong dtype", "torch.float32, expected torch.int32")
    yield change("another device", "page_table_1", "x.to('meta')", "wrong device", "meta, expected cpu")
    yield change("rank 0", "cu_seqlens_k", "x.sum(dtype=torch.int32)", "wrong shape", "[], expected [2]")
    yield change("one rank more", "cache_seqlens_int32", "x[:, None]", "wrong shape", "[1, 1], expected [1]")
    yield change("too long", "cu_seqlens_q", "torch.nn.functional.pad(x, (0, 1))", "wrong shape")
    yield change("too short", "cu_seqlens_q", "x[:-1]", "wrong shape")
    # An address that moves is a fault in a graph alone, and strides are free: the probes copy by them.
    yield change(
        "not contiguous",
        "page_table_1",
        "torch.as_strided(torch.cat((x, x), 1), x.shape, (2 * x.shape[1], 1)) if not hasattr(self, 'kept') else x",
        "buffer moved after capture",
    )
    yield change("float for an int", "page_size", "float(x)", "wrong host scalar", "4.0, expected 4, an int")
    yield change("numpy for an int", "max_seq_len_k", "np.int64(x)", "wrong host scalar", "expected 8, an int")
    yield change(
        "tensor for an int", "max_seq_len_k", "torch.tensor(x)", "wrong host scalar", "tensor(8), expected 8, an int"
    )
    yield change("bool for an int", "max_seq_len_q", "True", "wrong host scalar", "True, expected 1, an int")
    yield change("text for an int", "page_size", "str(x)", "wrong host scalar", "'4', expected 4, an int")
    yield change("wrong int", "page_size", "x + 1", "wrong host scalar", "got 5, expected 4")
    yield change("many lines for an int", "page_size", "torch.zeros(40, 40)", "wrong host scalar", "expected 4, an int")
    yield change(
        "a field of another mode",
        "topk_indices_offset",
        "metadata.cu_seqlens_k",
        "does not have",
        "a tensor of shape [2], expected None",
    )


def declarations() -> Iterator[Mistake]:
    """``sizes`` and ``modes``."""
    for name, sizes, says in (
        ("a list of names", "['page_size']", ("sizes must map fields to allowed values",)),
        ("unknown size", "{'pagesize': (64,)}", ("no backend has 'pagesize'", "did you mean page_size?")),
        ("a size of a layer", "{'num_heads': (2,)}", ("no backend has 'num_heads'",)),
        ("number for a name", "{3: (2,)}", ("no backend has '3'",)),
        ("one number", "{'page_size': 64}", ("'page_size' must have a list or tuple of allowed values, not 64",)),
        ("text", "{'page_size': '64'}", ("must have a list or tuple",)),
        ("numbers as text", "{'page_size': ('64',)}", ("'page_size' cannot be 64", "must be a whole number")),
        ("no value", "{'page_size': ()}", ("'page_size' allows no value",)),
        ("negative", "{'page_size': (-64,)}", ("'page_size' cannot be -64", "at least 1")),
        ("too large", "{'page_size': (4096,)}", ("'page_size' cannot be 4096", "at most 1024")),
        ("true", "{'page_size': (True,)}", ("'page_size' cannot be True", "must be a whole number")),
        ("float", "{'page_size': (4.0,)}", ("'page_size' cannot be 4.0", "must be a whole number")),
        ("number for a flag", "{'strided': (1,)}", ("'strided' cannot be 1", "must be true or false")),
        ("unknown choice", "{'drive': ('both',)}", ("'drive' cannot be both; choose from multi_step, single_step",)),
        (
            "another page size",
            "{'page_size': (64,)}",
            ("page_size 4 is not among the sizes and modes that are declared",),
        ),
        (
            "impossible together",
            "{'max_context_len': (4,), 'num_steps': (8,)}",
            ("max_context_len 16 is not among the sizes",),
        ),
        ("the record", "{'inputs': (1,)}", ("name the fields of 'inputs' themselves",)),
        ("a generator", "{'page_size': (s for s in (4,))}", ("must have a list or tuple of allowed values",)),
    ):
        yield whole(f"sizes: {name}", f"sizes = {sizes}", *says, names="case.json" if "is not among" in says[0] else "")
    yield whole("sizes: unsorted, twice", "sizes = {'page_size': [64, 4, 4]}", PASSES)
    for name, modes, says in (
        ("unknown", "('PREFILL',)", ("there is no PREFILL; choose from", "EXTEND")),
        ("lower case", "('decode',)", ("there is no decode; did you mean DECODE?",)),
        ("one text", "'DECODE'", ("modes must be a list or tuple of modes, not DECODE",)),
        ("none", "()", ("modes allows no mode at all",)),
        ("a number", "3", ("modes must be a list or tuple of modes, not 3",)),
        ("numbers", "(1, 2)", ("there is no 1",)),
        ("another", "('EXTEND',)", ("mode TARGET_VERIFY is not among the sizes and modes that are declared",)),
    ):
        yield whole(f"modes: {name}", f"modes = {modes}", *says, names="case.json" if "is not among" in says[0] else "")


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
        "positions in int64", "topk_indices", "return right.long()", "topk_indices", "torch.int64", names="topk_indices"
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
    for name, body in {
        "seed": "torch.manual_seed(3)",
        "threads": "torch.set_num_threads(3)",
        "no gradients": "torch.set_grad_enabled(False)",
        "deterministic": "torch.use_deterministic_algorithms(True)",
        "precision": "torch.set_float32_matmul_precision('medium')",
    }.items():
        yield init(f"changes {name} in the constructor", body, PASSES)
        yield layer(f"changes {name} in a stage", "sparse_mla", f"{body}; return right", PASSES)


def mistakes() -> list[Mistake]:
    groups = (naming, construction, steps, metadata, declarations, layers, global_state)
    return [mistake for group in groups for mistake in group()]
