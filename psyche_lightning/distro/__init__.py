"""DisTrO: nodes exchange a few signs of DCT coefficients instead of gradients.

It works without the rest of the package: :class:`DisTrO` is an ordinary ``torch.optim.Optimizer``. Each name is
imported at first use, so :class:`DistroConfig` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psyche_lightning.distro.aggregate import sign_update
    from psyche_lightning.distro.codec import decode, encode, payload_size
    from psyche_lightning.distro.config import STEPS_VERSION, WIRE_VERSION, DistroConfig
    from psyche_lightning.distro.layout import Layout
    from psyche_lightning.distro.local import LocalSteps, shared_optimizer
    from psyche_lightning.distro.optimizer import DisTrO, NonFiniteGradientError
    from psyche_lightning.distro.partial import Tally, decode_tally, encode_tally, merge
    from psyche_lightning.distro.payload import PayloadCodec
    from psyche_lightning.distro.sharded import ShardedDisTrO
    from psyche_lightning.distro.votes import Votes, select

__all__ = [
    "STEPS_VERSION",
    "WIRE_VERSION",
    "DisTrO",
    "DistroConfig",
    "Layout",
    "LocalSteps",
    "NonFiniteGradientError",
    "PayloadCodec",
    "ShardedDisTrO",
    "Tally",
    "Votes",
    "decode",
    "decode_tally",
    "encode",
    "encode_tally",
    "merge",
    "payload_size",
    "select",
    "shared_optimizer",
    "sign_update",
]

_MODULES = {
    "aggregate": ("sign_update",),
    "codec": ("decode", "encode", "payload_size"),
    "config": ("STEPS_VERSION", "WIRE_VERSION", "DistroConfig"),
    "layout": ("Layout",),
    "local": ("LocalSteps", "shared_optimizer"),
    "optimizer": ("DisTrO", "NonFiniteGradientError"),
    "partial": ("Tally", "decode_tally", "encode_tally", "merge"),
    "payload": ("PayloadCodec",),
    "sharded": ("ShardedDisTrO",),
    "votes": ("Votes", "select"),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
