"""SPL tokens and wrapped SOL: who has which, in which form."""

import base64

import pytest
from psyche_lightning_localnet import methods
from psyche_lightning_localnet.parsed import parsed_instruction
from solana.rpc.commitment import Processed
from solana.rpc.types import TokenAccountOpts, TxOpts
from solders.account import Account
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.system_program import CreateAccountParams, create_account
from spl.token import instructions as spl
from spl.token.constants import (
    MINT_LEN,
    MULTISIG_LEN,
    TOKEN_2022_PROGRAM_ID,
    TOKEN_PROGRAM_ID,
    WRAPPED_SOL_MINT,
)

INSTANT = {"confirmed_lag": 0, "finalized_lag": 0}
CHECKED = TxOpts(preflight_commitment=Processed)
PARSED = {"encoding": "jsonParsed"}


async def send(world, instructions, *signers):
    return (await world.client.send_transaction(await world.signed(instructions, *signers), CHECKED)).value


def made(payer, account, size, program=TOKEN_PROGRAM_ID):
    return create_account(
        CreateAccountParams(
            from_pubkey=payer.pubkey(), to_pubkey=account.pubkey(), lamports=10**8, space=size, owner=program
        )
    )


async def minted(world, payer, amounts, decimals=2, program=TOKEN_PROGRAM_ID):
    """A mint, and the token accounts of new owners with these amounts."""
    mint = Keypair()
    begin = spl.initialize_mint(
        spl.InitializeMintParams(decimals, program, mint.pubkey(), payer.pubkey(), payer.pubkey())
    )
    await send(world, [made(payer, mint, MINT_LEN, program), begin], payer, mint)
    owners = [Keypair() for _ in amounts]
    places = []
    for owner, amount in zip(owners, amounts, strict=True):
        place = spl.get_associated_token_address(owner.pubkey(), mint.pubkey(), program)
        create = spl.create_associated_token_account(payer.pubkey(), owner.pubkey(), mint.pubkey(), program)
        give = spl.mint_to(spl.MintToParams(program, mint.pubkey(), place, payer.pubkey(), amount))
        await send(world, [create, give], payer)
        places.append(place)
    return mint.pubkey(), owners, places


def test_whose_tokens_and_who_has_most(play):
    async def test(world):
        payer = world.keypair()
        mint, owners, places = await minted(world, payer, [5, 700, 30, *range(30)])
        other, *_ = await minted(world, payer, [9], program=TOKEN_2022_PROGRAM_ID)
        largest = await world.result("getTokenLargestAccounts", str(mint))
        assert len(largest["value"]) == 20
        assert largest["value"][0] == {
            "address": str(places[1]),
            "amount": "700",
            "decimals": 2,
            "uiAmount": 7.0,
            "uiAmountString": "7",
        }
        amounts = [int(one["amount"]) for one in largest["value"]]
        assert amounts == sorted([5, 700, 30, *range(30)], reverse=True)[:20]
        typed = (await world.client.get_token_largest_accounts(mint)).value
        assert [one.address for one in typed[:2]] == [places[1], places[2]]
        mine = owners[1].pubkey()
        for which in (TokenAccountOpts(mint=mint), TokenAccountOpts(program_id=TOKEN_PROGRAM_ID)):
            found = (await world.client.get_token_accounts_by_owner(mine, which)).value
            assert [one.pubkey for one in found] == [places[1]]
            assert int.from_bytes(found[0].account.data[64:72], "little") == 700
        assert (await world.client.get_token_accounts_by_owner(mine, TokenAccountOpts(mint=other))).value == []
        by_program = await world.result(
            "getTokenAccountsByOwner", str(mine), {"programId": str(TOKEN_2022_PROGRAM_ID)}, PARSED
        )
        assert by_program["value"] == []

        helper = Keypair().pubkey()
        lend = spl.approve(spl.ApproveParams(TOKEN_PROGRAM_ID, places[1], helper, mine, 60))
        await send(world, [lend], payer, owners[1])
        listed = await world.result("getTokenAccountsByDelegate", str(helper), {"mint": str(mint)}, PARSED)
        (one,) = listed["value"]
        assert one["pubkey"] == str(places[1])
        info = one["account"]["data"]["parsed"]["info"]
        assert (info["delegate"], info["delegatedAmount"]["amount"]) == (str(helper), "60")
        nobody = await world.result("getTokenAccountsByDelegate", str(mine), {"mint": str(mint)}, PARSED)
        assert nobody["value"] == []

    play(test, **INSTANT)


