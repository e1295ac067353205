"""Attention layers with one planted bug each, and clean ones, a module for each kind.

Most derive from the reference, which cannot be captured: they are judged without graphs. Those of ``in_graph`` derive
from ``optimized/``. Each is a factory of (config, attention), as ``--oracle-layer tests.support.layers.MODULE:NAME``
wants it.
"""
