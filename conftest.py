"""Makes the oracle's pytest plugin known to every run from this repository."""

pytest_plugins = ["harness.plugin"]
