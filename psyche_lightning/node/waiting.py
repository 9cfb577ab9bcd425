"""For whom a node waits, in one line for people (invariant I4)."""

from __future__ import annotations

from psyche_lightning.node.agreement import EpochLog
from psyche_lightning.protocol.state import Phase, RunState
from psyche_lightning.wire.identity import short


def describe(state: RunState | None, log: EpochLog | None, next_apply: int | None, delay: int) -> str:
    """Say what the node waits for.

    Args:
        state: the run as the node sees it.
        log: what it knows of the epoch.
        next_apply: next round to apply; None while the parameters are not the epoch's.
        delay: rounds from training to applying.
    """
    if state is None:
        return "waiting for the coordinator's state"
    if state.phase is Phase.WAITING_FOR_MEMBERS:
        return f"epoch {state.epoch}: waiting for {state.config.init_min_clients} members"
    if state.phase is Phase.PAUSED:
        return "the run is paused; waiting for `psyche run resume`"
    if state.phase is Phase.WARMUP:
        ready = {record.proof.index for record in state.warmup_witnesses}
        late = [short(client.node) for i, client in enumerate(state.clients) if i not in ready]
        return f"epoch {state.epoch}: waiting for {', '.join(late) or 'nobody'} to hold the parameters"
    if state.phase is Phase.COOLDOWN:
        return f"epoch {state.epoch}: waiting for its end to be agreed"
    current = state.current
    if current is None or log is None or current.height not in log.rounds:
        return f"phase {state.phase.name}: waiting for the coordinator"
    if next_apply is None:
        return f"round {current.height}: waiting for the epoch's parameters"
    if next_apply <= current.height - delay:
        return f"round {current.height}: catching up, applying round {next_apply}"
    here, about = log.rounds[current.height], log.rounds.get(current.height - delay + 1)
    missing = sorted(about.missing) if about else []
    if about and missing:
        names = ", ".join(short(about.nodes[i]) for i in missing)
        share = f"{len(missing)}/{len(about.batches)}"
        return f"round {current.height}: waiting for results of {share} batches, from {names}"
    reported = {record.proof.index for record in current.witnesses}
    late = [short(n) for i, n in enumerate(here.nodes) if here.selection.is_witness(i) and i not in reported]
    return f"round {current.height}: waiting for witnesses {', '.join(late)}"
