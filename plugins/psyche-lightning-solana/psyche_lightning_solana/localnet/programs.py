"""The programs that a local chain has from the start."""

from __future__ import annotations

from typing import Any

from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.system_program import CreateAccountParams, create_account

from psyche_lightning.errors import PsycheError
from psyche_lightning_solana.client.cluster import local_program
from psyche_lightning_solana.deploy import loader
from psyche_lightning_solana.localnet.chain import FINALIZED_LAG, LocalChain
from psyche_lightning_solana.localnet.clock import SlotClock
from psyche_lightning_solana.localnet.errors import error_text
from psyche_lightning_solana.toolchain.build import PROGRAMS

PIECE = 900
INSTALL_SLOTS = 16
"""More than installing our programs takes."""


def install(chain: LocalChain, program: Keypair, image: bytes) -> bool:
    """Deploy a program, or upgrade it, with the faucet as its authority; through the loader, so that it is verified.

    A slot passes, after which the program can be used.

    Args:
        chain: which.
        program: the program's key pair.
        image: an ELF shared object.

    Returns:
        Whether there was anything to do.

    Raises:
        PsycheError: the loader refuses the program.
    """
    key, faucet, buffer = program.pubkey(), chain.faucet, Keypair()
    payer, place = faucet.pubkey(), buffer.pubkey()
    present = loader.read_code(chain.account(loader.code_address(key)))
    if present is not None and present.holds(image):
        return False

    def made(account: Keypair, size: int) -> Instruction:
        rent = chain.vm.minimum_balance(size)
        return create_account(
            CreateAccountParams(
                from_pubkey=payer, to_pubkey=account.pubkey(), lamports=rent, space=size, owner=loader.LOADER
            )
        )

    size = loader.BUFFER_META + len(image)
    _land(chain, [made(buffer, size), loader.initialize_buffer(place, payer)], faucet, buffer)
    for offset, piece in loader.pieces(image, PIECE):
        _land(chain, [loader.write(place, payer, offset, piece)], faucet)
    if present is None:
        deploy = loader.deploy(payer, key, place, payer, len(image))
        _land(chain, [made(program, loader.PROGRAM_SIZE), deploy], faucet, program)
    else:
        if len(image) > len(present.image):
            _land(chain, [loader.extend(key, payer, len(image) - len(present.image))], faucet)
            chain.advance()  # an extension, too, is a change that takes a slot
        _land(chain, [loader.upgrade(key, place, payer, payer)], faucet)
    chain.advance()
    return True


def fresh_chain(clock: SlotClock, *, programs: bool = True, **settings: Any) -> tuple[LocalChain, dict[str, Pubkey]]:
    """A new chain, with our programs on it and all of that finalized.

    Args:
        clock: how its slots pass; where it begins is set here.
        programs: whether to install the programs.
        settings: further arguments of :class:`LocalChain`.

    Returns:
        The chain, and the programs' addresses by name.
    """
    now, lag = clock.unix_ms(), settings.get("finalized_lag", FINALIZED_LAG)
    clock.begin(0, now - (lag + INSTALL_SLOTS) * clock.slot_ms)
    chain = LocalChain(clock, **settings)
    installed = install_ours(chain) if programs else {}
    chain.advance(lag + INSTALL_SLOTS - chain.slot)
    return chain, installed


def install_ours(chain: LocalChain) -> dict[str, Pubkey]:
    """Install the programs that this distribution has, at the addresses by which clients know them on a local chain.

    Returns:
        Their addresses by name.
    """
    addresses = {}
    for path in sorted(PROGRAMS.glob("*.so")):
        keypair = local_program(path.stem)
        install(chain, keypair, path.read_bytes())
        addresses[path.stem] = keypair.pubkey()
    return addresses


def _land(chain: LocalChain, instructions: list[Instruction], *signers: Keypair) -> None:
    outcome = chain.submit(chain.sign(instructions, *signers))
    if outcome.err is not None:
        reasons = [line for line in outcome.logs if " invoke [" not in line and not line.endswith(" success")]
        raise PsycheError(
            f"the chain does not take the program: {error_text(outcome.err, outcome.logs)}. {' '.join(reasons)}".strip()
        )
