"""What a person reads: a failure explained, a scenario told in plain words, and the table that ends a run."""

from __future__ import annotations

import io
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.table import Table

from nsa_oracle.harness.checks.layer import LayerTally
from nsa_oracle.harness.commands.tiers import TierOutcome
from nsa_oracle.harness.graphs.audit import AuditTally
from nsa_oracle.harness.judge import OracleFailure, Verdict
from nsa_oracle.harness.protocol import STAGES, Strictness
from nsa_oracle.harness.scenarios.coverage import ALL_CLASSES
from nsa_oracle.harness.scenarios.scenario import (
    Accept,
    Capture,
    Eager,
    Event,
    Finish,
    Join,
    Layer,
    Mirror,
    Order,
    Remap,
    Replay,
    Scenario,
    Setup,
    to_json,
)
from nsa_oracle.harness.scenarios.world import Batch, World, choose_bucket
from nsa_oracle.harness.search.survey import Record
from nsa_oracle.reference.types import ForwardMode, StepSemantics

WIDTH = 120


def explain(failure: OracleFailure, saved: Path | None, command: str, unsaved: str = "") -> str:
    """The failure in reading order: verdict, cells around it, the story, the saved case, how to replay it.

    unsaved: why there is no saved case; it stands in the report then.
    """
    finding = failure.finding
    parts = [f"ORACLE FAILURE  {finding.sentence()}"]
    if finding.neighbours:
        table = Table(
            "cell", "got", "expected", "", title=f"{finding.field}, step {finding.step}", title_justify="left"
        )
        for cell in finding.neighbours:
            table.add_row(cell.place, cell.got, cell.expected, "" if cell.got == cell.expected else "<- differs")
        parts.append(render(table))
    parts.append(tell(failure.scenario, failure.event))
    kept = str(saved) if saved is not None else f"nowhere, {unsaved}; as CASE.json it is\n{to_json(failure.scenario)}"
    parts.append(f"saved:  {kept}\nreplay: {command}")
    return "\n\n".join(parts)


def replay_command(saved: Path, backend: str | None, device: str, layer: str | None = None, graphs: bool = True) -> str:
    """The one line that replays a saved case where, and as, it was found."""
    words = ["python", "-m", "harness", "replay", str(saved), "--device", device]
    if backend is not None:
        words += ["--backend", backend]
    if layer is not None:
        words += ["--layer", layer]
    if not graphs:
        words.append("--no-graphs")
    return shlex.join(words)


def tell(scenario: Scenario, failing_event: int | None = None) -> str:
    """The scenario as a person would tell it, the event at which it fails marked."""
    lines = [_tell_setup(scenario)]
    world = World(scenario, poison=0)
    captured: dict[ForwardMode, set[int]] = {}
    for number, event in enumerate(scenario.events):
        batch = world.apply(event)
        if isinstance(event, Capture):
            captured.setdefault(event.mode, set()).update(event.buckets)
        mark = "  <- fails here" if number == failing_event else ""
        lines.append(f"  {number}. {_tell_event(event, batch, world, captured)}{mark}")
    return "\n".join(lines)


def summary(verdict: Verdict, failures: Sequence[dict[str, str]], seconds: float, left_out: Sequence[str] = ()) -> str:
    """The table that ends a run. left_out: what backend and layer are not made for."""
    covered = [name for name in ALL_CLASSES if verdict.boundary_classes[name]]
    totals = Table("cases", "replays", "eager calls", "fields compared", "cells compared", "classes", "seconds")
    totals.add_row(
        *(f"{n:,}" for n in (verdict.cases, verdict.replays, verdict.eager_calls)),
        *(f"{n:,}" for n in (verdict.tally.fields, verdict.tally.cells)),
        f"{len(covered)} of {len(ALL_CLASSES)}",
        f"{seconds:.0f}",
    )
    parts = [render(totals)]

    switches = [name for name in ALL_CLASSES if name.startswith("switch ") or name == "no switch"]
    if any(verdict.boundary_classes[name] for name in switches) or failures:
        table = Table("optimisation", "cases passed", "failures", "verdict")
        for name in switches:
            passed = verdict.boundary_classes[name]
            failed = sum(name in _switch_classes(failure["optimizations"]) for failure in failures)
            word = "FAILS" if failed else "bit-exact" if passed else "not visited"
            table.add_row(name.removeprefix("switch "), f"{passed:,}", str(failed), word)
        parts.append(render(table))

    if verdict.layers.stages:
        parts += [render(_stages(verdict.layers)), _relations(verdict.layers)]

    if (audit := verdict.audit).graphs or audit.compared or audit.not_audited:
        parts.append(_audited(audit))

    classes = [f"{name} {verdict.boundary_classes[name]}" for name in ALL_CLASSES if name not in switches]
    parts.append(_wrapped("boundary classes visited (cases): ", classes))
    if left_out:
        parts.append(not_judged(left_out))
    parts += _listed_failures(failures)
    word = f"{len(failures)} FAILED" if failures else "all bit-exact" if verdict.cases else "nothing judged"
    parts.append(f"oracle: {verdict.cases:,} cases passed, {verdict.replays:,} replays, {word}")
    return "\n".join(parts)


