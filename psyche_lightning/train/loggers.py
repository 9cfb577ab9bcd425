"""The logger of a recipe: one of Lightning's, beside the files that every training writes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from psyche_lightning.errors import ConfigError, needing
from psyche_lightning.lightning.session import node_key
from psyche_lightning.recipe.config import LoggerName
from psyche_lightning.wire.identity import short

logger = logging.getLogger(__name__)

LOGS = "logs"
"""The folder of their files, in the node's folder; each training has a ``version_N`` of its own in it."""


def make_loggers(
    name: LoggerName | None, folder: Path, run: str, metrics_port: int | None, metrics_host: str
) -> list[Logger]:
    """The logger that a recipe names, and the one that Prometheus reads.

    Args:
        name: see :func:`make_logger`.
        folder: likewise.
        run: likewise, and the label of all metrics.
        metrics_port: the port on which Prometheus reads the figures; None for none.
        metrics_host: the address of this machine to which that port belongs.

    Raises:
        ConfigError: as for :func:`make_logger`, or nothing can listen on that address and port.
    """
    named = make_logger(name, folder, run)
    loggers = [] if named is None else [named]
    if metrics_port is not None:
        from psyche_lightning.lightning.prometheus import PrometheusLogger

        shown = PrometheusLogger(metrics_port, metrics_host, run=run)
        place = f"[{metrics_host}]" if ":" in metrics_host else metrics_host
        logger.info("Prometheus finds this node's figures at http://%s:%d/metrics", place, shown.port)
        loggers.append(shown)
    return loggers


def make_logger(name: LoggerName | None, folder: Path, run: str) -> Logger | None:
    """The logger that a recipe names.

    Args:
        name: ``trainer.logger``; None for none.
        folder: the node's folder; files go to its ``logs``.
        run: the run's name: W&B's project, and its group of nodes. The node's short name is that of W&B's run.

    Raises:
        ConfigError: the logger's package is missing, or its folder is not writable.
    """
    try:
        match name:
            case None:
                return None
            case "csv":
                return CSVLogger(folder, name=LOGS, flush_logs_every_n_steps=1)
            case "tensorboard":
                with needing(name, "loggers", f"trainer.logger={name}"):
                    return TensorBoardLogger(folder, name=LOGS)
            case "wandb":
                logs = folder / LOGS
                logs.mkdir(parents=True, exist_ok=True)
                os.environ.setdefault("WANDB_SILENT", "true")  # its own banner would break into the progress bars
                with needing(name, "loggers", f"trainer.logger={name}"):
                    return WandbLogger(name=short(node_key(folder).public), project=run, group=run, save_dir=logs)
    except OSError as error:
        raise ConfigError(
            f"cannot write to {folder / LOGS}: {error.strerror}; choose another node.directory"
        ) from error
