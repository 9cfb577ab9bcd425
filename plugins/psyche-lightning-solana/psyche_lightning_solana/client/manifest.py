"""The run's manifest: the manifest account holds its SHA-256, and another one its text.

A buffer of the chain's own loader, which can store programs of any size, holds the compressed text: this needs no other
program, every RPC service can read it, and closing the run returns its rent. The buffer needs no trust, because clients
accept only a text with the right digest.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey
from solders.system_program import CreateAccountWithSeedParams, create_account_with_seed

from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.manifest import MAX_MANIFEST_SIZE, manifest_text
from psyche_lightning.wire.canonical import sha256
from psyche_lightning_solana.client.reader import Account, Reader
from psyche_lightning_solana.client.sender import Sender

LOADER = Pubkey.from_string("BPFLoaderUpgradeab1e11111111111111111111111")
PLACE = "account:"
"""Prefix of a manifest address that names an account."""
HEADER = 37
"""Bytes before a buffer's content: its kind and its authority."""
WRITE_SIZE = 900
UNITS = 20_000


def _seed(run_id: str, digest: bytes) -> str:
    """One place per manifest and run: a repeated call finds it, and closing a run removes only its own."""
    return sha256(digest, run_id.encode()).hex()[:32]


def buffer_address(owner: Pubkey, run_id: str, digest: bytes) -> Pubkey:
    """The account of ``owner`` for a run's manifest."""
    return Pubkey.create_with_seed(owner, _seed(run_id, digest), LOADER)


def beginning(owner: Pubkey, run_id: str, digest: bytes, size: int, lamports: int) -> list[Instruction]:
    """Create the account for ``size`` bytes of content."""
    key = buffer_address(owner, run_id, digest)
    parameters = CreateAccountWithSeedParams(
        from_pubkey=owner,
        to_pubkey=key,
        base=owner,
        seed=_seed(run_id, digest),
        lamports=lamports,
        space=HEADER + size,
        owner=LOADER,
    )
    accounts = [AccountMeta(key, False, True), AccountMeta(owner, False, False)]
    return [create_account_with_seed(parameters), Instruction(LOADER, struct.pack("<I", 0), accounts)]


def writing(owner: Pubkey, run_id: str, digest: bytes, data: bytes) -> Iterator[tuple[int, Instruction]]:
    """The writes that fill it, with offsets."""
    accounts = [AccountMeta(buffer_address(owner, run_id, digest), False, True), AccountMeta(owner, True, False)]
    for at in range(0, len(data), WRITE_SIZE):
        part = data[at : at + WRITE_SIZE]
        yield at, Instruction(LOADER, struct.pack("<IIQ", 1, at, len(part)) + part, accounts)


def compress(manifest: dict[str, Any]) -> tuple[bytes, bytes]:
    """SHA-256 of a manifest's canonical text, and the stored text.

    Raises:
        CoordinatorError: it is not JSON, or too large (``InvalidManifest``).
    """
    text = manifest_text(manifest).encode()
    if len(text) > MAX_MANIFEST_SIZE:
        raise CoordinatorError(
            f"the manifest has {len(text)} bytes; at most {MAX_MANIFEST_SIZE} are stored", code="InvalidManifest"
        )
    return sha256(text), zlib.compress(text, 9)


def decompress(data: bytes, digest: bytes) -> dict[str, Any]:
    """The manifest with that digest.

    Raises:
        CoordinatorError: ``data`` is not that manifest (``InvalidManifest``).
    """
    try:
        text = zlib.decompressobj().decompress(data, MAX_MANIFEST_SIZE + 1)
        manifest = json.loads(text)
    except (zlib.error, ValueError, RecursionError):
        text, manifest = b"", None
    if not isinstance(manifest, dict) or sha256(text) != digest:
        raise CoordinatorError(
            f"what is stored as the run's manifest is not the one with the digest {digest.hex()[:12]}, which the run's "
            "owner set. Only that owner can store it again: `psyche run update RUN RECIPE`.",
            code="InvalidManifest",
        )
    return manifest


async def fetch(reader: Reader, digest: bytes, address: str) -> dict[str, Any]:
    """Read a run's manifest from the place that its manifest account names.

    Raises:
        CoordinatorError: it is missing or another one (``InvalidManifest``).
        RpcProblem: no service answers.
    """
    try:
        key = Pubkey.from_string(address.removeprefix(PLACE)) if address.startswith(PLACE) else None
    except ValueError:
        key = None
    if key is None:
        raise CoordinatorError(
            f"the run's manifest lies at {address[:80]!r}; this version reads it only from {PLACE}ADDRESS",
            code="InvalidManifest",
        )
    account = await reader.account(key)
    if account is None or account.owner != LOADER:
        raise CoordinatorError(
            f"the run's manifest should lie in the account {key}, and nothing is there. The run's owner stores it "
            "again with `psyche run update RUN RECIPE`.",
            code="InvalidManifest",
        )
    return decompress(account.data[HEADER:], digest)


async def store(sender: Sender, reader: Reader, run_id: str, manifest: dict[str, Any]) -> tuple[bytes, str]:
    """Put a manifest on the chain, continuing an interrupted call.

    Args:
        sender: pays, and can change or close the account later.
        reader: the RPC services.
        run_id: the run.
        manifest: the run's sections.

    Returns:
        Its digest, and its address for the manifest account.

    Raises:
        CoordinatorError: a transaction failed.
        RpcProblem: no service answers.
    """
    digest, data = compress(manifest)
    owner = sender.wallet.public
    key = buffer_address(owner, run_id, digest)
    found = await reader.account(key)
    if found is not None and len(found.data) != HEADER + len(data):
        # Another zlib version compressed it: keep it if complete.
        if _whole(found, digest):
            return digest, f"{PLACE}{key}"
        await sender.send("close manifest", [_close(key, owner)], units=UNITS)
        found = None
    if found is None:
        parts = beginning(owner, run_id, digest, len(data), await reader.rent(HEADER + len(data)))
        await sender.send("create manifest", parts, units=UNITS)
        held = bytes(len(data))
    else:
        held = found.data[HEADER:]
    for at, write in writing(owner, run_id, digest, data):
        part = data[at : at + WRITE_SIZE]
        if held[at : at + len(part)] != part:
            await sender.send("write manifest", [write], units=UNITS)
    return digest, f"{PLACE}{key}"


async def discard(sender: Sender, reader: Reader, address: str) -> bool:
    """Close the account of a manifest that the sender's wallet stored; returns whether there was one."""
    if not address.startswith(PLACE):
        return False
    key = Pubkey.from_string(address.removeprefix(PLACE))
    found = await reader.account(key)
    owner = sender.wallet.public
    if found is None or found.owner != LOADER or found.data[5:HEADER] != bytes(owner):
        return False
    await sender.send("close manifest", [_close(key, owner)], units=UNITS)
    return True


def _whole(account: Account, digest: bytes) -> bool:
    try:
        decompress(account.data[HEADER:], digest)
    except CoordinatorError:
        return False
    return True


def _close(key: Pubkey, owner: Pubkey) -> Instruction:
    accounts = [AccountMeta(key, False, True), AccountMeta(owner, False, True), AccountMeta(owner, True, False)]
    return Instruction(LOADER, struct.pack("<I", 5), accounts)
