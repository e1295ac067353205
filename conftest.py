"""Makes the oracle's pytest plugin known to every run from this repository, also where it is not installed."""

pytest_plugins = ["nsa_oracle.pytest_plugin"]
