"""The name under which pytest-xprocess had its module before 0.20, and under which anchorpy's pytest plugin imports it.

anchorpy 0.21 has a pytest plugin, which every pytest loads wherever anchorpy is installed; where its imports fail, no
pytest starts. It does not require what it imports, so psyche-lightning-solana does. Older releases of pytest-xprocess
have this module, but say something under every run, and pytest 9 warns of them; newer ones do not have it. anchorpy's
fixtures (``localnet_fixture``, ``workspace_fixture``) need an older one; ``psyche_lightning_localnet`` replaces them.
"""

from xprocess.pytest_xprocess import getrootdir

__all__ = ["getrootdir"]
