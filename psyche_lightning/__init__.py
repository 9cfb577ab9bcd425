"""Train one model on many machines that share only the internet.

``import psyche_lightning`` registers the strategy ``"psyche"`` with Lightning's Trainer and Fabric; everything heavy
is imported when it is used.
"""

from psyche_lightning.hookspecs import hookimpl

__all__ = ["__version__", "hookimpl"]

__version__ = "0.1.0"
