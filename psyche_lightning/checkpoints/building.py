"""One thread of a process at a time builds or loads a model."""

from __future__ import annotations

import threading

BUILDING = threading.RLock()
"""Held while a model is built or loaded.

Meanwhile ``transformers`` and ``torch`` change what all threads share: the default dtype, the generator of random
numbers, the functions that initialize and tie weights. Two threads that change it at once put back what the other had
put there, and so it would stay: a process whose models no longer tie their weights, for instance.
"""
