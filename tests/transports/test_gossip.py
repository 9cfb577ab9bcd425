from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_lightning.errors import WireError
from psyche_lightning.protocol.messages import MAX_MESSAGE_SIZE
from psyche_lightning.transports.framing import Kind
from psyche_lightning.transports.gossip import FANOUT, MAX_HOPS, RECENT, RECENT_BYTES, Gossip, Rumor

HEADER = 5


def always(message: bytes) -> bool:
    return True


class Village:
    """Nodes that gossip along the edges of a graph."""

    def __init__(self, count: int, edges: set[frozenset[int]], seed: int) -> None:
        rng = random.Random(seed)
        self.keys = [rng.randbytes(32) for _ in range(count)]
        self.near = [
            {self.keys[b] for b in range(count) if b != a and frozenset((a, b)) in edges} for a in range(count)
        ]
        self.nodes = [Gossip(key, rng) for key in self.keys]
        self.taken: list[list[bytes]] = [[] for _ in range(count)]
        self.refusing: set[int] = set()
        self.frames = 0

    def peers(self, a: int) -> set[bytes]:
        return set(self.keys) - {self.keys[a]}

    def pass_on(self, deliveries: list[tuple[int, bytes, bytes]]) -> None:
        """Carry frames until nobody has anything to say; ``(sender, receiver, frame)``."""
        under_way = deque(deliveries)
        while under_way:
            self.frames += 1
            sender, receiver, data = under_way.popleft()
            at = self.keys.index(receiver)
            assert receiver in self.near[sender], "only along edges"
            assert data[4] == Kind.GOSSIP

            def take(message: bytes, at: int = at) -> bool:
                self.taken[at].append(message)
                return at not in self.refusing

            peers, near = self.peers(at), self.near[at]
            told = self.nodes[at].receive(data[HEADER:], self.keys[sender], 0.0, peers, near, always, take)
            under_way.extend((at, key, frame) for key, frame in told)

    def say(self, a: int, message: bytes) -> None:
        near = self.near[a]
        self.pass_on([(a, *one) for one in self.nodes[a].broadcast(message, 0.0, near, self.peers(a) - near)])

    def whisper(self, a: int, b: int, message: bytes) -> None:
        self.pass_on([(a, *one) for one in self.nodes[a].send_via_others(self.keys[b], message, 0.0, self.near[a])])


def full(count: int) -> set[frozenset[int]]:
    return {frozenset((a, b)) for a in range(count) for b in range(a)}


def distances(count: int, edges: set[frozenset[int]], start: int) -> dict[int, int]:
    found, front = {start: 0}, [start]
    while front:
        front = [b for a in front for b in range(count) if frozenset((a, b)) in edges and b not in found]
        for b in front:
            found.setdefault(b, 1 + max(found.values()))
        front = list(dict.fromkeys(front))
    return found


@settings(max_examples=60)
@given(data=st.data(), count=st.integers(2, 6), seed=st.integers(0, 1000))
def test_every_reachable_node_acts_on_a_message_once(data: st.DataObject, count: int, seed: int) -> None:
    edges = data.draw(st.sets(st.sampled_from(sorted(full(count), key=sorted))))
    village = Village(count, edges, seed)
    village.say(0, b"news")
    reach = distances(count, edges, 0)
    for at in range(1, count):
        heard = village.taken[at]
        assert heard == ([b"news"] if at in reach else []), "in a village this small, neighbours are all asked"
    assert village.taken[0] == []


def test_in_a_full_mesh_nobody_passes_messages_on() -> None:
    village = Village(20, full(20), 1)
    village.say(3, b"news")
    assert village.frames == 19


def test_an_unreachable_node_costs_only_a_few_messages() -> None:
    edges = full(30) - {frozenset((0, 29))}
    village = Village(30, edges, 1)
    village.say(0, b"news")
    assert village.taken[29] == [b"news"]
    assert village.frames <= 28 + FANOUT


def test_a_message_follows_a_chain_up_to_the_hop_limit() -> None:
    edges = {frozenset((a, a + 1)) for a in range(9)}
    village = Village(10, edges, 1)
    village.say(0, b"news")
    reached = [at for at in range(1, 10) if village.taken[at]]
    assert reached == list(range(1, MAX_HOPS + 2))


def test_a_refused_message_is_not_passed_on() -> None:
    village = Village(3, {frozenset((0, 1)), frozenset((1, 2))}, 1)
    village.refusing.add(1)
    village.say(0, b"bad")
    assert village.taken == [[], [b"bad"], []]