def test_accounts_of_tokens_in_parsed_form(play):
    async def test(world):
        payer = world.keypair()
        mint, owners, places = await minted(world, payer, [1250])

        async def parsed(key):
            return (await world.result("getAccountInfo", str(key), PARSED))["value"]["data"]

        assert await parsed(places[0]) == {
            "program": "spl-token",
            "parsed": {
                "type": "account",
                "info": {
                    "isNative": False,
                    "mint": str(mint),
                    "owner": str(owners[0].pubkey()),
                    "state": "initialized",
                    "tokenAmount": {"amount": "1250", "decimals": 2, "uiAmount": 12.5, "uiAmountString": "12.5"},
                },
            },
            "space": 165,
        }
        assert await parsed(mint) == {
            "program": "spl-token",
            "parsed": {
                "type": "mint",
                "info": {
                    "mintAuthority": str(payer.pubkey()),
                    "supply": "1250",
                    "decimals": 2,
                    "isInitialized": True,
                    "freezeAuthority": str(payer.pubkey()),
                },
            },
            "space": 82,
        }
        freeze = spl.freeze_account(
            spl.FreezeAccountParams(TOKEN_PROGRAM_ID, places[0], mint, payer.pubkey(), multi_signers=[])
        )
        await send(world, [freeze], payer)
        assert (await parsed(places[0]))["parsed"]["info"]["state"] == "frozen"

        several = Keypair()
        begin = spl.initialize_multisig(
            spl.InitializeMultisigParams(TOKEN_PROGRAM_ID, several.pubkey(), 1, [payer.pubkey(), owners[0].pubkey()])
        )
        await send(world, [made(payer, several, MULTISIG_LEN), begin], payer, several)
        assert (await parsed(several.pubkey()))["parsed"] == {
            "type": "multisig",
            "info": {
                "numRequiredSigners": 1,
                "numValidSigners": 2,
                "isInitialized": True,
                "signers": [str(payer.pubkey()), str(owners[0].pubkey())],
            },
        }
        newer, _, kept = await minted(world, payer, [1], program=TOKEN_2022_PROGRAM_ID)
        shown = await parsed(kept[0])
        assert shown["program"] == "spl-token-2022"
        assert shown["parsed"]["info"]["extensions"] == [{"extension": "immutableOwner"}]
        assert (await parsed(newer))["parsed"]["type"] == "mint"
        # An account of the token program without meaning, and one of another program, are shown in base64.
        strange = Pubkey.new_unique()
        world.chain.store({strange: Account(10**9, bytes(165), TOKEN_PROGRAM_ID)})
        assert await parsed(strange) == [base64.b64encode(bytes(165)).decode(), "base64"]
        assert await parsed(payer.pubkey()) == ["", "base64"]
        listed = await world.result(
            "getProgramAccounts", str(TOKEN_PROGRAM_ID), {**PARSED, "filters": [{"dataSize": 82}]}
        )
        assert [one["account"]["data"]["parsed"]["type"] for one in listed] == ["mint"]
        # What has the size of a token account is not a mint.
        error = await world.refusal("getTokenSupply", str(places[0]))
        assert (error["code"], error["message"]) == (-32602, "Invalid param: not a Token mint")

    play(test, **INSTANT)


