"""Mistakes in the metadata of a backend, and in what it declares."""

from __future__ import annotations

from collections.abc import Iterator

from tests.support.adapter_mistakes.mistake import FILE, PASSES, Mistake, backend, field, init, whole


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
    writes = (
        "class S(Step):\n    def init_forward_metadata(self, batch):\n        super().init_forward_metadata(batch)\n"
        "        batch.seq_lens.add_(1)\n"
    )
    yield backend(
        "a step writes what the next one reads",
        writes + "class Mine(Backend):\n    def __init__(self, c, r):\n        super().__init__(c, r)\n"
        "        self.attn_backends = [S(c, r) for _ in self.attn_backends]\n",
        "input modified: seq_lens at ",
        " in init_forward_metadata (by Mine.init_forward_metadata): got changed content",
    )
    yield init(
        "one step too few",
        "self.attn_backends.pop()",
        "wrong shape: attn_backends of Mine: ",
        "got 1 step, expected 2 steps",
    )
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
        "metadata a dict",
        "return dict(vars(metadata))",
        shown,
        "a dict (types.SimpleNamespace(**fields) has them as attributes)",
        "an object with the fields of Metadata",
    )
    namedtuple = "__import__('collections').namedtuple"
    yield field("metadata a named tuple", f"return {namedtuple}('Shown', vars(metadata))(**vars(metadata))", PASSES)
    yield field(
        "metadata a named tuple without a field",
        "shown = dict(vars(metadata)); shown.pop('cu_seqlens_k')\n"
        f"        return {namedtuple}('Shown', shown)(**shown)",
        shown,
        "a Shown of 18 without cu_seqlens_k",
    )
    yield field(
        "metadata frozen, with slots",
        "return dataclasses.make_dataclass('Shown', vars(metadata), frozen=True, slots=True)(**vars(metadata))",
        PASSES,
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
    yield change(
        "sparse", "page_table_1", "x.to_sparse()", "wrong result", "torch.sparse_coo, expected", "torch.strided"
    )
    yield change(
        "a field with a gradient",
        "seqlens_expanded",
        "x.double().requires_grad_()",
        "wrong result: seqlens_expanded at step 0",
        "a tensor of torch.float64 that requires grad, expected a tensor of torch.int32 without",
    )
    captured = "class Mine(Backend):\n    def init_forward_metadata_capture_cuda_graph(self, b):\n        super()."
    captured += "init_forward_metadata_capture_cuda_graph(b)\n        for s in self.attn_backends: "
    for name, value, says in (
        ("another device", "x.to('meta')", ("wrong device", "step 0: got meta, expected cpu")),
        ("sparse", "x.to_sparse()", ("wrong result", "torch.sparse_coo, expected")),
        ("with a gradient", "x.double().requires_grad_()", ("wrong result", "that requires grad, expected")),
    ):
        body = f"x = s.forward_metadata.cu_seqlens_k; s.forward_metadata.cu_seqlens_k = {value}\n"
        yield backend(f"captured: {name}", captured + body, *says, names="cu_seqlens_k")
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
    yield whole(
        "waivers: unforeseen", "waivers = [Waiver('DECODE', 'page_table_1', None)]", "its declarations: AttributeError"
    )
    for name, cells, says in (
        ("nothing", "lambda *a: None", ("must be a mask of bool that broadcasts to [2, 16], not None",)),
        ("numbers", "lambda *a: 1", ("must be a mask of bool", "not numbers of int64")),
        ("of another shape", "lambda *a: np.zeros(3, bool)", ("raised ValueError",)),
    ):
        named = "Mine': the cells of the waiver 'page_table_1 in DECODE, <lambda>'"
        waivers = f"waivers = [Waiver('DECODE', 'page_table_1', 'x', {cells})]"
        yield whole(f"waivers: cells are {name}", waivers, *says, names=named)
    cells = "__import__('functools').partial(lambda call, field, shape: np.zeros(shape, bool))"
    yield whole("waivers: cells without a name", f"waivers = [Waiver('DECODE', 'page_table_1', 'x', {cells})]", PASSES)
    for name, given, says in (
        ("raise", "1 / 0", "Mine': stand_ins raised ZeroDivisionError: division by zero"),
        ("are no names", "3", "Mine': stand_ins must give a list of names; it gives one int"),
        ("are one text", "'a.b'", "Mine': stand_ins must give a list of names; it gives one str"),
    ):
        yield whole(f"stand-ins {name}", f"stand_ins = staticmethod(lambda: {given})", says)
    yield whole("misspelt modes", "mode = ('DECODE',)", "it has mode: did you mean modes?")
    yield whole("misspelt role", "roles = {'draft': ('DECODER',)}", "roles: there is no mode 'DECODER'")
    for name, modes, says in (
        ("twice", "('DECODE', 'DECODE')", ("modes: DECODE is listed twice",)),
        ("unknown", "('PREFILL',)", ("there is no PREFILL; choose from", "EXTEND")),
        ("lower case", "('decode',)", ("there is no decode; did you mean DECODE?",)),
        ("one text", "'DECODE'", ("modes must be a list or tuple of modes, not DECODE",)),
        ("none", "()", ("modes allows no mode at all",)),
        ("a number", "3", ("modes must be a list or tuple of modes, not 3",)),
        ("numbers", "(1, 2)", ("there is no 1",)),
        ("another", "('EXTEND',)", ("mode TARGET_VERIFY is not among the sizes and modes that are declared",)),
    ):
        yield whole(f"modes: {name}", f"modes = {modes}", *says, names="case.json" if "is not among" in says[0] else "")
