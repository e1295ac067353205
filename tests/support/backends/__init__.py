"""Backends with one planted bug each, and clean ones, a module for each kind.

All derive from the reference, so that nothing but the plant can be wrong. Each is a factory of (config, req_to_token),
as ``--oracle-backend tests.support.backends.MODULE:NAME`` wants it.
"""
