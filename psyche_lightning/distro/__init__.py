"""DisTrO: nodes exchange a few signs of DCT coefficients instead of gradients (spec S4, design section 5).

Usable without the rest of the package: :class:`DisTrO` is an ordinary ``torch.optim.Optimizer``.
"""

from psyche_lightning.distro.aggregate import sign_update
from psyche_lightning.distro.codec import decode, encode, payload_size
from psyche_lightning.distro.config import WIRE_VERSION, DistroConfig
from psyche_lightning.distro.layout import Layout
from psyche_lightning.distro.optimizer import DisTrO, NonFiniteGradientError
from psyche_lightning.distro.partial import Tally, decode_tally, encode_tally, merge
from psyche_lightning.distro.payload import PayloadForm
from psyche_lightning.distro.select import Votes, select

__all__ = [
    "WIRE_VERSION",
    "DisTrO",
    "DistroConfig",
    "Layout",
    "NonFiniteGradientError",
    "PayloadForm",
    "Tally",
    "Votes",
    "decode",
    "decode_tally",
    "encode",
    "encode_tally",
    "merge",
    "payload_size",
    "select",
    "sign_update",
]