def test_only_the_addressee_acts_on_a_private_message() -> None:
    village = Village(4, {frozenset((0, 1)), frozenset((1, 2)), frozenset((2, 3))}, 1)
    village.whisper(0, 3, b"hush")
    assert village.taken == [[], [], [], [b"hush"]]


def test_a_message_that_was_one_too_many_from_one_peer_is_taken_from_another() -> None:
    origin, flooder, other, own = (bytes([n]) * 32 for n in range(4))
    said = Gossip(origin, random.Random(1)).broadcast(b"news", 0.0, {other}, {own})[0][1][HEADER:]
    node, heard, peers = Gossip(own, random.Random(2)), [], {origin, flooder, other}

    def take(message: bytes) -> bool:
        heard.append(message)
        return True

    assert node.receive(said, flooder, 0.0, peers, peers, lambda message: False, take) == []
    assert heard == []
    node.receive(said, other, 0.0, peers, peers, always, take)
    assert heard == [b"news"]


def test_messages_of_a_former_peer_are_ignored() -> None:
    origin, middle, far = (bytes([n]) * 32 for n in range(3))
    said = Gossip(origin, random.Random(1)).broadcast(b"news", 0.0, {middle}, {far})
    heard: list[bytes] = []
    node = Gossip(far, random.Random(2))
    taken = lambda message: bool(heard.append(message))  # noqa: E731
    node.receive(said[0][1][HEADER:], middle, 0.0, {middle}, {middle}, always, taken)
    assert not heard


def test_a_new_link_gets_recent_and_undelivered_messages() -> None:
    a, b, c, d = (bytes([n]) * 32 for n in range(4))
    one, two = Gossip(a, random.Random(1)), Gossip(b, random.Random(2))
    (heard,) = one.broadcast(b"for all", 100.0, {b}, {c, d})
    two.receive(heard[1][HEADER:], a, 100.0, {a, c, d}, {a}, always, lambda message: True)
    two.broadcast(b"from b", 100.0, {a}, {c, d})
    assert [Rumor.decode(frame[HEADER:]).message for frame in two.repeat(c, 101.0)] == [b"for all", b"from b"]
    assert [Rumor.decode(frame[HEADER:]).message for frame in two.repeat(a, 101.0)] == [b"from b"]
    assert two.repeat(c, 101.0 + RECENT) == []


def test_memory_is_bounded() -> None:
    one = Gossip(b"a" * 32, random.Random(1))
    for number in range(100):
        one.broadcast(bytes([number]) * 60_000, float(number) / 100, set(), set())
    assert sum(map(len, one.repeat(b"b" * 32, 1.0))) <= RECENT_BYTES + 120_000


@given(
    number=st.integers(0, 2**64 - 1),
    hops=st.integers(1, MAX_HOPS),
    private=st.booleans(),
    names=st.sets(st.binary(min_size=8, max_size=8), min_size=1, max_size=32),
    message=st.binary(max_size=200),
)
def test_rumors_round_trip(number: int, hops: int, private: bool, names: set[bytes], message: bytes) -> None:
    rumor = Rumor(number, hops, private, b"o" * 32, tuple(sorted(names)), message)
    assert Rumor.decode(rumor.frame()[HEADER:]) == rumor


@given(st.binary(max_size=400))
def test_other_bytes_are_refused_or_canonical(body: bytes) -> None:
    try:
        rumor = Rumor.decode(body)
    except WireError:
        return
    assert rumor.frame()[HEADER:] == body


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda body: body[:42], "its head alone"),
        (lambda body: body[:8] + b"\0" + body[9:], "hops 0"),
        (lambda body: body[:8] + b"\5" + body[9:], "hops 5"),
        (lambda body: body[:9] + b"\2" + body[10:], "private 2"),
        (lambda body: body[:10] + b"\xff" + body[11:], "255 names"),
        (lambda body: body[:10] + b"\3" + body[11:51], "3 names"),
        (lambda body: body[:9] + b"\1\0" + body[11:], "missing or not"),
        (lambda body: body[:43] + body[51:59] + body[43:51] + body[59:], "ascending order"),
        (lambda body: body + bytes(MAX_MESSAGE_SIZE), f"at most {MAX_MESSAGE_SIZE}"),
    ],
)
def test_malformed_rumors_are_refused_with_the_reason(change, reason: str) -> None:  # type: ignore[no-untyped-def]
    body = Rumor(1, 2, False, b"o" * 32, (b"a" * 8, b"b" * 8), b"message").frame()[HEADER:]
    with pytest.raises(WireError, match=reason):
        Rumor.decode(change(body))
