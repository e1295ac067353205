"""The zoo: defects of public projects and of kernel reviews, re-created in ``optimized/`` to measure the oracle.

``bug`` has the record of a bug. ``mutate`` changes source code and ``wrappers`` wraps the backend; ``catalogue`` has
the bugs, one module per area, and ``zoo`` lists all of them by name. ``hunt`` judges cases with a bug planted until one
fails, ``kill`` has the record of the result, and ``report`` renders these records.
"""
