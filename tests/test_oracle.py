"""The main job: the oracle judges a backend, by default ``optimized/``."""

from nsa_oracle.harness.suite import test_layers, test_saved_case, test_scenarios

__all__ = ["test_layers", "test_saved_case", "test_scenarios"]
