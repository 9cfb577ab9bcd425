"""The upgradeable loader's instructions and accounts (``solana-loader-v3-interface``; bincode, little-endian)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from solders.account import Account
from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey
from solders.system_program import ID as SYSTEM_PROGRAM
from solders.sysvar import CLOCK, RENT

from psyche_lightning.wire.canonical import sha256

LOADER = Pubkey.from_string("BPFLoaderUpgradeab1e11111111111111111111111")
BUFFER_META, PROGRAM_SIZE, CODE_META = 37, 36, 45
"""Bytes before the code in a buffer, of a program account, and before the code in its data account."""
_BUFFER, _PROGRAM, _CODE = 1, 2, 3
_INITIALIZE, _WRITE, _DEPLOY, _UPGRADE, _EXTEND = 0, 1, 2, 3, 6


@dataclass(frozen=True)
class Code:
    """The loader's data of a buffer or a program.

    Attributes:
        authority: may change it; None for nobody.
        image: the bytes; a program's end with zeros if it has spare room.
        slot: a program's last change; 0 for a buffer.
    """

    authority: Pubkey | None
    image: bytes
    slot: int = 0

    def holds(self, image: bytes) -> bool:
        """Whether this is the program ``image``, followed only by spare room."""
        return self.image[: len(image)] == image and not any(self.image[len(image) :])


def code_address(program: Pubkey) -> Pubkey:
    """Address of the account that holds a program's code."""
    return Pubkey.find_program_address([bytes(program)], LOADER)[0]


def seeded_address(owner: Pubkey, *parts: bytes) -> tuple[Pubkey, str]:
    """A loader address that a wallet can derive again from the same parts, and its seed."""
    seed = sha256(b"".join(sha256(part) for part in parts)).hex()[:32]
    return Pubkey.create_with_seed(owner, seed, LOADER), seed


def read_buffer(account: Account | None) -> Code | None:
    """The content of a buffer account; None for another one."""
    if account is None or account.owner != LOADER or len(account.data) < BUFFER_META:
        return None
    data = bytes(account.data)
    return Code(_authority(data, 4), data[BUFFER_META:]) if _kind(data) == _BUFFER else None


def read_code(account: Account | None) -> Code | None:
    """The content of a program's data account; None for another one."""
    if account is None or account.owner != LOADER or len(account.data) < CODE_META:
        return None
    data = bytes(account.data)
    slot = int.from_bytes(data[4:12], "little")
    return Code(_authority(data, 12), data[CODE_META:], slot) if _kind(data) == _CODE else None


def is_program(account: Account | None) -> bool:
    """Whether an account is a program of this loader."""
    return account is not None and account.owner == LOADER and _kind(bytes(account.data)) == _PROGRAM


def _kind(data: bytes) -> int:
    return int.from_bytes(data[:4], "little")


def _authority(data: bytes, offset: int) -> Pubkey | None:
    return Pubkey(data[offset + 1 : offset + 33]) if data[offset] else None


def pieces(image: bytes, size: int, present: bytes = b"") -> Iterator[tuple[int, bytes]]:
    """The pieces of an image, with offsets, that a buffer lacks."""
    for offset in range(0, len(image), size):
        piece = image[offset : offset + size]
        if present[offset : offset + size] != piece:
            yield offset, piece


# ---------------------------------------------------------------------------------------------------------------------
# Instructions
# ---------------------------------------------------------------------------------------------------------------------


def initialize_buffer(buffer: Pubkey, authority: Pubkey) -> Instruction:
    """Initialize a buffer."""
    return Instruction(LOADER, struct.pack("<I", _INITIALIZE), [_writable(buffer), _readonly(authority)])


def write(buffer: Pubkey, authority: Pubkey, offset: int, data: bytes) -> Instruction:
    """Write a piece into a buffer."""
    header = struct.pack("<IIQ", _WRITE, offset, len(data))
    return Instruction(LOADER, header + data, [_writable(buffer), _signer(authority)])


def deploy(payer: Pubkey, program: Pubkey, buffer: Pubkey, authority: Pubkey, room: int) -> Instruction:
    """Deploy a buffer's content as a new program with the given room."""
    accounts = [
        _signer(payer, writable=True),
        _writable(code_address(program)),
        _writable(program),
        _writable(buffer),
        _readonly(RENT),
        _readonly(CLOCK),
        _readonly(SYSTEM_PROGRAM),
        _signer(authority),
    ]
    return Instruction(LOADER, struct.pack("<IQ", _DEPLOY, room), accounts)


def upgrade(program: Pubkey, buffer: Pubkey, authority: Pubkey, spill: Pubkey) -> Instruction:
    """Replace a program by a buffer's content; ``spill`` gets the buffer's lamports."""
    accounts = [
        _writable(code_address(program)),
        _writable(program),
        _writable(buffer),
        _writable(spill),
        _readonly(RENT),
        _readonly(CLOCK),
        _signer(authority),
    ]
    return Instruction(LOADER, struct.pack("<I", _UPGRADE), accounts)


def extend(program: Pubkey, payer: Pubkey, more: int) -> Instruction:
    """Extend a program's room by some bytes."""
    accounts = [
        _writable(code_address(program)),
        _writable(program),
        _readonly(SYSTEM_PROGRAM),
        _signer(payer, writable=True),
    ]
    return Instruction(LOADER, struct.pack("<II", _EXTEND, more), accounts)


def _writable(key: Pubkey) -> AccountMeta:
    return AccountMeta(key, is_signer=False, is_writable=True)


def _readonly(key: Pubkey) -> AccountMeta:
    return AccountMeta(key, is_signer=False, is_writable=False)


def _signer(key: Pubkey, *, writable: bool = False) -> AccountMeta:
    return AccountMeta(key, is_signer=True, is_writable=writable)