def test_wrapped_sol_in_and_out(play):
    async def test(world):
        payer = world.keypair()
        place = spl.get_associated_token_address(payer.pubkey(), WRAPPED_SOL_MINT)
        create = spl.create_associated_token_account(payer.pubkey(), payer.pubkey(), WRAPPED_SOL_MINT)
        sync = spl.sync_native(spl.SyncNativeParams(TOKEN_PROGRAM_ID, place))
        await send(world, [create, world.pay(payer, place, 10**9), sync], payer)
        amount = (await world.client.get_token_account_balance(place)).value
        assert (amount.amount, amount.decimals, amount.ui_amount_string) == ("1000000000", 9, "1")
        shown = await world.result("getAccountInfo", str(place), PARSED)
        info = shown["value"]["data"]["parsed"]["info"]
        assert (info["isNative"], info["rentExemptReserve"]["amount"]) == (True, "2039280")
        before = world.balance(payer.pubkey())
        close = spl.close_account(spl.CloseAccountParams(TOKEN_PROGRAM_ID, place, payer.pubkey(), payer.pubkey()))
        await send(world, [close], payer)
        assert world.balance(payer.pubkey()) == before + 10**9 + 2_039_280 - 5000
        supply = (await world.client.get_token_supply(WRAPPED_SOL_MINT)).value
        assert (supply.amount, supply.decimals) == ("0", 9)

    play(test, **INSTANT)


@pytest.mark.parametrize("method", ["getProgramAccounts", "getTokenAccountsByOwner"])
def test_a_list_that_would_be_too_long_is_refused(play, monkeypatch, method):
    async def test(world):
        payer = world.keypair()
        mint, owners, _ = await minted(world, payer, [1])
        key, which = str(TOKEN_PROGRAM_ID), []
        if method == "getTokenAccountsByOwner":
            key, which = str(owners[0].pubkey()), [{"mint": str(mint)}]
        whole = await world.result(method, key, *which, PARSED)
        count = len(whole["value"] if isinstance(whole, dict) else whole)
        monkeypatch.setattr(methods, "MAX_SCAN", count * methods.ACCOUNT_META)
        error = await world.refusal(method, key, *which, PARSED)
        assert error["code"] == -32012
        assert error["message"] == "scan aborted: The accumulated scan results exceeded the limit"
        part = {"encoding": "base64", "dataSlice": {"offset": 0, "length": 0}}
        assert await world.result(method, key, *which, part)
        error = await world.refusal(method, key, *which, {**part, **PARSED})
        assert (error["code"], error["message"][:6]) == (-32600, "Sliced")

    play(test, **INSTANT)