def not_judged(left_out: Sequence[str]) -> str:
    """One line."""
    return f"not judged: {'; '.join(left_out)}"


def bugs_line(killed: int, planted: int) -> str:
    """How the zoo fared, each bug on its saved case."""
    return f"bugs: {killed} of {planted} planted bugs killed by the check that is meant to"


def _stages(layers: LayerTally) -> Table:
    """What was compared of the attention layer, stage by stage."""
    table = Table("stage of the layer", "bit-exact", "within bound", "worst of bound", "weaker as declared")
    for name in (name for name in STAGES if name in layers.stages):
        stage = layers.stages[name]
        worst = f"{stage.worst:.2g}" if stage.bounded or stage.declared == Strictness.BOUND.value else "-"
        weaker = f"{stage.weaker:,} {stage.declared}".rstrip()
        table.add_row(name, *(f"{n:,}" for n in (stage.exact, stage.bounded)), worst, weaker)
    return table


def _relations(layers: LayerTally) -> str:
    told = [f"{name} {count:,}" for name, count in sorted(layers.relations.items())]
    text = _wrapped(f"layer: {layers.replays:,} replays; no bit changed when: ", told or ["nothing was tried"])
    if layers.keys:
        rows = [f"{name} {count:,}" for name, count in layers.keys.items()]
        text += "\n" + _wrapped("layer: store also of made-up keys: ", rows)
    if layers.selections:
        rows = [f"{name} {count:,}" for name, count in layers.selections.items()]
        text += "\n" + _wrapped("layer: top-k also of rows of made-up logits: ", rows)
    return text


def _audited(audit: AuditTally) -> str:
    """What was looked at in the graphs themselves, and what was not."""
    looked_at = [f"captured once more from other values {audit.compared:,}"]
    if audit.graphs:
        looked_at = [f"read node by node {audit.graphs:,}", f"kernels {audit.kernels:,}", *looked_at]
        looked_at += [f"addresses followed {audit.addresses:,}"]
        looked_at += [f"{name} nodes {count:,}" for name, count in sorted(audit.other_nodes.items())]
    text = _wrapped("graphs: ", looked_at)
    missed = [f"{reason} {count:,}" for reason, count in sorted(audit.not_audited.items())]
    return "\n".join([text, _wrapped("not audited: ", missed)]) if missed else text


def _switch_classes(optimizations: str) -> list[str]:
    """The rows of the table that a failure with these optimisations (names, by spaces) counts in."""
    return [f"switch {name}" for name in optimizations.split()] or ["no switch"]


def _listed_failures(failures: Sequence[dict[str, str]]) -> list[str]:
    """Each different verdict once, with the first command that replays it: shards often find the same bug."""
    first: dict[str, str] = {}
    alike: Counter[str] = Counter()
    for failure in failures:
        first.setdefault(failure["sentence"], failure["command"])
        alike[failure["sentence"]] += 1
    return [
        f"FAILED{f' ({alike[sentence]} times)' if alike[sentence] > 1 else ''}: {sentence}\n  {command}"
        for sentence, command in first.items()
    ]


