"""Files with which a run's coordinator and nodes are deployed: images, charts, units, and the service of a node.

The files are templates of this package, filled in for one run. The run's join link is no part of them: it lies beside
them in a file for its owner alone, and nodes are started with ``psyche join @FILE``.
"""

from psyche_lightning.deploy.files import Kind, write

__all__ = ["Kind", "write"]
