"""docs/zoo.md and its records list the bugs that the zoo has."""

from __future__ import annotations

import re

from nsa_oracle.harness.bugs.zoo import ZOO
from nsa_oracle.harness.checks.check import Check
from tests.support.pages import PAGES, first_column, section

ZOO_PAGE, RECORDS = PAGES["docs/zoo.md"], PAGES["docs/records/zoo.md"]


def test_every_bug_has_its_row() -> None:
    rows = re.findall(
        r"^\| `([\w-]+)` \| (.*?) \| (\S.*?) \| ([\w, ]+?)( \(needs a GPU\))? \|$", ZOO_PAGE, re.MULTILINE
    )
    assert sorted(name for name, *_ in rows) == sorted(ZOO)
    for name, sentence, source, found_by, gpu in rows:
        bug = ZOO[name]
        assert (sentence, source, bool(gpu)) == (bug.sentence, bug.reference, bug.gpu)
        assert set(found_by.split(", ")) <= {check.value for check in bug.caught_by}


def test_rows_stand_in_their_group() -> None:
    for group in {bug.group for bug in ZOO.values()}:
        (heading,) = (
            line for line in re.findall(r"^## (.*)$", ZOO_PAGE, re.MULTILINE) if line.lower() == group.value.lower()
        )
        names = re.findall(r"^\| `([\w-]+)` \|", section(ZOO_PAGE, heading), re.MULTILINE)
        assert sorted(names) == sorted(bug.name for bug in ZOO.values() if bug.group is group)


def test_every_check_is_explained() -> None:
    assert first_column(section(ZOO_PAGE, "How to read the tables")) == [check.value for check in Check]


def test_records_are_of_bugs_of_the_zoo() -> None:
    """New bugs need not be in the records, which are of their date."""
    recorded = re.findall(r"^\| `([\w-]+)` \| [\w -]+ \| \d+ \| (?:metadata|layer) \| \d+ \|$", RECORDS, re.MULTILINE)
    assert recorded
    assert set(recorded) <= set(ZOO)
