import copy
import json
import logging
import pickle
import traceback

import pytest
from psyche_lightning_solana.client.wallet import PATH_VARIABLE, SECRET_VARIABLE, Wallet, create
from solders.keypair import Keypair
from solders.message import MessageV0

from psyche_lightning.errors import ConfigError

KEYPAIR = Keypair.from_seed(bytes(range(32)))
NUMBERS = json.dumps(list(bytes(KEYPAIR)))


def write(path, text, mode=0o600):
    path.write_text(text)
    path.chmod(mode)
    return path


def test_reads_solana_cli_files_and_both_forms_in_the_environment(tmp_path):
    path = write(tmp_path / "id.json", NUMBERS)
    for wallet in (
        Wallet.load(path, {}),
        Wallet.load(None, {PATH_VARIABLE: str(path)}),
        Wallet.load(None, {SECRET_VARIABLE: NUMBERS}),
        Wallet.load(None, {SECRET_VARIABLE: str(KEYPAIR), PATH_VARIABLE: "/nowhere"}),
    ):
        assert wallet.public == KEYPAIR.pubkey()


def test_signatures_verify():
    message = MessageV0.default()
    wallet = Wallet(KEYPAIR)
    from solders.message import to_bytes_versioned

    assert wallet.sign(message).verify(wallet.public, to_bytes_versioned(message))


def test_a_new_wallet_is_the_owners_alone_and_never_overwrites(tmp_path):
    path = tmp_path / "deep" / "id.json"
    wallet = create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Wallet.load(path, {}).public == wallet.public
    with pytest.raises(ConfigError, match="exists already"):
        create(path)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_file_that_others_can_read_is_refused(tmp_path, mode):
    path = write(tmp_path / "id.json", NUMBERS, mode)
    with pytest.raises(ConfigError, match=r"other users can read.*chmod 600"):
        Wallet.load(path, {})


def test_missing_files_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no wallet .*none\.json.*keygen"):
        Wallet.load(tmp_path / "none.json", {})
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=f"neither {SECRET_VARIABLE} nor {PATH_VARIABLE} is set"):
        Wallet.load(None, {})
    with pytest.raises(ConfigError, match="cannot read"):
        Wallet.load(tmp_path, {})


SECRET = bytes(KEYPAIR)
FORGED = [*SECRET[:32], *bytes(Keypair().pubkey())]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        NUMBERS[:-20],
        NUMBERS[:-1],
        json.dumps([*SECRET, 0]),
        json.dumps([256, *SECRET[1:]]),
        json.dumps([1.0, *SECRET[1:]]),
        json.dumps({"key": list(SECRET)}),
        json.dumps(FORGED),
        str(KEYPAIR)[:-3],
        "0OIl" + str(KEYPAIR),
        "[" * 3000,
    ],
)
def test_what_is_no_key_pair_is_refused_without_showing_any_of_it(tmp_path, text):
    path = write(tmp_path / "id.json", text)
    with pytest.raises(ConfigError, match="is not a wallet") as caught:
        Wallet.load(path, {})
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value.__context__ and str(caught.value))
    assert str(list(SECRET))[1:40] not in shown
    assert str(KEYPAIR)[:12] not in shown


def test_the_secret_shows_nowhere(caplog, tmp_path):
    wallet = Wallet.load(write(tmp_path / "id.json", NUMBERS), {})
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("x").debug("%r %s %r", wallet, wallet, {"wallet": wallet})
    shown = caplog.text + repr(wallet) + str(wallet)
    assert str(KEYPAIR) not in shown
    assert str(wallet.public) in shown
    assert not hasattr(wallet, "__dict__")
    for leak in (pickle.dumps, copy.copy, copy.deepcopy, lambda w: json.dumps(w, default=vars)):
        with pytest.raises(TypeError):
            leak(wallet)
