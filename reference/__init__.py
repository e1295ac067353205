"""Pure-PyTorch statement of the multi-step sparse attention backend: the truth the oracle compares with.

Read it in the order the data flows: ``types`` (the vocabulary), ``lengths`` and ``page_table`` (one field a
function), ``schedules`` (work splits derived from lengths), ``metadata`` (one step, all fields), ``multi_step``
(the N-step backend as a serving engine drives it). Nothing here imports anything but torch and this package.
"""
