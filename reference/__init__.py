"""Pure-PyTorch reference of the multi-step sparse attention backend: what the oracle compares with.

Read it in the order the data flows: ``types`` (the vocabulary), ``lengths`` and ``page_table`` (one field a
function), ``schedules`` (work splits derived from lengths), ``metadata`` (one step, all fields), ``multi_step``
(the N-step backend as a serving engine drives it). Then what reads the metadata: ``kv_cache`` (how keys are stored),
``indexer``, ``topk`` and ``attention`` (one stage of a layer each), ``layer`` (the stages in order), ``cycle`` (layer
and metadata through prefill, draft, verify and draft extend). Nothing here imports anything but torch and this package.
"""
