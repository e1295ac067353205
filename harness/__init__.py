"""The judge of sparse attention backends: what a user of the oracle imports.

``judge`` runs one ``Scenario`` against a backend and a layer and raises ``OracleFailure``, with a ``Finding``, at the
first disagreement with the reference. ``MultiStepBackend``, ``SingleStepBackend``, ``PreparesInGraph`` and
``SparseAttention`` say what a backend and a layer must provide. Importing this loads neither Triton nor pytest nor
Hypothesis.
"""

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
    "load",
]
