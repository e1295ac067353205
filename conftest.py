"""Makes the oracle's pytest plugin known to every run from this repository."""

pytest_plugins = ["nsa_oracle.harness.plugin"]