def test_instructions_of_tokens_in_parsed_form(play):
    async def test(world):
        payer = world.keypair()
        mint, owners, places = await minted(world, payer, [50, 0])
        me, you = owners[0].pubkey(), owners[1].pubkey()
        lent = spl.approve(spl.ApproveParams(TOKEN_PROGRAM_ID, places[0], you, me, 9))
        sent = spl.transfer_checked(
            spl.TransferCheckedParams(TOKEN_PROGRAM_ID, places[0], mint, places[1], me, 40, 2, signers=[])
        )
        given = spl.set_authority(
            spl.SetAuthorityParams(
                TOKEN_PROGRAM_ID, mint, spl.AuthorityType.MINT_TOKENS, payer.pubkey(), new_authority=you
            )
        )
        steps = [lent, sent, given, world.pay(payer, you), world.memo("hello")]
        signature = await send(world, steps, payer, owners[0])

        async def shown(signature):
            options = {**PARSED, "maxSupportedTransactionVersion": 0}
            return await world.result("getTransaction", str(signature), options)

        message = (await shown(signature))["transaction"]["message"]
        assert [(one["program"], one["parsed"]) for one in message["instructions"]] == [
            (
                "spl-token",
                {
                    "type": "approve",
                    "info": {"source": str(places[0]), "delegate": str(you), "amount": "9", "owner": str(me)},
                },
            ),
            (
                "spl-token",
                {
                    "type": "transferChecked",
                    "info": {
                        "source": str(places[0]),
                        "mint": str(mint),
                        "destination": str(places[1]),
                        "tokenAmount": {"amount": "40", "decimals": 2, "uiAmount": 0.4, "uiAmountString": "0.4"},
                        "authority": str(me),
                    },
                },
            ),
            (
                "spl-token",
                {
                    "type": "setAuthority",
                    "info": {
                        "mint": str(mint),
                        "authorityType": "mintTokens",
                        "newAuthority": str(you),
                        "authority": str(payer.pubkey()),
                    },
                },
            ),
            (
                "system",
                {
                    "type": "transfer",
                    "info": {"source": str(payer.pubkey()), "destination": str(you), "lamports": 1_000_000},
                },
            ),
            ("spl-memo", "hello"),
        ]
        assert {one["stackHeight"] for one in message["instructions"]} == {None}

        # What a program called, here the one of associated accounts.
        place = spl.get_associated_token_address(payer.pubkey(), mint)
        create = spl.create_idempotent_associated_token_account(payer.pubkey(), payer.pubkey(), mint)
        whole = await shown(await send(world, [create], payer))
        (outer,) = whole["transaction"]["message"]["instructions"]
        assert (outer["program"], outer["parsed"]["type"]) == ("spl-associated-token-account", "createIdempotent")
        assert outer["parsed"]["info"]["account"] == str(place)
        (inner,) = whole["meta"]["innerInstructions"]
        assert [(one["program"], one["parsed"]["type"]) for one in inner["instructions"]] == [
            ("spl-token", "getAccountDataSize"),
            ("system", "createAccount"),
            ("spl-token", "initializeImmutableOwner"),
            ("spl-token", "initializeAccount3"),
        ]
        assert inner["instructions"][3]["parsed"]["info"] == {
            "account": str(place),
            "mint": str(mint),
            "owner": str(payer.pubkey()),
        }

    play(test, **INSTANT)


KEYS = [str(Pubkey(bytes([number]) * 32)) for number in range(5)]


@pytest.mark.parametrize(
    ("accounts", "data", "kind", "info"),
    [
        (KEYS[:4], b"\3" + (7).to_bytes(8, "little"), "transfer", {"multisigAuthority": KEYS[2], "signers": KEYS[3:4]}),
        (KEYS[:3], b"\x13\2", "initializeMultisig2", {"multisig": KEYS[0], "signers": KEYS[1:3], "m": 2}),
        (KEYS[:4], b"\2\1", "initializeMultisig", {"rentSysvar": KEYS[1], "signers": KEYS[2:4], "m": 1}),
        (
            KEYS[:2],
            b"\6\3\0",
            "setAuthority",
            {"account": KEYS[0], "authorityType": "closeAccount", "newAuthority": None},
        ),
        (KEYS[:1], b"\x14\6" + bytes([1]) * 32 + b"\0", "initializeMint2", {"decimals": 6, "mintAuthority": KEYS[1]}),
        (
            KEYS[:1],
            b"\x14\6" + bytes([1]) * 32 + b"\1" + bytes([2]) * 32,
            "initializeMint2",
            {"freezeAuthority": KEYS[2]},
        ),
    ],
)
def test_a_form_of_an_instruction(accounts, data, kind, info):
    shown = parsed_instruction(str(TOKEN_PROGRAM_ID), accounts, data)["parsed"]
    assert shown["type"] == kind
    assert {name: shown["info"][name] for name in info} == info


@pytest.mark.parametrize(
    "data", [b"", b"\3", b"\3\0", b"\x0c" + bytes(8), b"\xff", b"\6\7\0", b"\6\0\1\0", b"\x14\6", b"\x12" + bytes(31)]
)
def test_an_instruction_without_meaning_is_shown_as_it_is(data):
    for program in (str(TOKEN_PROGRAM_ID), "11111111111111111111111111111111"):
        assert parsed_instruction(program, [], data) is None
        assert parsed_instruction(program, KEYS, data) is None
    assert parsed_instruction(KEYS[3], KEYS, data) is None
