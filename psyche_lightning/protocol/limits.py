"""The configurations of a run that a coordinator accepts (Psyche's coordinator.rs, ``check``)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from psyche_lightning.errors import ConfigError
from psyche_lightning.protocol.state import CoordinatorConfig

MAX_RUN_ID = 32
"""The most characters of a run's name (the limit of a Solana seed)."""
MAX_REGION = 40
REGION = f"at most {MAX_REGION} printable characters, without spaces at the ends"
"""What :func:`is_region` allows, in words."""
_RUN_ID = re.compile(rf"(?!\.)[A-Za-z0-9._-]{{1,{MAX_RUN_ID}}}")


@dataclass(frozen=True)
class Limits:
    """The largest sizes that a host supports.

    Attributes:
        clients: members of an epoch.
        witnesses: witnesses of a round.
        batch: samples of a round.
        steps: training rounds of the run.
        extra_time: seconds to wait for further members.
        whole_seconds: whether durations must be whole seconds.
    """

    clients: int = 1024
    witnesses: int = 1024
    batch: int = 2**32 - 1
    steps: int = 2**32 - 1
    extra_time: float = math.inf
    whole_seconds: bool = False


PSYCHE_LIMITS = Limits(clients=256, witnesses=32, batch=65535, steps=2**32 - 2, extra_time=255, whole_seconds=True)
"""The limits of Psyche's account layout, into which the step after the last must fit, too."""

_DURATIONS = (
    "epoch_time",
    "warmup_time",
    "max_round_train_time",
    "round_witness_time",
    "cooldown_time",
    "waiting_for_members_extra_time",
)


def is_region(text: str) -> bool:
    """Whether this can be the name of a node's region, which stands in terminals, logs and pages; it may be empty."""
    return len(text) <= MAX_REGION and text.isprintable() and text == text.strip()


def check_run_id(run_id: str) -> None:
    """Check a run's name, which stands in terminals, logs, URLs and paths.

    Raises:
        ConfigError: it is empty or too long, has another character, or begins with a dot.
    """
    if not _RUN_ID.fullmatch(run_id):
        raise ConfigError(
            f"{run_id[:40]!r} is no name of a run; it has 1 to {MAX_RUN_ID} letters (a to z), digits, '.', '_' and "
            "'-', and does not begin with a dot"
        )


def check_config(config: CoordinatorConfig, limits: Limits | None = None) -> None:
    """Check that a run with this configuration can proceed; the first broken rule is named.

    Args:
        config: the configuration.
        limits: the host's limits; the wide defaults if None.

    Raises:
        ConfigError: a field breaks a rule; the text names both.
    """
    limits = limits or Limits()

    def rule(holds: bool, field: str, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{field} is {getattr(config, field)}; it must be {expected}")

    # Each comparison is written so that NaN fails.
    rule(config.epoch_time > 0, "epoch_time", "more than 0 seconds")
    rule(
        # Psyche allows 0. Here an epoch begins only after a client has reported in warm-up, which takes time.
        0 < config.warmup_time < config.epoch_time,
        "warmup_time",
        f"more than 0 and less than epoch_time ({config.epoch_time})",
    )
    rule(
        0 < config.max_round_train_time < config.epoch_time,
        "max_round_train_time",
        f"more than 0 and less than epoch_time ({config.epoch_time})",
    )
    rule(config.round_witness_time > 0, "round_witness_time", "more than 0 seconds")
    rule(config.min_clients > 0, "min_clients", "1 or more")
    rule(
        config.min_clients <= config.init_min_clients <= limits.clients,
        "init_min_clients",
        f"at least min_clients ({config.min_clients}) and at most {limits.clients}",
    )
    rule(0 < config.global_batch_size_start <= limits.batch, "global_batch_size_start", f"1 to {limits.batch}")
    rule(
        config.global_batch_size_start <= config.global_batch_size_end <= limits.batch,
        "global_batch_size_end",
        f"at least global_batch_size_start ({config.global_batch_size_start}) and at most {limits.batch}",
    )
    rule(0 < config.total_steps <= limits.steps, "total_steps", f"1 to {limits.steps}")
    rule(
        0 <= config.witness_nodes <= min(config.min_clients, limits.witnesses),
        "witness_nodes",
        f"0 (everyone) or at most min_clients ({config.min_clients}) and at most {limits.witnesses}",
    )
    rule(config.cooldown_time > 0, "cooldown_time", "more than 0 seconds")
    rule(
        0 < config.waiting_for_members_extra_time <= limits.extra_time,
        "waiting_for_members_extra_time",
        f"more than 0 and at most {limits.extra_time} seconds",
    )
    # Rules that Psyche does not check, or leaves to its field types.
    rule(
        0 <= config.global_batch_size_warmup_tokens < 1 << 64,
        "global_batch_size_warmup_tokens",
        "0 (no ramp) or a number of tokens below 2^64",
    )
    rule(config.verification_percent == 0, "verification_percent", "0, as verifiers do not exist yet")
    for field in _DURATIONS:
        value = float(getattr(config, field))
        rule(math.isfinite(value), field, "a finite number of seconds")
        rule(value.is_integer() or not limits.whole_seconds, field, "a whole number of seconds on this coordinator")
