"""The judge of sparse attention backends, with the names that users of the oracle import.

``judge`` runs one ``Scenario`` against a backend and a layer. At the first disagreement with the reference it raises
``OracleFailure``, which has a ``Finding``. ``MultiStepBackend``, ``SingleStepBackend``, ``PreparesInGraph`` and
``SparseAttention`` define what a backend and a layer must provide. ``judged`` makes a pytest test of one. ``record``
writes down what a server gives to a backend. Importing this package loads neither Triton nor pytest nor Hypothesis.
"""

from nsa_oracle.starting import interruption_deferred

with interruption_deferred():  # torch takes seconds
    from nsa_oracle.harness.decorator import judged
    from nsa_oracle.harness.errors import BackendError, ScenarioError
    from nsa_oracle.harness.findings import Finding, Kind
    from nsa_oracle.harness.judge import OracleFailure, Verdict, judge
    from nsa_oracle.harness.protocol import (
        BackendFactory,
        LayerFactory,
        MultiStepBackend,
        PreparesInGraph,
        SingleStepBackend,
        SparseAttention,
        Strictness,
    )
    from nsa_oracle.harness.recorder.wrapper import record
    from nsa_oracle.harness.scenarios.files import load
    from nsa_oracle.harness.scenarios.limits import Sizes
    from nsa_oracle.harness.scenarios.scenario import Scenario

__all__ = [
    "BackendError",
    "BackendFactory",
    "Finding",
    "Kind",
    "LayerFactory",
    "MultiStepBackend",
    "OracleFailure",
    "PreparesInGraph",
    "Scenario",
    "ScenarioError",
    "SingleStepBackend",
    "Sizes",
    "SparseAttention",
    "Strictness",
    "Verdict",
    "judge",
    "judged",
    "load",
    "record",
]
