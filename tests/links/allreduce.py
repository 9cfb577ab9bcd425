"""One rank of plain data parallelism for the comparison: torch DDP over gloo, AdamW, the recipe's model and data."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from psyche_lightning.plugins import load_plugins
from psyche_lightning.recipe import load_recipe


def main() -> None:
    """Train for some steps; prints a line of JSON with the seconds of each step and of its computing alone."""
    recipe = load_recipe(sys.argv[1])
    steps = int(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(recipe.run.seed)
    plugins = load_plugins()
    model = plugins.models()[recipe.model.name](recipe.model.options).train()
    provider = plugins.data_providers()[recipe.data.name](recipe.data.options, seed=recipe.run.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    # Not before the optimizer: what torch loads for that would keep the group's threads alive at the end.
    dist.init_process_group("gloo", timeout=timedelta(hours=4))
    rank = dist.get_rank()
    # DDP would first send the parameters of rank 0 to all, which equal seeds make needless.
    parallel = torch.nn.parallel.DistributedDataParallel(model, init_sync=False)
    for step in range(steps):
        sample = provider.samples(step * dist.get_world_size() + rank, step * dist.get_world_size() + rank + 1)[0]
        inputs = {name: tensor[None] for name, tensor in sample.items()}
        began = time.monotonic()
        with parallel.no_sync():  # what computing alone takes
            parallel(**inputs).loss.backward()
        computed = time.monotonic() - began
        optimizer.zero_grad()
        dist.barrier()
        began = time.monotonic()
        parallel(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps({"step": step, "seconds": time.monotonic() - began, "computing": computed}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
