"""The multi-step sparse attention backend, optimised: Triton and torch, under the names of ``reference/``.

Read it in the order the data flows: ``optimizations`` (the switches), ``buffers`` (where a step's fields live),
``lengths``, ``page_table``, ``schedules`` (one group of fields each), ``metadata`` (all of them: in one launch, or
composed from the parts), ``multi_step`` (what a serving engine drives). Then what reads the metadata: ``kv_cache``,
``indexer``, ``topk`` and ``attention`` (one stage of a layer each), ``layer`` (the stages in order). ``launch`` and
``library`` are how kernels are launched. ``reference.types`` is the only module of ``reference/`` used here.
"""
