"""A zoo of real defects, re-created as mutations of the clean tree: what the oracle is measured by.

``bug`` is the record, ``mutate`` changes the code, the modules named after groups of defects hold the bugs, and
``matrix`` hunts them and says which check killed which.
"""
