// @solana/spl-token: a mint, its accounts, and wrapped SOL.

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { Keypair, LAMPORTS_PER_SOL, SystemProgram, Transaction, sendAndConfirmTransaction } from "@solana/web3.js";
import {
  NATIVE_MINT,
  TOKEN_2022_PROGRAM_ID,
  TOKEN_PROGRAM_ID,
  approve,
  closeAccount,
  createAssociatedTokenAccount,
  createMint,
  createSyncNativeInstruction,
  getAccount,
  getMint,
  getOrCreateAssociatedTokenAccount,
  mintTo,
  transferChecked,
} from "@solana/spl-token";
import { connect, funded } from "./chain.mjs";

describe("spl-token", () => {
  const connection = connect();
  let payer;

  before(async () => {
    payer = await funded(connection);
  });
  after(() => connection._rpcWebSocket.close());

  for (const [name, program] of [
    ["spl-token", TOKEN_PROGRAM_ID],
    ["spl-token-2022", TOKEN_2022_PROGRAM_ID],
  ]) {
    test(`${name}: minted, sent, lent and listed`, async () => {
      const mint = await createMint(connection, payer, payer.publicKey, null, 6, undefined, undefined, program);
      const other = Keypair.generate();
      const own = (await getOrCreateAssociatedTokenAccount(
        connection, payer, mint, payer.publicKey, false, "confirmed", undefined, program,
      )).address;
      const theirs = await createAssociatedTokenAccount(connection, payer, mint, other.publicKey, undefined, program);
      await mintTo(connection, payer, mint, own, payer, 2_500_000n, [], undefined, program);
      const sent = await transferChecked(connection, payer, own, mint, theirs, payer, 1_000_000n, 6, [], undefined, program);
      const helper = Keypair.generate().publicKey;
      await approve(connection, payer, theirs, helper, other, 7n, [], undefined, program);

      assert.equal((await getMint(connection, mint, undefined, program)).supply, 2_500_000n);
      assert.equal((await getAccount(connection, theirs, undefined, program)).delegatedAmount, 7n);
      const { transaction } = await connection.getParsedTransaction(sent);
      assert.equal(transaction.message.instructions[0].parsed.type, "transferChecked");
      assert.equal(transaction.message.instructions[0].parsed.info.tokenAmount.uiAmountString, "1");
      const { value: listed } = await connection.getParsedTokenAccountsByOwner(other.publicKey, { mint });
      assert.equal(listed[0].account.data.program, name);
      assert.equal(listed[0].account.data.parsed.info.tokenAmount.uiAmountString, "1");
      const { value: whole } = await connection.getTokenAccountsByOwner(payer.publicKey, { programId: program });
      assert.ok(whole.some((one) => one.pubkey.equals(own)));
      const { value: largest } = await connection.getTokenLargestAccounts(mint);
      assert.deepEqual(largest.map((one) => one.amount), ["1500000", "1000000"]);
      const { value: parsed } = await connection.getParsedAccountInfo(mint);
      assert.equal(parsed.data.parsed.info.mintAuthority, payer.publicKey.toBase58());
    });
  }

  test("SOL is wrapped and unwrapped", async () => {
    const account = await createAssociatedTokenAccount(connection, payer, NATIVE_MINT, payer.publicKey);
    const wrap = new Transaction().add(
      SystemProgram.transfer({ fromPubkey: payer.publicKey, toPubkey: account, lamports: LAMPORTS_PER_SOL }),
      createSyncNativeInstruction(account),
    );
    await sendAndConfirmTransaction(connection, wrap, [payer]);
    const wrapped = await getAccount(connection, account);
    assert.deepEqual([wrapped.amount, wrapped.isNative], [BigInt(LAMPORTS_PER_SOL), true]);
    const before = await connection.getBalance(payer.publicKey);
    await closeAccount(connection, payer, account, payer.publicKey, payer);
    assert.ok((await connection.getBalance(payer.publicKey)) > before + LAMPORTS_PER_SOL);
  });
});
