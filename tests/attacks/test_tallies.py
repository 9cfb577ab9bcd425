"""Hand-made tallies that an attacker might send; each is refused with its reason."""

import pytest

from psyche_lightning.distro import DistroConfig, decode_tally
from psyche_lightning.errors import PayloadError

HEADER = "820300000001"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ("", "ends after 0 bytes"),
        ("0203000000010000000000000000", "another version or layout"),
        ("8206000000010000000000000000", "another version or layout"),
        (HEADER + "ffffffffffffffff", "has 18446744073709551615 votes; 2 peers have at most 8"),
        (HEADER + "000000000000000100", "has 15 bytes; 16 are expected"),
        (HEADER + "000000000000000000", "has 15 bytes; 14 are expected"),
        # one vote: 6 low bits, then 2 bits in unary, then the sign
        (HEADER + "00000000000000010000", "sets 0 high bits for 1 votes"),
        (HEADER + "00000000000000010100", "beyond its coefficients"),
        (HEADER + "00000000000000010201", "not padded with zeros"),
        # two votes: 5 low bits each, then 4 bits in unary, then two signs
        (HEADER + "00000000000000020803", "sets 0 high bits for 2 votes"),
        (HEADER + f"0000000000000002{0b00010_00001_1100_00:04x}", "do not ascend"),
        (HEADER + f"0000000000000002{0b00001_00001_1100_01:04x}", "both signs"),
        # three votes for one coefficient by two peers: 4 low bits each, then 7 in unary, then the signs
        (HEADER + f"0000000000000003{0b0001_0001_0001_1110000_000_00:06x}", "more than 2 votes"),
    ],
)
def test_refused(payload, reason):
    with pytest.raises(PayloadError, match=reason):
        decode_tally(bytes.fromhex(payload), 1, DistroConfig(chunk=8, k=4), 2)
