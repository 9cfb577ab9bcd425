import pytest
from psyche_lightning_solana.client.cluster import CLUSTERS, Options, local_program, parse, shown_url

from psyche_lightning.errors import ConfigError

ID = "4SHugWqSXwKE5fqDchkJcPEqnoZE22VYKtSTVm7axbT7"


def test_the_local_chain_needs_nothing_more():
    cluster = parse("solana:localnet", {}, {})
    assert [(end.http, end.ws) for end in cluster.endpoints] == [("http://127.0.0.1:8899", "ws://127.0.0.1:8900")]
    assert cluster.local
    assert cluster.program() == local_program("coordinator").pubkey()
    assert len({str(cluster.program(name)) for name in ("coordinator", "authorizer", "treasurer")}) == 3


def test_several_services_and_their_websockets():
    cluster = parse("solana:https://a.example/x?key=1,http://b.example:81#ws=wss://s.example&program=" + ID, {}, {})
    assert [(end.http, end.ws) for end in cluster.endpoints] == [
        ("https://a.example/x?key=1", "wss://s.example"),
        ("http://b.example:81", "ws://b.example:82"),
    ]
    assert str(cluster.program()) == ID


def test_options_come_from_url_before_mapping_before_environment():
    environment = {"PSYCHE_SOLANA_POLL": "9", "PSYCHE_SOLANA_COMPUTE_LIMIT": "7", "PSYCHE_SOLANA_PROGRAM": ID}
    cluster = parse("solana:devnet#poll=1.5", {"compute_limit": 8, "poll": 3}, environment)
    assert (cluster.options.poll, cluster.options.compute_limit, cluster.options.program) == (1.5, 8, ID)
    assert cluster.genesis == CLUSTERS["devnet"][1]


def test_own_services_of_a_public_cluster_replace_the_public_one_but_not_its_first_block():
    cluster = parse("solana:mainnet", {"rpc": "https://own.example"}, {})
    assert [end.http for end in cluster.endpoints] == ["https://own.example"]
    assert cluster.genesis == CLUSTERS["mainnet"][1]


def test_keys_in_urls_are_not_shown():
    url = "solana:https://me:pw@a.example/v2/SECRET?api-key=SECRET,https://b.example/SECRET#wallet=x"
    cluster = parse(url, {}, {})
    for text in (cluster.name, repr(cluster), cluster.endpoints[0].name, shown_url(url)):
        assert "SECRET" not in text
        assert "pw" not in text
    with pytest.raises(ConfigError) as caught:
        cluster.program()
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "options", "expected"),
    [
        ("solana:", {}, "localnet, devnet, mainnet"),
        ("solana:devnett", {}, "Did you mean 'devnet'"),
        ("solana:ftp://x", {}, "cannot be read"),
        ("solana:http://", {}, "cannot be read"),
        ("solana:localnet#progam=x", {}, "Did you mean 'program'"),
        ("solana:localnet#program=x", {}, "32 bytes in base58"),
        ("solana:localnet", {"poll": "soon"}, "expected a number"),
        ("solana:localnet", {"poll": 0}, "0.05 to 3600"),
        ("solana:localnet", {"compute_limit": 1_400_001}, "1 to 1400000"),
        ("solana:localnet", {"priority_fee_min": 9, "priority_fee_max": 8}, "bounded"),
        ("solana:localnet", {"commitment": "soon"}, "processed, confirmed, finalized"),
    ],
)
def test_what_cannot_be_is_explained(url, options, expected):
    with pytest.raises(ConfigError, match=expected):
        parse(url, options, {})


def test_a_public_cluster_needs_a_program():
    with pytest.raises(ConfigError, match=r"solana:devnet#program=ADDRESS.*psyche solana deploy"):
        parse("solana:devnet", {}, {}).program()


def test_the_defaults_are_bounded():
    assert 0 < Options().priority_fee_max < 1_000_000
