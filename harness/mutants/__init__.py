"""Mutation testing: changes ``optimized/`` by generic operators, and judges each mutant on saved and fresh cases.

``operators`` finds the changes and ``mutants`` gives them ids; ``cases`` chooses the cases, ``nursery`` has the
processes, ``judging`` judges, ``score`` has the record of a result, and ``report`` renders these records.
"""
