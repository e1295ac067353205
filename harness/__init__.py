"""The judge: generates serving scenarios, drives a backend through them and compares every live bit.

Data flows one way: ``scenario`` (a frozen record) -> ``world`` (the serving engine's host state; the only place random
numbers are used) -> ``engine`` (drives a backend behind ``protocol``, through ``graph``, with ``poison``) ->
``compare`` -> ``judge`` -> ``report`` and ``seeds``. ``strategies`` draws scenarios within the ``limits`` that are
declared, ``boundary`` says which corners of the space they visit, ``plugin`` and ``__main__`` are the ways in.
"""
