"""What a backend declares to be different, as it was met in a run: nothing is left out or waived silently."""

from __future__ import annotations

from collections.abc import Iterable

from nsa_oracle.harness.checks.declared import DeclaredTally
from nsa_oracle.harness.report.text import wrapped


def declared_lines(tally: DeclaredTally) -> list[str]:
    """One line or more for each kind of declaration that the run has met; none for a backend that declares nothing."""
    lines = []
    if tally.left_out:
        lines.append(wrapped("not judged, as declared (calls): ", [f"{n} {c:,}" for n, c in tally.left_out.items()]))
    counts = [f"{name} {count:,}" for name, count in tally.own.items() if count]
    if counts:
        lines.append(wrapped("judged by the author's own reference (calls): ", counts))
    if tally.never_there:
        lines.append(wrapped("without a value in the author's own reference: ", tally.never_there))
    for name, waiver in tally.waivers.items():
        needed = f"needed in {waiver.needed:,} of {waiver.reached:,} comparisons, {waiver.cells:,} cells"
        lines.append(f"waived: {name}: {needed} ({waiver.reason})")
    if tally.stand_ins:
        lines.append(wrapped("stand-ins, not judged: ", _by_module(tally.stand_ins)))
    return lines


def _by_module(names: Iterable[str]) -> list[str]:
    """Dotted names, those of one module together."""
    modules: dict[str, list[str]] = {}
    for name in sorted(names):
        module, _, attribute = name.rpartition(".")
        modules.setdefault(module, []).append(attribute)
    return [f"{module}: {' '.join(attributes)}" for module, attributes in modules.items()]


def own_fields_not_judged(tally: DeclaredTally) -> list[str]:
    """One line for each of the author's own fields that never had a value: a run of drawn cases with one must not be
    green. A few saved cases may just not have it.
    """
    return [
        f"NOT JUDGED: own field {name}: its reference gave None in every call; mend or remove it, or declare it absent"
        for name in tally.never_there
    ]


def unneeded_declarations(tally: DeclaredTally) -> list[str]:
    """One line for each waiver whose cells were compared and never differed, and for each field that is declared absent
    and was always there. A run with one must not be green.
    """
    waivers = [
        f"WAIVER NOT NEEDED: {name}: {tally.waivers[name].reached:,} comparisons and no difference; remove or narrow it"
        for name in tally.never_needed
    ]
    absent = [
        f"ABSENT NOT NEEDED: {name}: there in all {tally.absent[name].reached:,} comparisons; remove it from 'absent'"
        for name in tally.never_absent
    ]
    return waivers + absent
