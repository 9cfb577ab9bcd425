// @solana/kit: a transfer, its notifications, and what the chain says of itself.

import assert from "node:assert/strict";
import { before, describe, test } from "node:test";
import {
  AccountRole,
  address,
  airdropFactory,
  appendTransactionMessageInstruction,
  createSolanaRpc,
  createSolanaRpcSubscriptions,
  createSolanaRpcSubscriptions_UNSTABLE,
  createTransactionMessage,
  generateKeyPairSigner,
  getSignatureFromTransaction,
  isSolanaError,
  lamports,
  pipe,
  sendAndConfirmTransactionFactory,
  setTransactionMessageFeePayerSigner,
  setTransactionMessageLifetimeUsingBlockhash,
  signTransactionMessageWithSigners,
  SOLANA_ERROR__JSON_RPC__INVALID_PARAMS,
} from "@solana/kit";
import { url, wsUrl } from "./chain.mjs";

const SYSTEM = address("11111111111111111111111111111111");

function transfer(from, to, amount) {
  const data = Buffer.alloc(12);
  data.writeUInt32LE(2);
  data.writeBigUInt64LE(amount, 4);
  return {
    programAddress: SYSTEM,
    accounts: [
      { address: from.address, role: AccountRole.WRITABLE_SIGNER, signer: from },
      { address: to, role: AccountRole.WRITABLE },
    ],
    data,
  };
}

/** The first of a subscription's notifications. */
async function first(subscription) {
  const stop = new AbortController();
  const timer = setTimeout(() => stop.abort(), 30_000);
  try {
    for await (const one of await subscription.subscribe({ abortSignal: stop.signal })) return one;
  } finally {
    clearTimeout(timer);
    stop.abort();
  }
  throw new Error("no notification came");
}

describe("kit", () => {
  const rpc = createSolanaRpc(url);
  const rpcSubscriptions = createSolanaRpcSubscriptions(wsUrl);
  let payer;

  before(async () => {
    payer = await generateKeyPairSigner();
    await airdropFactory({ rpc, rpcSubscriptions })({
      commitment: "confirmed",
      lamports: lamports(10_000_000_000n),
      recipientAddress: payer.address,
    });
  });

  test("a transfer is sent and confirmed, and its receiver watched", async () => {
    const to = (await generateKeyPairSigner()).address;
    const stop = new AbortController();
    const changes = await rpcSubscriptions
      .accountNotifications(to, { commitment: "confirmed", encoding: "base64" })
      .subscribe({ abortSignal: stop.signal });
    const change = changes[Symbol.asyncIterator]().next(); // an iterator has what comes from now on
    const latest = (await rpc.getLatestBlockhash().send()).value;
    const message = pipe(
      createTransactionMessage({ version: 0 }),
      (one) => setTransactionMessageFeePayerSigner(payer, one),
      (one) => setTransactionMessageLifetimeUsingBlockhash(latest, one),
      (one) => appendTransactionMessageInstruction(transfer(payer, to, 1_000_000_000n), one),
    );
    const transaction = await signTransactionMessageWithSigners(message);
    await sendAndConfirmTransactionFactory({ rpc, rpcSubscriptions })(transaction, { commitment: "confirmed" });
    assert.equal((await rpc.getBalance(to, { commitment: "confirmed" }).send()).value, 1_000_000_000n);
    assert.equal((await change).value.value.lamports, 1_000_000_000n);
    stop.abort();
    const signature = getSignatureFromTransaction(transaction);
    const shown = await rpc
      .getTransaction(signature, { commitment: "confirmed", encoding: "json", maxSupportedTransactionVersion: 0 })
      .send();
    assert.equal(shown.meta.fee, 5000n);
    const block = await rpc
      .getBlock(shown.slot, { commitment: "confirmed", maxSupportedTransactionVersion: 0, transactionDetails: "accounts" })
      .send();
    assert.ok(block.transactions.some((one) => one.transaction.signatures[0] === signature));
  });

  test("slots and their updates", async () => {
    const slot = await first(rpcSubscriptions.slotNotifications());
    assert.equal(slot.parent, slot.slot - 1n);
    const update = await first(createSolanaRpcSubscriptions_UNSTABLE(wsUrl).slotsUpdatesNotifications());
    assert.equal(typeof update.slot, "bigint");
  });

  test("the cluster and its errors", async () => {
    const [node] = await rpc.getClusterNodes().send();
    assert.equal((await rpc.getIdentity().send()).identity, node.pubkey);
    assert.equal((await rpc.getEpochSchedule().send()).slotsPerEpoch, 432_000n);
    assert.deepEqual(await rpc.getVoteAccounts().send(), { current: [], delinquent: [] });
    const supply = (await rpc.getSupply().send()).value;
    assert.equal(supply.circulating + supply.nonCirculating, supply.total);
    const nobody = (await generateKeyPairSigner()).address;
    await assert.rejects(rpc.getTokenLargestAccounts(nobody).send(), (error) =>
      isSolanaError(error, SOLANA_ERROR__JSON_RPC__INVALID_PARAMS),
    );
  });
});