def render(renderable: RenderableType, width: int = WIDTH) -> str:
    """Plain text of a rich object, whose lines are broken at ``width``: by default what a log allows."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip("\n").split("\n"))


def tiers_table(outcomes: Sequence[TierOutcome]) -> Table:
    """One line a tier."""
    table = Table("tier", "what it adds", "outcome")
    for outcome in outcomes:
        word = {True: "passes", False: "FAILS", None: "not run"}[outcome.passed]
        table.add_row(outcome.tier.value, outcome.tier.blames, f"{word}: {outcome.told}" if outcome.told else word)
    return table


def survey_table(records: Mapping[str, Record]) -> Table:
    """One line a property."""
    table = Table("property", "checked", "broken", "first case of it")
    for name, record in sorted(records.items()):
        table.add_row(name, f"{record.checked:,}", f"{record.broken:,}", record.example)
    return table


def _wrapped(head: str, items: Iterable[str]) -> str:
    lines, line = [], head
    for item in items:
        if len(line) + len(item) > WIDTH:
            lines.append(line.rstrip())
            line = "  "
        line += item + ", "
    return "\n".join([*lines, line.rstrip(", ")])


def _tell_setup(scenario: Scenario) -> str:
    setup = scenario.setup
    advancing = setup.step_semantics is StepSemantics.ADVANCING
    steps = "each seeing one token more than the last" if advancing else "all seeing the same metadata"
    inputs = setup.inputs
    kinds = {
        "strided": inputs.strided,
        "a wide req_to_token": inputs.wide_req_to_token,
        "a req_to_token of far rows": inputs.far_req_to_token,
    }
    views = [kind for kind, used in kinds.items() if used]
    return "\n".join(
        (
            f"A backend of {_count(setup.num_steps, 'draft step')} ({steps}) and "
            f"{_count(setup.num_draft_tokens, 'draft token')}, driven by its "
            f"{setup.drive.value.replace('_', '-')} methods;",
            f"page size {setup.page_size}, page tables {setup.max_context_len} wide, top-k {setup.index_topk}"
            f"{_tell_schedules(setup)};",
            f"a pool of {_count(setup.pool_size, 'row')}, pages {setup.page_layout.value}; inputs "
            f"{inputs.seq_lens.value} lengths, {inputs.req_pool_indices.value} indices, "
            f"{inputs.accept_length.value} accepts{''.join(', ' + view for view in views)};",
            *([] if setup.layer is None else [_tell_layer(setup.layer)]),
            f"optimisations: {', '.join(scenario.optimizations) or 'none'}; seed {scenario.seed}.",
        )
    )


def _tell_layer(layer: Layer) -> str:
    far = ", its slots far apart" if layer.far_slots else ""
    return (
        f"an attention layer of {_count(layer.num_heads, 'head')} of {layer.kv_lora_rank} + {layer.qk_rope_head_dim} "
        f"and {_count(layer.index_n_heads, 'index head')} of {layer.index_head_dim}, {layer.kv_cache_dtype.value} cache"
        f"{far}, {layer.regime.value} content;"
    )


def _tell_schedules(setup: Setup) -> str:
    told = ""
    if setup.paged_mqa_num_sms:
        told += f", paged-MQA schedule over {setup.paged_mqa_num_sms} SMs"
    if setup.flashmla_num_sm_parts:
        told += f", FlashMLA schedule over {setup.flashmla_num_sm_parts} parts"
    return told


def _tell_event(event: Event, batch: Batch | None, world: World, captured: Mapping[ForwardMode, set[int]]) -> str:
    match event:
        case Capture():
            return f"Capture {event.mode.value} graphs, buckets {_listed(event.buckets)}."
        case Join():
            prefix = "" if event.prefix_of is None else f", sharing up to {_count(event.prefix_pages, 'prefix page')}"
            if event.count > 1:
                return (
                    f"{event.count} requests of {event.seq_len}, {event.seq_len + 1}, ... tokens join{prefix}; "
                    f"{len(world.running)} running."
                )
            return f"A request of {_count(event.seq_len, 'token')} joins{prefix}; {len(world.running)} running."
        case Finish():
            who = f"Request {event.request} finishes"
            if event.count > 1:
                who = f"Up to {event.count} requests finish, from number {event.request} on"
            return f"{who}; {len(world.running)} running."
        case Accept():
            lengths = [request.seq_len for request in world.running]
            accepted = [request.accept_length for request in world.running]
            return f"Verification accepts {_listed(accepted)} tokens; lengths are now {_listed(lengths)}."
        case Remap():
            return f"Request {event.request} gets its first pages re-mapped to those of request {event.prefix_of}."
        case Replay():
            times = "" if event.times == 1 else f", {event.times} times"
            assert batch is not None
            bucket = choose_bucket(event.bucket, batch.size, captured.get(event.mode, set()))
            where = "no bucket fits, so eagerly" if bucket is None else f"bucket {bucket}"
            return f"Replay {event.mode.value} ({where}){times}: {_tell_batch(batch, event.mirror, event.order)}."
        case Eager():
            return f"Eager {event.mode.value}: {_tell_batch(batch, event.mirror, event.order)}."


def _tell_batch(batch: Batch | None, mirror: Mirror, order: Order) -> str:
    assert batch is not None
    if not batch.size:
        return "an empty batch"
    told = f"lengths {_listed(batch.seq_lens)}, pool rows {_listed(batch.pool_rows)}"
    if batch.mode is ForwardMode.DRAFT_EXTEND:
        told += f", accepted {_listed(batch.accept_lengths)}"
    if batch.extend_lens:
        told += f", new tokens {_listed(batch.extend_lens)}"
    if mirror in (Mirror.STALE, Mirror.AHEAD) and batch.seq_lens_cpu is not None:
        told += f", host mirror {mirror.value} at {_listed(batch.seq_lens_cpu)}"
    if mirror is Mirror.ABSENT:
        told += ", no host mirror"
    return told + ("" if order is Order.JOINED else f", order {order.value}")


def _listed(numbers: Sequence[int], most: int = 12) -> str:
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return (" ".join(map(str, numbers[:most])) or "no") + more


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
