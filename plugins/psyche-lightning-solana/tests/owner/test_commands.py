"""``psyche run ...`` on a local chain in a process of its own, as a user types it."""

import base64
import json
import re
import subprocess
import sys
import urllib.request

import pytest
from psyche_lightning_solana.account import write_coordinator
from psyche_lightning_solana.client.wallet import create

from psyche_lightning.cli import main

OTHER = "4SHugWqSXwKE5fqDchkJcPEqnoZE22VYKtSTVm7axbT7"


@pytest.fixture(scope="module")
def chain():
    command = [sys.executable, "-m", "psyche_lightning", "solana", "localnet", "--port", "0", "--slot-ms", "50"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        found = re.search(r"http://\S+", process.stdout.readline())
        yield found[0]
        process.terminate()


def ask(chain, method, *params):
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
    request = urllib.request.Request(chain, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["result"]


@pytest.fixture
def psyche(chain, capsys, monkeypatch, tmp_path):
    """Run a command line with a funded wallet; its exit code and what it printed."""
    wallet = create(tmp_path / "owner.json")
    ask(chain, "requestAirdrop", str(wallet.public), 5 * 10**9)
    while ask(chain, "getBalance", str(wallet.public), {"commitment": "confirmed"})["value"] == 0:
        pass
    monkeypatch.setenv("PSYCHE_COORDINATOR", f"solana:{chain}")
    monkeypatch.setenv("PSYCHE_WALLET", str(tmp_path / "owner.json"))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


def test_a_run_from_its_creation_to_its_end(psyche, chain, tmp_path):
    code, text = psyche("run", "create", "r", "demo", "--twin", "--paused")
    assert code == 0, text
    assert "psyche run start r" in text
    assert "9 steps" in psyche("run", "update", "r", "total_steps=9")[1]
    assert "is open" in psyche("run", "start", "r")[1]
    for command, reason in (("update", "not halted"), ("close", "pause it first"), ("claim", "no treasurer")):
        code, text = psyche("run", command, "r", *(["total_steps=3"] if command == "update" else []))
        assert code == 1
        assert reason in text
    assert f"{OTHER} may join" in psyche("run", "authorize", "r", OTHER)[1]
    assert f"{OTHER} may not join" in psyche("run", "revoke", "r", OTHER)[1]
    assert f"{OTHER} had no authorization" in psyche("run", "revoke", "r", OTHER)[1]
    assert f"{OTHER} takes no part in run r now" in psyche("run", "kick", "r", OTHER)[1]
    assert "not a wallet's address" in psyche("run", "authorize", "r", "someone")[1]
    assert "nobody has earned" in psyche("run", "points", "r")[1]
    assert "is no digest" in psyche("run", "restart-from", "r", "0f", "0")[1]
    assert "goes on from the parameters 0f0f0f0f of step 0" in psyche("run", "restart-from", "r", "0f" * 32, "0")[1]
    assert "is paused" in psyche("run", "pause", "r")[1]
    found = json.loads(psyche("run", "status", "r", "--json")[1])
    assert (found["phase"], found["total_steps"], found["about"]["name"]) == ("paused", 9, "demo")

    # The same by the account's address, and from dumps of it.
    address = found["account"]
    assert "paused, epoch 0, 0 of 9 steps trained" in psyche("run", "status", address)[1]
    answer = ask(chain, "getAccountInfo", address, {"encoding": "base64", "commitment": "confirmed"})
    (tmp_path / "account.json").write_text(json.dumps(answer))
    (tmp_path / "account.bin").write_bytes(base64.b64decode(answer["value"]["data"][0]))
    for name in ("account.json", "account.bin"):
        text = psyche("run", "status", "--account-file", str(tmp_path / name))[1]
        assert "r: paused, epoch 0, 0 of 9 steps trained" in text
        assert "architecture: HfAuto" in text

    code, text = psyche("run", "close", "r")
    assert code == 0
    assert "SOL came back" in text
    code, text = psyche("run", "status", "r")
    assert code == 1
    assert "there is no run 'r'" in text


def test_rates_and_a_token_that_pays_points(psyche, chain):
    code, text = psyche("solana", "mint", "1000", "--url", chain)
    assert code == 0, text
    token = text.strip()
    code, text = psyche("run", "create", "paid", "demo", "--twin", "--reward-mint", token, "--rate", "90", "--paused")
    assert code == 0, text
    assert "gives 90 points to all together and takes 0 when ejecting" in psyche("run", "rates", "paid")[1]
    assert "gives 90 points to all together and takes 7" in psyche("run", "rates", "paid", "--slash", "7")[1]
    assert "holds 600 base units of its token" in psyche("run", "fund", "paid", "600")[1]
    assert "holds 400 base units of the token" in psyche("run", "fund", "paid", "401")[1]
    assert "there is nothing to pay" in psyche("run", "claim", "paid")[1]
    again = ("run", "create", "paid", "demo", "--twin", "--paused", "--reward-mint")
    assert psyche(*again, token)[0] == 0, "an interrupted creation is called again"
    assert f"pays the token {token}" in psyche(*again, psyche("solana", "mint", "1", "--url", chain)[1].strip())[1]
    assert f"{OTHER} is no token" in psyche("run", "create", "other", "demo", "--twin", "--reward-mint", OTHER)[1]
    assert "not a token's address" in psyche("run", "create", "other", "demo", "--twin", "--reward-mint", "x")[1]


def test_a_run_is_described_and_wants_a_version(psyche):
    assert psyche("run", "create", "named", "demo", "--twin", "--paused")[0] == 0
    options = ("--name", "A try", "--description", "of words", "--client-version", "9.9")
    code, text = psyche("run", "update", "named", *options)
    assert code == 0, text
    about = json.loads(psyche("run", "status", "named", "--json")[1])["about"]
    assert (about["name"], about["description"], about["client version"]) == ("A try", "of words", "9.9")
    assert int(about["parameters"].replace(",", "")) > 0, "what was not given stays"
    assert "is not started yet" in psyche("solana", "can-join", "named")[1]
    assert psyche("run", "start", "named")[0] == 0
    assert "wants version 9.9 of psyche-lightning, and this is" in psyche("solana", "can-join", "named")[1]
    assert psyche("run", "pause", "named")[0] == 0
    assert psyche("run", "update", "named", "--client-version", "")[0] == 0
    assert psyche("run", "start", "named")[0] == 0
    code, text = psyche("solana", "can-join", "named")
    assert code == 0
    assert "can join run named: waiting for members, epoch 0" in text
    assert "keeps 64" in psyche("run", "update", "named", "--name", "x" * 65)[1]
    assert "no witness of run 'named' named the parameters" in psyche(
        "run", "update", "named", "--restart-from-step", "3"
    )[1].replace("\n", " ")
    assert "nothing to change" in psyche("run", "update", "named")[1]


def test_an_authorization_is_read_and_delegated(psyche, monkeypatch):
    assert psyche("run", "create", "guarded", "demo", "--twin", "--invited")[0] == 0
    address = json.loads(psyche("run", "status", "guarded", "--json")[1])  # the owner's own wallet is no member yet
    assert address["clients"] == []
    assert "everybody has no authorization" in psyche("solana", "authorization", "guarded")[1]
    assert "may not join" in psyche("solana", "can-join", "guarded")[1]
    assert "has no authorization of its own" in psyche("solana", "delegate", "guarded", OTHER)[1]
    me = re.search(r"psyche run authorize guarded (\w+)", psyche("solana", "can-join", "guarded")[1])[1]
    assert psyche("run", "authorize", "guarded", me)[0] == 0
    assert psyche("solana", "can-join", "guarded")[0] == 0
    code, text = psyche("solana", "delegate", "guarded", OTHER)
    assert code == 0, text
    assert f"{me} delegates its authorization to {OTHER}" in text
    assert f"#grantee={me}" in text
    shown = psyche("solana", "authorization", "guarded", me)[1]
    assert f"{me}: active" in shown
    assert f"delegated to {OTHER}" in shown
    assert "to nobody" in psyche("solana", "delegate", "guarded", "--clear")[1]


def test_a_chains_runs_are_listed(psyche):
    for name, steps in (("listed-b", "7"), ("listed-a", "9")):
        assert psyche("run", "create", name, "demo", "--twin", f"total_steps={steps}", "--paused")[0] == 0
    assert psyche("run", "start", "listed-a")[0] == 0
    code, text = psyche("run", "list", "--json")
    assert code == 0, text
    rows = [row for row in json.loads(text) if row["run_id"].startswith("listed")]
    address = json.loads(psyche("run", "status", "listed-a", "--json")[1])["account"]
    a, b = rows
    assert (a["run_id"], a["phase"], a["step"], a["total_steps"], a["clients"], a["account"]) == (
        "listed-a", "waiting_for_members", 1, 9, 0, address
    )  # fmt: skip
    assert (b["run_id"], b["phase"], b["total_steps"]) == ("listed-b", "uninitialized", 7)
    shown = psyche("run", "list")[1]
    assert re.search(r"listed-a +│ waiting for members +│ 0 +│ 0/9 +│ 0", shown), shown


def test_an_account_that_never_was_ours_is_shown(psyche, tmp_path):
    """One of Psyche's own: no manifest account, and every field that only Psyche's programs set."""
    from psyche_lightning_solana.account import RunAccounts
    from psyche_lightning_solana.client.translate import metadata_section
    from psyche_lightning_solana.types import METADATA

    from psyche_lightning.protocol.state import CoordinatorConfig, Phase, RunState

    state = RunState("consilience", phase=Phase.WAITING_FOR_MEMBERS, step=7, config=CoordinatorConfig(total_steps=100))
    run = RunAccounts(state, METADATA.pack(metadata_section("Consilience", "40 B", 40_000_000_000)))
    (tmp_path / "dump").write_bytes(write_coordinator(run))
    code, text = psyche("run", "status", "--account-file", str(tmp_path / "dump"))
    assert code == 0
    assert "consilience: waiting for members, epoch 0, 6 of 100 steps trained" in text
    assert "parameters: 40,000,000,000" in text


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[:-1], "119,159"),
        (lambda data: b"\1" * 8 + data[8:], "not a coordinator account"),
        (lambda data: data[:8] + b"\2" + data[9:], "version"),
        (lambda data: b"{}", "no account in JSON"),
    ],
)
def test_other_accounts_are_refused(psyche, tmp_path, spoil, reason):
    from psyche_lightning_solana.account import RunAccounts

    from psyche_lightning.protocol.state import RunState

    (tmp_path / "dump").write_bytes(spoil(write_coordinator(RunAccounts(RunState("x")))))
    code, text = psyche("run", "status", "--account-file", str(tmp_path / "dump"))
    assert code == 1
    assert reason in text


def test_a_run_without_a_recipe_needs_sizes(psyche):
    code, text = psyche("run", "create", "bare")
    assert code == 1
    assert "needs a recipe" in text
    assert psyche("run", "create", "x" * 33, "demo", "--twin")[0] == 1
