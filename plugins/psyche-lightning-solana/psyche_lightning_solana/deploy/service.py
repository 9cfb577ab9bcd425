"""A cluster's RPC service, for commands that people type."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from solana.exceptions import SolanaRpcException
from solana.rpc.async_api import AsyncClient
from solana.rpc.commitment import Confirmed

from psyche_lightning.errors import PsycheError
from psyche_lightning_solana.client.cluster import Cluster, shown


@contextlib.asynccontextmanager
async def connect(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    """A client of the first service of a cluster that answers.

    Raises:
        PsycheError: none does, or it is another cluster.
    """
    problems = []
    for endpoint in cluster.endpoints:
        async with AsyncClient(endpoint.http, Confirmed, timeout=30) as client:
            try:
                genesis = str((await client.get_genesis_hash()).value)
            except SolanaRpcException as error:
                problems.append(f"{endpoint.name}: {error.__cause__ or error.error_msg}")
                continue
            if cluster.genesis not in (None, genesis):
                raise PsycheError(f"{shown(endpoint.http)} is not {cluster.name}: its first block is {genesis}")
            yield client
            return
    hint = " `psyche solana localnet` starts a local chain." if cluster.local else ""
    raise PsycheError(f"no RPC service of {cluster.name} answers ({'; '.join(problems)}).{hint}")
