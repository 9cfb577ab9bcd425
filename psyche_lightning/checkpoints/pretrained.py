"""Loads models in Hugging Face format, from a folder or from the Hub; nothing that is missing goes unnoticed."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psyche_lightning.checkpoints.building import BUILDING
from psyche_lightning.errors import CheckpointError, ConfigError, counted

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_kept: ContextVar[torch.dtype | None] = ContextVar("kept", default=None)

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHOWN = 5


@dataclass(frozen=True)
class Source:
    """The location of a model.

    Attributes:
        name: a folder, or a name on the Hub.
        revision: revision on the Hub.
        local: whether it is a folder.
    """

    name: str
    revision: str = "main"
    local: bool = True

    @classmethod
    def of(cls, path: str) -> Source:
        """Resolve a path.

        Raises:
            ConfigError: it is neither a model's folder nor a possible name on the Hub.
        """
        folder = Path(path).expanduser()
        if (folder / "config.json").is_file():
            return cls(str(folder))
        name, _, revision = path.partition("@")
        if folder.exists() or not _HUB_NAME.fullmatch(name) or (not revision and path.endswith("@")):
            raise ConfigError(
                f"The model path {path!r} is not a folder in Hugging Face format (no config.json), nor a name on the "
                "Hub such as Qwen/Qwen3-0.6B@main."
            )
        return cls(name, revision or "main", local=False)

    @property
    def options(self) -> dict[str, Any]:
        """What ``from_pretrained`` needs to know besides the name."""
        return {"revision": self.revision, "local_files_only": self.local}

    @property
    def dtype(self) -> str | None:
        """The dtype of its parameters, such as ``bfloat16``, as its configuration says; None if it does not say one.

        Raises:
            OSError: the Hub does not deliver its configuration.
        """
        from transformers import PreTrainedConfig

        values, _ = PreTrainedConfig.get_config_dict(self.name, **self.options)
        for part in (values, *(one for one in values.values() if isinstance(one, dict))):
            found = part.get("dtype") or part.get("torch_dtype")
            if found is not None:
                return str(found).removeprefix("torch.")
        return None


@contextlib.contextmanager
def kept_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Have :func:`load` keep parameters in ``dtype`` from the beginning, so that none is ever larger than that.

    Args:
        dtype: that of training, to which the model would be cast; None for float32.
    """
    before = _kept.set(dtype)
    try:
        yield
    finally:
        _kept.reset(before)


def load(kind: Any, source: Source, **options: Any) -> Any:
    """Load a model of ``transformers``, tensor by tensor, and look whether the checkpoint has all of its parameters.

    They are in float32, or as :func:`kept_in` says.

    ``transformers`` makes random parameters for those that are missing, and only logs that.

    Args:
        kind: a model's class, or one such as ``AutoModelForCausalLM``.
        source: where it is.
        options: further arguments of ``from_pretrained``.

    Raises:
        CheckpointError: a tensor is missing, or has another shape than the model's; the text names it.
    """
    import torch

    with BUILDING, _own_words():
        model, report = kind.from_pretrained(
            source.name,
            **source.options,
            **options,
            use_safetensors=True,  # other formats would be unpickled
            dtype=_kept.get() or torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    check_complete(model, source.name, report["missing_keys"], report["mismatched_keys"])
    unknown = sorted(report["unexpected_keys"])
    if unknown:
        logger.warning(
            "the checkpoint %s has %s that %s does not use, and that no checkpoint of it will have: %s",
            source.name,
            counted(len(unknown), "tensor"),
            type(model).__name__,
            _listed(unknown),
        )
    return model


def check_complete(
    model: torch.nn.Module, name: str, missing: Collection[str], mismatched: Collection[tuple[str, Any, Any]]
) -> None:
    """Refuse a checkpoint that does not give all of a model's tensors.

    Args:
        model: the model.
        name: the checkpoint, for people.
        missing: names of tensors that it lacks.
        mismatched: names of tensors with other shapes, with the checkpoint's and the model's shape.

    Raises:
        CheckpointError: there is one; the text names it.
    """
    found = []
    if missing:
        found.append(f"lacks {counted(len(missing), 'tensor')}: {_listed(missing)}")
    if mismatched:
        shapes = [f"{key} {list(theirs)}, not {list(ours)}" for key, theirs, ours in sorted(mismatched)]
        found.append(f"has {counted(len(shapes), 'tensor')} of another shape: {_listed(shapes)}")
    if found:
        raise CheckpointError(
            f"The checkpoint {name} does not fit {type(model).__name__}: it {'; it '.join(found)}. These would begin "
            "as random numbers. Use a complete checkpoint and a configuration that fits it, or begin with new "
            "parameters (model.config.fresh=true)."
        )


def _listed(names: Collection[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return ", ".join([*shown, *more])


@contextlib.contextmanager
def _own_words() -> Iterator[None]:
    """Leave out the table in which ``transformers`` logs what :func:`load` says or refuses."""

    def without_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in str(record.msg)

    theirs = logging.getLogger("transformers.modeling_utils")
    theirs.addFilter(without_report)
    try:
        yield
    finally:
        theirs.removeFilter(without_report)
