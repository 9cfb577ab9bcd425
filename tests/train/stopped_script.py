"""``psyche train``, of which rank 0 gets a signal within a step, while the others are in the same one.

Arguments: the signal's number, the step, and those of the command.
"""

import itertools
import os
import sys
from typing import Any

from psyche_lightning.cli import main
from psyche_lightning.train.module import CausalModule

number, at = map(int, sys.argv[1:3])
forward, steps = CausalModule.training_step, itertools.count(1)


def training_step(module: CausalModule, batch: Any, batch_idx: int) -> Any:
    output = forward(module, batch, batch_idx)  # all ranks gather the parameters for it
    if next(steps) == at and os.environ.get("LOCAL_RANK", "0") == "0":
        os.kill(os.getpid(), number)
    return output


CausalModule.training_step = training_step  # type: ignore[method-assign]
sys.exit(main(["train", *sys.argv[3:]]))
