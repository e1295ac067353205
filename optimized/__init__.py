"""The multi-step sparse attention backend, optimised: Triton and torch, under the names of ``reference/``.

Read it in the order the data flows: ``optimizations`` (the switches), ``buffers`` (where a step's fields live),
``lengths``, ``page_table``, ``schedules`` (one group of fields each), ``metadata`` (all of them: in one launch, or
composed from the parts), ``multi_step`` (what a serving engine drives). From ``reference/`` nothing is taken but the
types.
"""
