// @solana/web3.js, version 1: accounts, transactions, blocks and subscriptions.

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import {
  ComputeBudgetProgram,
  Keypair,
  LAMPORTS_PER_SOL,
  PublicKey,
  SendTransactionError,
  SystemProgram,
  Transaction,
  TransactionMessage,
  VersionedTransaction,
  sendAndConfirmTransaction,
} from "@solana/web3.js";
import { confirmed, connect, expected, funded } from "./chain.mjs";

describe("web3.js", () => {
  const connection = connect();
  let payer;

  const pay = (to, lamports) =>
    new Transaction().add(SystemProgram.transfer({ fromPubkey: payer.publicKey, toPubkey: to, lamports }));

  before(async () => {
    payer = await funded(connection);
  });
  after(() => connection._rpcWebSocket.close());

  test("a transfer, and the block that it is in", async () => {
    const to = Keypair.generate().publicKey;
    const signature = await sendAndConfirmTransaction(connection, pay(to, LAMPORTS_PER_SOL), [payer]);
    assert.equal(await connection.getBalance(to), LAMPORTS_PER_SOL);
    // No option says which versions this client knows: the transaction is a legacy one, and so are airdrops.
    const shown = await connection.getTransaction(signature);
    assert.deepEqual(
      shown.meta.postBalances.map((after, index) => after - shown.meta.preBalances[index]),
      [-LAMPORTS_PER_SOL - 5000, LAMPORTS_PER_SOL, 0],
    );
    const block = await connection.getBlock(shown.slot, { maxSupportedTransactionVersion: 0, commitment: "confirmed" });
    assert.equal(block.parentSlot, shown.slot - 1);
    assert.ok(block.transactions.some((one) => one.transaction.signatures[0] === signature));
    const parsed = await connection.getParsedBlock(shown.slot, { maxSupportedTransactionVersion: 0, commitment: "confirmed" });
    assert.equal(parsed.blockhash, block.blockhash);
    const listed = await connection.getBlockSignatures(shown.slot, "confirmed");
    assert.ok(listed.signatures.includes(signature));
    assert.deepEqual(await connection.getBlocks(shown.slot, shown.slot, "confirmed"), [shown.slot]);
    assert.equal(await connection.getBlockTime(shown.slot), shown.blockTime);
  });

  test("a transaction of version 0", async () => {
    const latest = await connection.getLatestBlockhash();
    const to = Keypair.generate().publicKey;
    const message = new TransactionMessage({
      payerKey: payer.publicKey,
      recentBlockhash: latest.blockhash,
      instructions: [ComputeBudgetProgram.setComputeUnitPrice({ microLamports: 1000 }), ...pay(to, 10 ** 7).instructions],
    }).compileToV0Message();
    const transaction = new VersionedTransaction(message);
    transaction.sign([payer]);
    const simulated = await connection.simulateTransaction(transaction);
    assert.equal(simulated.value.err, null);
    const signature = await confirmed(connection, await connection.sendTransaction(transaction));
    await assert.rejects(connection.getTransaction(signature), /Transaction version \(0\) is not supported/);
    const shown = await connection.getTransaction(signature, { maxSupportedTransactionVersion: 0 });
    assert.equal(shown.version, 0);
  });

  test("an account is created, changed and watched", async () => {
    const account = Keypair.generate();
    const owner = Keypair.generate().publicKey;
    const change = expected("a notification of the account");
    const owned = expected("a notification of the owner's accounts");
    const logs = expected("the logs");
    const slots = expected("a slot");
    const roots = expected("a root");
    const ids = [
      connection.onAccountChange(account.publicKey, (info) => change.resolve(info)),
      connection.onProgramAccountChange(owner, (one) => owned.resolve(one)),
      connection.onLogs(account.publicKey, (one) => logs.resolve(one)),
      connection.onSlotChange((one) => slots.resolve(one)),
      connection.onRootChange((one) => roots.resolve(one)),
    ];
    await slots.promise; // the subscriptions are made in order, so all others are there
    const lamports = await connection.getMinimumBalanceForRentExemption(100);
    const create = SystemProgram.createAccount({
      fromPubkey: payer.publicKey,
      newAccountPubkey: account.publicKey,
      lamports,
      space: 100,
      programId: owner,
    });
    const signature = await sendAndConfirmTransaction(connection, new Transaction().add(create), [payer, account]);
    assert.equal((await change.promise).data.length, 100);
    assert.ok((await owned.promise).accountId.equals(account.publicKey));
    assert.equal((await logs.promise).signature, signature);
    assert.equal(typeof (await roots.promise), "number");
    const found = await connection.getProgramAccounts(owner, { filters: [{ dataSize: 100 }] });
    assert.deepEqual(found.map((one) => one.pubkey.toBase58()), [account.publicKey.toBase58()]);
    await Promise.all(
      [
        connection.removeAccountChangeListener,
        connection.removeProgramAccountChangeListener,
        connection.removeOnLogsListener,
        connection.removeSlotChangeListener,
        connection.removeRootChangeListener,
      ].map((remove, index) => remove.call(connection, ids[index])),
    );
  });

  test("the updates of slots", async () => {
    const seen = new Map();
    const all = expected("an update of each type");
    const id = connection.onSlotUpdate((update) => {
      seen.set(update.type, update);
      if (["completed", "frozen", "createdBank", "optimisticConfirmation", "root"].every((type) => seen.has(type))) {
        all.resolve();
      }
    });
    await all.promise;
    assert.equal(seen.get("createdBank").parent, seen.get("createdBank").slot - 1);
    assert.equal(typeof seen.get("frozen").stats.numTransactionEntries, "number");
    await connection.removeSlotUpdateListener(id);
  });

  test("errors have the codes and words of a validator", async () => {
    const poor = pay(Keypair.generate().publicKey, 10 ** 15);
    await assert.rejects(sendAndConfirmTransaction(connection, poor, [payer]), (error) => {
      assert.ok(error instanceof SendTransactionError);
      assert.match(error.message, /custom program error: 0x1/);
      assert.ok(error.logs.some((line) => line.includes("insufficient lamports")));
      return true;
    });
    const nobody = Keypair.generate().publicKey;
    await assert.rejects(connection.getTokenSupply(nobody), { code: -32602 });
    await assert.rejects(connection.getTokenAccountsByOwner(nobody, { mint: nobody }), { code: -32602 });
    await assert.rejects(connection.getBlock(10 ** 9), { code: -32004 });
  });

  test("what explorers ask first", async () => {
    assert.equal((await connection.getEpochSchedule()).slotsPerEpoch, 432_000);
    const info = await connection.getEpochInfo();
    assert.ok(info.transactionCount >= 1);
    assert.ok((await connection.getTransactionCount()) >= info.transactionCount);
    assert.equal(await connection.getFirstAvailableBlock(), 0);
    assert.equal(await connection.getMinimumLedgerSlot(), 0);
    const supply = (await connection.getSupply({ excludeNonCirculatingAccountsList: false })).value;
    // Lamports beyond 2^53, of which JavaScript's numbers lose the last digits.
    assert.ok(Math.abs(supply.circulating + supply.nonCirculating - supply.total) < 1e6);
    assert.ok(Array.isArray(await connection.getRecentPerformanceSamples(4)));
    assert.deepEqual(await connection.getVoteAccounts(), { current: [], delinquent: [] });
    const [node] = await connection.getClusterNodes();
    assert.ok(connection.rpcEndpoint.endsWith(node.rpc));
    assert.equal(await connection.getSlotLeader(), node.pubkey);
    assert.equal((await connection.getSlotLeaders(0, 2)).length, 2);
    const [richest] = (await connection.getLargestAccounts()).value;
    assert.equal(richest.address.toBase58(), supply.nonCirculatingAccounts[0].toBase58());
    assert.ok(PublicKey.isOnCurve(richest.address));
  });
});
