"""Runs a function in several processes that are ranks of one process group over gloo."""

import multiprocessing
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path


def run(function, *arguments, ranks=2, timeout=60.0):
    """The results of ``function(*arguments)`` on every rank; it belongs to a module that processes can import."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank, args=(theirs, str(Path(folder, "store")), rank, ranks, timeout, function, arguments)
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        found = []
        try:
            for rank, pipe in enumerate(pipes):
                assert pipe.poll(2 * timeout), f"rank {rank} does not end"
                failed, result = pipe.recv()
                assert not failed, f"rank {rank}: {result}"
                found.append(result)
        finally:
            for process in processes:
                process.kill() if len(found) < ranks else process.join()
    return found


def _rank(pipe, store, rank, ranks, timeout, function, arguments):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
    )
    try:
        answer = False, function(*arguments)
    except Exception:
        answer = True, traceback.format_exc()
    pipe.send(answer)
    pipe.close()
    if not answer[0]:
        dist.destroy_process_group()
