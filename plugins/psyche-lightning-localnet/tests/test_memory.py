"""Compares accounts by slot with a simple model: a copy of all accounts for each slot."""

from hypothesis import given, settings
from hypothesis import strategies as st
from psyche_lightning_localnet.state import Accounts, History, Record
from solders.account import Account
from solders.pubkey import Pubkey

KEYS = [Pubkey(bytes([1 + i]) * 32) for i in range(3)]
OWNERS = [Pubkey(bytes([101 + i]) * 32) for i in range(2)]
steps = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 1), st.integers(0, 2), st.booleans()), max_size=60
)


@settings(max_examples=200)
@given(steps, st.integers(0, 4))
def test_every_slot_that_may_be_asked_for_is_as_it_was(steps, lag):
    accounts = Accounts()
    states = [{}]  # by slot
    for key, lamports, owner, slots, settle in steps:
        for _ in range(slots):
            states.append(dict(states[-1]))
        slot = len(states) - 1
        accounts.put(slot, KEYS[key], Account(lamports, bytes([lamports]), OWNERS[owner]))
        states[slot].pop(KEYS[key], None)
        if lamports:
            states[slot][KEYS[key]] = (lamports, OWNERS[owner])
        finalized = max(0, slot - lag)
        if settle:
            accounts.settle(finalized)
        for asked in range(finalized, slot + 1):
            for one in KEYS:
                account = accounts.get(asked, one)
                assert states[asked].get(one) == (None if account is None else (account.lamports, account.owner))
            for program in OWNERS:
                owned = {one for one, _ in accounts.owned(asked, program)}
                assert owned == {one for one, (_, holder) in states[asked].items() if holder == program}
    accounts.settle(len(states))
    assert len(accounts) == len(states[-1])  # no version of a deleted account is left
    assert dict(accounts.newest()).keys() == states[-1].keys()


def record(number, *addresses):
    return Record(
        f"s{number}", number, 0, b"", addresses, len(addresses), 0, None, (), 0, 0, 0, (), (), (), (), (), None, None
    )


def test_a_history_forgets_the_oldest_and_their_addresses():
    history = History(3)
    for number in range(5):
        history.add(record(number, "a", f"only{number}"))
    assert [one.signature for one in history] == ["s2", "s3", "s4"]
    assert [one.signature for one in history.of("a")] == ["s4", "s3", "s2"]
    assert [one.signature for one in history.of("a", before="s4")] == ["s3", "s2"]
    assert [one.signature for one in history.of("a", until="s2")] == ["s4", "s3"]
    assert not list(history.of("a", before="unknown"))
    assert not list(history.of("only0"))
    assert history.get("s0") is None
    assert (len(history), history.count) == (3, 5)
    assert set(history._by_address) == {"a", "only2", "only3", "only4"}
