"""Hand-made payloads that an attacker might send; each is refused with its reason."""

import tracemalloc

import pytest

from psyche_lightning.distro import DistroConfig, decode
from psyche_lightning.errors import PayloadError

CONFIG = DistroConfig(chunk=8, k=2)
HEADER = bytes.fromhex("0103000200000001")


def chunk(bits: str) -> bytes:
    """16 bits: two low fields of 5, 4 high bits in unary, 2 signs."""
    return int(bits.replace(" ", ""), 2).to_bytes(2, "big")


def test_the_untouched_payload_is_accepted():
    votes = decode(HEADER + chunk("00011 01000 1010 01"), 1, CONFIG)
    assert (votes.positions.tolist(), votes.signs.tolist()) == ([[3, 40]], [[1, -1]])


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "ends after 0 bytes"),
        (HEADER[:7], "ends after 7 bytes"),
        (b"\x02" + HEADER[1:] + chunk("00011 01000 1010 01"), "version 2; this program reads version 1"),
        (b"\x01\x06" + HEADER[2:] + bytes(2), "log2 of the chunk side is 6; this run's is 3"),
        (b"\x01\x03\xff\xff" + HEADER[4:] + bytes(2), "k is 65535; this run's is 2"),
        (HEADER[:4] + b"\xff\xff\xff\xff" + bytes(2), "number of chunks is 4294967295; this run's is 1"),
        (HEADER, "has 8 bytes; 10 are expected"),
        (HEADER + bytes(1), "has 9 bytes; 10 are expected"),
        (HEADER + bytes(3), "has 11 bytes; 10 are expected"),
        (HEADER + chunk("00011 01000 1000 01"), "chunk 0 .*another number of high bits"),
        (HEADER + chunk("00011 01000 1110 01"), "chunk 0 .*another number of high bits"),
        (HEADER + chunk("00011 01000 1001 01"), "chunk 0 .*beyond its 64 coefficients"),
        (HEADER + chunk("00011 00000 1001 01"), "chunk 0 .*beyond its 64 coefficients"),
        (HEADER + chunk("00011 00011 1100 00"), "chunk 0 .*do not ascend"),
        (HEADER + chunk("00100 00011 1100 00"), "chunk 0 .*do not ascend"),
        (HEADER + chunk("00000 00000 0000 01"), "casts no votes but is not all zeros"),
        (HEADER + chunk("00001 00000 0000 00"), "casts no votes but is not all zeros"),
    ],
)
def test_refused(payload, reason):
    with pytest.raises(PayloadError, match=reason):
        decode(payload, 1, CONFIG)


def test_padding_bits_must_be_zero():
    config = DistroConfig(chunk=8, k=3)  # three low fields of 4, 7 high bits, 3 signs: 22 bits
    payload = bytes.fromhex("0103000300000001") + bytes(3)
    decode(payload, 1, config)
    with pytest.raises(PayloadError, match="not padded with zeros"):
        decode(payload[:-1] + b"\x01", 1, config)


def test_a_huge_claim_allocates_nothing():
    payload = HEADER[:4] + b"\xff\xff\xff\xff" + bytes(100)
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError):
            decode(payload, 1, CONFIG)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
