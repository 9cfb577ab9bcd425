"""Vectors computed from Psyche's sources (docs/psyche.md), and the properties of what they cover."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_lightning.errors import CoordinatorError, WireError
from psyche_lightning.protocol.assignment import Lcg, assign, shuffle
from psyche_lightning.protocol.bloom import BLOOM_SIZE, Bloom, bloom_keys, fnv1a, participants_bloom
from psyche_lightning.protocol.committee import (
    Committee,
    CommitteeSelection,
    Permutation,
    decided_root,
    least_clients,
    needed_reports,
    quorum,
    round_selection,
)
from psyche_lightning.protocol.merkle import EMPTY_ROOT, merkle_proof, merkle_root, verify_proof
from psyche_lightning.protocol.state import Client, CoordinatorConfig, Round, RunState, WitnessProof, WitnessRecord
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import Identity


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


# Psyche's commitment of the payload in spec 4.4: step 7, batch 100 to 102, index bytes 05 09, one byte of signs.
COMMITMENT = sha256(struct.pack(">IQQ", 7, 100, 102), b"\x05\x09", b"\x01")


def test_vector_1_hundred_clients() -> None:
    selection = CommitteeSelection(10, 20, 30, 100, 12345)
    assert selection.seed.hex() == "e1543551249113046932741cc28f36b4bbcc542233eb5094874072d3167f160a"
    committee_key = sha256(selection.seed, b"committee")
    witness_key = sha256(selection.seed, b"witness")
    assert committee_key.hex() == "7d91c98bc4c6b1d93a8afbeda5269f1fca88b6ae2b8352a8137bb03793d8e169"
    assert witness_key.hex() == "52fdd6048c6cad936b6663b6097ffb90ff3b50158560936dcb5e19b1ee7a500e"
    assert (selection.tie_breakers, selection.verifiers, len(selection.trainers())) == (10, 27, 63)
    assert selection.witness_count == 20
    assert [selection.committee_position(i) for i in range(8)] == numbers("83 58 32 29 76 82 21 88")
    assert [selection.witness_position(i) for i in range(8)] == numbers("58 86 21 7 69 31 63 29")
    tie_breakers = [i for i in range(100) if selection.committee(i) is Committee.TIE_BREAKER]
    assert tie_breakers == numbers("19 24 43 55 58 66 67 69 77 89")
    assert selection.witnesses() == numbers("3 8 10 16 21 22 31 33 43 51 54 56 67 73 77 80 92 95 96 99")


def test_vector_1_sizes_and_errors() -> None:
    selection = CommitteeSelection(10, 5, 20, 100, 12345)
    assert (selection.tie_breakers, selection.verifiers, len(selection.trainers())) == (10, 18, 72)
    for arguments in ((10, 5, 20, 9), (0, 5, 101, 100), (0, 10, 0, 9)):
        with pytest.raises(CoordinatorError) as caught:
            CommitteeSelection(*arguments, 12345)
        assert caught.value.code == "InvalidCommitteeSelection"


def test_vector_2_four_clients() -> None:
    selection = CommitteeSelection(0, 1, 0, 4, 42)
    assert selection.seed.hex() == "ed049108bc18f2c64369e8d0ea42850bdd1a7d1dd340cfde716315579702a76c"
    assert [selection.witness_position(i) for i in range(4)] == [0, 2, 1, 3]
    assert [selection.committee_position(i) for i in range(4)] == [0, 2, 1, 3]
    assert selection.witnesses() == [0]


def test_vector_3_permutation() -> None:
    zero = Permutation(bytes(32), 10)
    assert [zero(i) for i in range(10)] == numbers("9 7 4 1 8 0 5 6 3 2")
    assert Permutation(b"\x01" * 32, 100)(5) == 79
    assert Permutation(b"\x02" * 32, 100)(5) == 19
    with pytest.raises(IndexError):
        zero(10)


@settings(max_examples=30)
@given(st.integers(1, 600), st.binary(min_size=32, max_size=32))
def test_the_permutation_is_one_to_one(size: int, key: bytes) -> None:
    permutation = Permutation(key, size)
    assert sorted(permutation(i) for i in range(size)) == list(range(size))


def test_vector_4_lcg() -> None:
    generator = Lcg(12345)
    assert [generator.next() for _ in range(5)] == numbers(
        "2021368500568277588 4895494634720187923 16336879138292273062 15416634109187857277 6006832857977215304"
    )


def test_vector_5_shuffle() -> None:
    assert shuffle(range(1, 6), 42) == [2, 5, 3, 1, 4]
    assert shuffle(range(1, 6), 43) == [3, 5, 1, 2, 4]


def test_vector_6_assignment() -> None:
    def shares(clients: int, total: int, seed: int = 0, index: int = 0) -> list[tuple[int, int, int]]:
        found = assign(seed, index, total, CommitteeSelection(0, 0, 0, clients, seed))
        return [(client, start, stop - 1) for client, start, stop in found]  # the vector has first and last ids

    assert shares(4, 100) == [(0, 0, 24), (2, 25, 49), (1, 50, 74), (3, 75, 99)]
    assert [(client, end - start + 1) for client, start, end in shares(5, 13)] == [
        (3, 3),
        (0, 3),
        (1, 3),
        (4, 2),
        (2, 2),
    ]
    many = shares(23, 384)
    assert [end - start + 1 for _, start, end in many] == [17] * 16 + [16] * 7
    assert [client for client, _, _ in many] == numbers("18 5 10 20 3 17 9 19 2 14 12 4 13 15 11 21 7 6 1 22 16 8 0")
    assert shares(4, 10, seed=42, index=100) == [(0, 100, 102), (3, 103, 105), (2, 106, 107), (1, 108, 109)]


@given(st.integers(0, 40), st.integers(0, 100), st.integers(0, 2**64 - 1), st.integers(0, 10**9))
def test_shares_cover_the_round_once(clients: int, total: int, seed: int, index: int) -> None:
    shares = assign(seed, index, total, CommitteeSelection(0, 0, 0, clients, seed))
    ids = [i for _, start, stop in shares for i in range(start, stop)]
    assert ids == (list(range(index, index + total)) if clients else [])
    assert len({client for client, _, _ in shares}) == len(shares) == min(clients, total)


def test_vector_7_sha256() -> None:
    assert sha256(b"Hello, ", b"world!").hex() == "315f5bdb76d078c43b8ac0064e4a0164612b1fce77c869345bfc94c75894edd3"


def test_vector_8_bloom() -> None:
    bloom = Bloom((1, 2), words=8)
    bloom.add(b"\x01\x02\x03")
    assert bloom.positions(b"\x01\x02\x03") == (159, 6)
    words = struct.unpack("<8Q", bloom.to_bytes()[16:])
    assert (words[0], words[2]) == (0x40, 0x80000000)
    assert sum(words) == 0x40 + 0x80000000
    assert bloom.positions(b"\x04\x05\x06") == (344, 105)
    assert b"\x01\x02\x03" in bloom
    assert b"\x04\x05\x06" not in bloom
    assert fnv1a(1, b"\x01\x02\x03") == 0x6CB000005C49F
    wide = Bloom(range(1, 9))
    assert list(wide.positions(COMMITMENT)) == numbers("654 1001 564 439 946 669 552 267")
    assert list(wide.positions(sha256(bytes(32)))) == numbers("842 889 372 579 726 997 576 927")


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=20), st.integers(0, 2**64 - 1))
def test_bloom_holds_what_was_added_and_round_trips(items: list[bytes], seed: int) -> None:
    bloom = Bloom.of(seed, items)
    again = Bloom.from_bytes(bloom.to_bytes())
    assert len(bloom.to_bytes()) == BLOOM_SIZE == 192
    assert (again.keys, again.bits) == (bloom_keys(seed), bloom.bits)
    assert all(item in again for item in items)


def test_bloom_of_participants_names_the_signers() -> None:
    bloom = Bloom.from_bytes(participants_bloom(7, [b"a" * 32, b"b" * 32]))
    assert sha256(b"a" * 32) in bloom
    assert sha256(b"c" * 32) not in bloom
    with pytest.raises(WireError, match="192"):
        Bloom.from_bytes(bytes(191))


def test_vector_9_merkle() -> None:
    words = b"my very eager mother just served us nine pizzas make prime".split()
    assert merkle_root(words).hex() == "b40c847546fdceea166f927fc46c5ca33c3638236a36275c1346d3dffb84e1bc"
    assert merkle_root([b"test"]).hex() == "dbebd10e61bc8c28591273feafbbef95d544f874693301d8f7f8e54c6e30058e"
    assert merkle_root([b"a", b"b"]).hex() == "b137985ff484fb600db93107c77b0365c80d78f5b429ded0fd97361d077999eb"
    assert merkle_root([]) == EMPTY_ROOT == bytes(32)
    assert sha256(EMPTY_ROOT).hex().startswith("66687aad")
    assert sha256(EMPTY_ROOT).hex().endswith("2925")


@given(st.lists(st.binary(max_size=8), min_size=1, max_size=20, unique=True), st.data())
def test_merkle_proofs_prove_their_item_only(items: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(items) - 1))
    root = merkle_root(items)
    proof = merkle_proof(items, index)
    assert verify_proof(root, items[index], proof)
    assert not verify_proof(root, items[index] + b"x", proof)
    assert not verify_proof(sha256(root), items[index], proof)
    with pytest.raises(IndexError):
        merkle_proof(items, len(items))


def test_vector_10_signature() -> None:
    assert COMMITMENT.hex() == "0ab629f1a342c3cd5e8fbceabe95acbc4d6ae65cf8e6b770e805867508e7842d"
    identity = Identity(b"\x07" * 32)
    assert identity.public.hex() == "ea4a6c63e29c520abef5507b132ec5f9954776aebebe7b92421eea691446d22c"
    assert identity.sign_raw(COMMITMENT).hex() == (
        "a041bc4fa685f3dd5fb49707db81507d2e91f0278a78c906a800a54fd9f567c8"
        "ac0df6091eaeec99666225166867d055f3a0d7c56347eb597244de7757a4c60e"
    )


def test_quorum_is_more_than_half() -> None:
    table = {1: 1, 2: 2, 3: 2, 4: 3, 5: 3, 6: 4, 7: 4, 8: 5, 9: 6, 10: 6, 12: 8, 16: 10, 24: 16, 31: 20, 32: 21}
    assert {n: quorum(n) for n in table} == table
    assert all(2 * quorum(n) > n for n in range(1, 500))


def test_enough_is_counted_over_everybody_with_whom_the_epoch_began() -> None:
    clients = tuple(Client(bytes([i]) * 32, bytes([i]) * 32) for i in range(1, 41))
    for present, gone, seats, needed, least in (
        (7, 0, 0, 4, 4),
        (4, 3, 0, 4, 4),  # who left still counts
        (7, 0, 3, 2, 4),
        (2, 0, 0, 2, 2),
        (40, 0, 0, 21, 26),  # at most 32 witness
        (1, 0, 0, 1, 1),
    ):
        config = CoordinatorConfig(witness_nodes=seats)
        state = RunState("r", config=config, clients=clients[:present], exited_clients=clients[present:][:gone])
        assert (needed_reports(state), least_clients(state)) == (needed, least)
    state = RunState("r", config=CoordinatorConfig(min_clients=5, init_min_clients=5), clients=clients[:6])
    assert least_clients(state) == 5


def test_a_round_is_decided_by_enough_equal_roots() -> None:
    def round_of(*roots: bytes) -> Round:
        return Round(witnesses=tuple(WitnessRecord(WitnessProof(i, i), root) for i, root in enumerate(roots)))

    one, two = b"1" * 32, b"2" * 32
    assert decided_root(round_of(), 1) is None
    assert decided_root(round_of(one, two), 2) is None
    assert decided_root(round_of(one, two, two), 3) is None
    assert decided_root(round_of(one, two, two), 2) == two
    assert decided_root(round_of(EMPTY_ROOT, EMPTY_ROOT), 2) == EMPTY_ROOT


def test_a_proof_must_match_the_shuffle() -> None:
    selection = CommitteeSelection(0, 2, 0, 5, 9)
    seats = selection.witnesses()
    assert len(seats) == 2
    for index in range(5):
        assert selection.verify_witness(selection.witness_proof(index)) == (index in seats)
    proof = selection.witness_proof(seats[0])
    assert not selection.verify_witness(WitnessProof(proof.position + 1, proof.index))
    assert not selection.verify_witness(WitnessProof(proof.position, 5))
    assert not selection.verify_witness(WitnessProof(proof.position, -1))
    assert not selection.verify_witness(WitnessProof(proof.position, proof.index, witness=False))


def test_everyone_witnesses_up_to_32() -> None:
    assert CommitteeSelection(0, 0, 0, 3, 1).witnesses() == [0, 1, 2]
    assert len(CommitteeSelection(0, 0, 0, 40, 1).witnesses()) == 32
    config = CoordinatorConfig(witness_nodes=4, min_clients=4, init_min_clients=4)
    assert round_selection(Round(clients=(bytes(32),) * 2), config).witness_count == 2
