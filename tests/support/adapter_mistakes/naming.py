"""Mistakes in the name of a backend or a layer, and in its constructor."""

from __future__ import annotations

from collections.abc import Iterator

from tests.support.adapter_mistakes.mistake import (
    FILE,
    GOOD,
    PASSES,
    Mistake,
    backend,
    field,
    init,
    layer,
    layer_class,
    whole,
)


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
    yield backend(
        "a module alone",
        GOOD,
        "write nsa_oracle.reference.multi_step:NAME",
        spec="nsa_oracle.reference.multi_step",
        names="",
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
    own = "raise BaseException('x')\n"
    yield backend("BaseException at import", own, "raised BaseException: x", FILE + ":10", names="{module}")
    purge = "for name in [name for name in sys.modules if name.startswith('nsa_oracle')]: del sys.modules[name]\n"
    yield backend("purges modules", purge + "Mine = Backend\n", "removed nsa_oracle", names="importing {module}")
    yield backend("GeneratorExit at import", "raise GeneratorExit\n", "raised GeneratorExit", FILE, names="{module}")
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
    yield init("constructor ends a generator", "raise GeneratorExit", "backend raised: GeneratorExit", FILE + ":13")
    yield backend("single step alone", "Mine = Step\n", "lacks SingleStepBackend.attn_backends", names="{module}:Mine")
    without = "class Mine:\n    def __init__(self, c, r): self.attn_backends = []\n"
    yield backend("no methods", without, "lacks Mine.init_forward_metadata")
    misspelt = without + "".join(
        f"    def {name}(self, *a): pass\n"
        for name in ("init_forward_metdata", "init_cuda_graph_state", "init_forward_metadata_capture_cuda_graph")
    )
    yield backend("misspelt method", misspelt, "lacks Mine.init_forward_metadata", "it has init_forward_metdata")
    yield from _two_sets()
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
        FILE + ":11 in init_forward_metadata",
        "Mine.init_forward_metadata() takes 1",
    )
    yield whole(
        "method of more",
        "def init_forward_metadata(self, a, b): pass",
        "TypeError",
        FILE + ":11 in init_forward_metadata",
        "Mine.init_forward_metadata() missing 1",
    )
    yield whole(
        "other keyword",
        "def init_cuda_graph_state(self, max_bs): pass",
        "TypeError",
        FILE + ":11 in init_cuda_graph_state",
        "Mine.init_cuda_graph_state() takes 2",
    )
    yield whole(
        "coroutine", "async def init_forward_metadata(self, batch): pass", "Mine.init_forward_metadata is a coroutine"
    )
    yield backend(
        "coroutine for a factory",
        "async def Mine(c, r): return Backend(c, r)\n",
        "Mine' is a coroutine, which nothing awaits; define it without async",
    )
    yield whole(
        "coroutine for a constructor", "async def __init__(self, c, r): pass", "Mine' is a coroutine", names="Mine"
    )
    yield backend("generator for a factory", "def Mine(c, r): yield\n", "Mine' is a generator", names="Mine")
    yield backend(
        "returns a coroutine",
        "async def build(c, r): return Backend(c, r)\ndef Mine(c, r): return build(c, r)\n",
        "returned a coroutine, which nothing awaits; return the backend",
    )
    yield layer_class(
        "coroutine for a layer", "async def Mine(c, a): return Layer(c, a)\n", "Mine' is a coroutine", names="Mine"
    )
    for prefix, kind in (("", "generator"), ("async ", "asynchronous generator")):
        yield whole(
            kind,
            f"{prefix}def init_forward_metadata_replay_cuda_graph(self, batch, bs): yield",
            "Mine.init_forward_metadata_replay_cuda_graph is a generator, which nothing iterates over",
        )
    yield whole(
        "generator in the graph",
        "def init_forward_metadata_in_graph(self, batch, bs): yield",
        "Mine.init_forward_metadata_in_graph is a generator",
    )
    yield layer("stage is a generator", "store_cache", "yield right", "Mine.store_cache is a generator")
    yield Mistake(
        "module refuses the name",
        "def __getattr__(name): raise RuntimeError('no ' + name)\n",
        ("looking up Mine in {module} raised RuntimeError: no Mine, at", FILE + ":10"),
    )
    yield field(
        "raises from another error",
        "try: dict()['key']\n        except KeyError as error: raise RuntimeError('outer') from error",
        "RuntimeError",
        "got outer (from KeyError: 'key'), expected no exception",
        names="{module}.py",
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


def _two_sets() -> Iterator[Mistake]:
    """One set of names, with some of the other beside it."""
    replay, todays = "init_forward_metadata_replay_cuda_graph", "init_forward_metadata_out_graph"
    shared = "init_forward_metadata", "init_cuda_graph_state"
    steps = (
        "class Mine:\n    def __init__(self, c, r):\n        self._own = Backend(c, r)\n"
        "    @property\n    def attn_backends(self): return self._own.attn_backends\n"
    )

    def having(*names: str, without: str = "") -> str:
        passed_on = "".join(f"    def {name}(self, *a, **o): self._own.{name}(*a, **o)\n" for name in names)
        return steps + passed_on + (f"    def {without}(self, *a, **o): 1 / 0\n" if without else "")

    whole_set = (*shared, todays, "init_forward_metadata_in_graph")
    yield backend("an older method left", having(*whole_set, without=replay), PASSES, names="")
    capture = "init_forward_metadata_capture_cuda_graf"
    yield backend(
        "an older set misspelt beside today's",
        having(*whole_set, replay, without=capture),
        "lacks Mine.init_forward_metadata_capture_cuda_graph (it has init_forward_metadata_capture_cuda_graf: did you",
    )
    yield backend(
        "neither set whole",
        having(*shared, todays, replay),
        "lacks Mine.init_forward_metadata_capture_cuda_graph, and of today's set Mine.init_forward_metadata_in_graph; ",
        "complete one of the two sets",
    )
