// The local chain of these tests, and keys with lamports on it.

import { readFileSync } from "node:fs";
import { Connection, Keypair, LAMPORTS_PER_SOL } from "@solana/web3.js";

/** URLs for requests and for subscriptions. */
export const url = process.env.LOCALNET_URL ?? "http://127.0.0.1:8899";
export const wsUrl = process.env.LOCALNET_WS_URL ?? "ws://127.0.0.1:8900";

/** The folder of the programs' IDLs. */
const idls = new URL("../../plugins/psyche-lightning-solana/psyche_lightning_solana/idl/anchor/", import.meta.url);

/** A connection of web3.js v1. */
export function connect() {
  return new Connection(url, { commitment: "confirmed", wsEndpoint: wsUrl });
}

/** A new key with ten SOL. */
export async function funded(connection) {
  const keypair = Keypair.generate();
  const signature = await connection.requestAirdrop(keypair.publicKey, 10 * LAMPORTS_PER_SOL);
  await confirmed(connection, signature);
  return keypair;
}

/** Waits until a transaction is confirmed, and refuses one that failed. */
export async function confirmed(connection, signature) {
  const latest = await connection.getLatestBlockhash();
  const { value } = await connection.confirmTransaction({ signature, ...latest }, "confirmed");
  if (value.err !== null) throw new Error(`${signature} failed: ${JSON.stringify(value.err)}`);
  return signature;
}

/** The IDL of a program, with the address that the program has on local chains. */
export function idl(name) {
  return JSON.parse(readFileSync(new URL(`${name}.json`, idls), "utf8"));
}

/** A promise with its `resolve`, which is rejected unless something resolves it within half a minute. */
export function expected(what) {
  let resolve;
  const promise = new Promise((done, fail) => {
    const timer = setTimeout(() => fail(new Error(`${what} did not come`)), 30_000);
    resolve = (value) => {
      clearTimeout(timer);
      done(value);
    };
  });
  return { promise, resolve };
}
