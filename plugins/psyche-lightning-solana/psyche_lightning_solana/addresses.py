"""Program ids, and addresses derived as in Psyche's programs; the functions take the program's id."""

from __future__ import annotations

from solders.pubkey import Pubkey

from psyche_lightning.protocol.state import INCARNATION_SIZE
from psyche_lightning.wire.canonical import sha256

PSYCHE_COORDINATOR = Pubkey.from_string("4SHugWqSXwKE5fqDchkJcPEqnoZE22VYKtSTVm7axbT7")
PSYCHE_AUTHORIZER = Pubkey.from_string("PsyAUmhpmiUouWsnJdNGFSX8vZ6rWjXjgDPHsgqPGyw")
PSYCHE_TREASURER = Pubkey.from_string("EnU7DRx5az5YWxaxgqEGbXSYtudcfnjXewyBRRZCjJPw")


def _derived(program: Pubkey, *seeds: bytes) -> Pubkey:
    return Pubkey.find_program_address(seeds, program)[0]


def instance_address(program: Pubkey, run_id: str) -> Pubkey:
    """The instance account of a run, which names its coordinator account."""
    return _derived(program, b"coordinator", run_id.encode())


def manifest_address(program: Pubkey, run_id: str) -> Pubkey:
    """The manifest account of a run."""
    return _derived(program, b"manifest", run_id.encode())


def incarnation(coordinator_account: bytes) -> bytes:
    """The incarnation of a run, 16 bytes: of the account's address, which its creator draws anew for each run."""
    return sha256(b"psyche-lightning incarnation 1", coordinator_account)[:INCARNATION_SIZE]


def node_address(program: Pubkey, run_id: str, wallet: Pubkey) -> Pubkey:
    """The account that holds the address of that wallet's node."""
    return _derived(program, b"address", run_id.encode(), bytes(wallet))


def authorization_address(authorizer: Pubkey, grantor: Pubkey, grantee: Pubkey, scope: bytes) -> Pubkey:
    """The authorization of ``grantee`` (zero: everybody) by ``grantor``."""
    return _derived(authorizer, b"Authorization", bytes(grantor), bytes(grantee), scope)


def treasurer_index(run_id: str) -> int:
    """The conventional index of a run's treasurer: LE64 of S(run id)."""
    return int.from_bytes(sha256(run_id.encode())[:8], "little")


def treasurer_run_address(treasurer: Pubkey, index: int) -> Pubkey:
    """The treasurer's account of a run."""
    return _derived(treasurer, b"Run", index.to_bytes(8, "little"))


def participant_address(treasurer: Pubkey, run: Pubkey, user: Pubkey) -> Pubkey:
    """The treasurer's account of a user's claims."""
    return _derived(treasurer, b"Participant", bytes(run), bytes(user))
