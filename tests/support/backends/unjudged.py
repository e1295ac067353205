"""The reference, which declares that some or all of its fields are not to be judged."""

from __future__ import annotations

from nsa_oracle.harness.fields import FIELDS
from nsa_oracle.reference.multi_step import MultiStepBackend


class NothingJudged(MultiStepBackend):
    unjudged = {"*": tuple(field.name for field in FIELDS)}  # noqa: RUF012


class TablesNotJudged(MultiStepBackend):
    unjudged = {"*": ("page_table_1", "real_page_table")}  # noqa: RUF012
