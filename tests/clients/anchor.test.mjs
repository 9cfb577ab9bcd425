// @coral-xyz/anchor: a run from its first account to its first epoch, by the IDLs alone; and what an indexer asks.

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import anchor from "@coral-xyz/anchor";
import { ComputeBudgetProgram, Keypair, PublicKey, SystemProgram } from "@solana/web3.js";
import { createMint, getAccount, getAssociatedTokenAddressSync } from "@solana/spl-token";
import { connect, expected, funded, idl } from "./chain.mjs";

const { AnchorError, AnchorProvider, BN, BorshInstructionCoder, Program, Wallet } = anchor;

const COORDINATOR_SIZE = 119_160;
const ANYBODY = PublicKey.default;
const SCOPE = Buffer.from("CoordinatorJoinRun");
const [WAITING, WARMUP, PAUSED] = [1, 2, 7];

const CONFIG = {
  warmupTime: new BN(100),
  cooldownTime: new BN(100),
  maxRoundTrainTime: new BN(100),
  roundWitnessTime: new BN(10),
  globalBatchSizeWarmupTokens: new BN(0),
  epochTime: new BN(10_000),
  totalSteps: 1000,
  initMinClients: 1,
  minClients: 1,
  witnessNodes: 0,
  globalBatchSizeStart: 16,
  globalBatchSizeEnd: 32,
  verificationPercent: 0,
  waitingForMembersExtraTime: 1,
};

const text = (words, size) => [...Buffer.alloc(size).fill(words, 0, words.length)];

const MODEL = {
  llm: [
    {
      maxSeqLen: 64,
      coldStartWarmupSteps: 0,
      architecture: { hfLlama: {} },
      checkpoint: { hub: [{ repoId: text("org/model", 64), revision: null }] },
      dataType: { pretraining: {} },
      dataLocation: { dummy: {} },
      lrSchedule: { constant: [{ baseLr: 1e-3, warmupInitLr: 0, warmupSteps: 0 }] },
      optimizer: {
        distro: [
          {
            clipGradNorm: null,
            weightDecay: null,
            compressionDecay: 0.999,
            compressionTopk: 8,
            compressionChunk: 64,
            quantize1Bit: true,
          },
        ],
      },
    },
  ],
};

/** An address that a program derives from seeds: texts, addresses or bytes. */
function derived(program, ...seeds) {
  const bytes = seeds.map((seed) => (seed instanceof PublicKey ? seed.toBuffer() : Buffer.from(seed)));
  return PublicKey.findProgramAddressSync(bytes, program)[0];
}

/** Lets time pass on the local chain; a method of its own. */
async function pass(connection, seconds) {
  const answer = await connection._rpcRequest("psyche_advanceClock", [{ seconds }]);
  assert.ok(answer.result.slot > 0);
}

/** Calls of a program may use what a transaction may. */
const units = [ComputeBudgetProgram.setComputeUnitLimit({ units: 1_400_000 })];

describe("anchor", () => {
  const connection = connect();
  const runId = `clients-${Date.now()}`;
  const account = Keypair.generate();
  let owner, coordinator, authorizer, treasurer, keys;

  before(async () => {
    owner = await funded(connection);
    const provider = new AnchorProvider(connection, new Wallet(owner), { commitment: "confirmed" });
    [coordinator, authorizer, treasurer] = ["coordinator", "authorizer", "treasurer"].map(
      (name) => new Program(idl(name), provider),
    );
    keys = {
      coordinatorInstance: derived(coordinator.programId, "coordinator", runId),
      coordinatorAccount: account.publicKey,
      manifest: derived(coordinator.programId, "manifest", runId),
    };
  });
  after(() => connection._rpcWebSocket.close());

  const read = () => coordinator.account.coordinatorAccount.fetch(account.publicKey);
  const room = async (account) =>
    SystemProgram.createAccount({
      fromPubkey: owner.publicKey,
      newAccountPubkey: account.publicKey,
      lamports: await connection.getMinimumBalanceForRentExemption(COORDINATOR_SIZE),
      space: COORDINATOR_SIZE,
      programId: coordinator.programId,
    });
  const permission = (grantee) => derived(authorizer.programId, "Authorization", owner.publicKey, grantee, SCOPE);

  test("a run is created and configured", async () => {
    await coordinator.methods
      .initCoordinator(owner.publicKey, owner.publicKey, runId, "test")
      .accountsPartial({ coordinatorAccount: account.publicKey, authorizer: authorizer.programId })
      .preInstructions([...units, await room(account)])
      .signers([account])
      .rpc();
    const found = await coordinator.methods.initCoordinator(owner.publicKey, owner.publicKey, runId, "test").pubkeys();
    assert.ok(found.coordinatorInstance.equals(keys.coordinatorInstance) && found.manifest.equals(keys.manifest));
    const metadata = { name: text("A run", 64), description: text("of clients", 280), numParameters: new BN(7), vocabSize: new BN(9) };
    await coordinator.methods
      .update(metadata, CONFIG, MODEL, null)
      .accountsPartial({ coordinatorInstance: keys.coordinatorInstance }) // which names the others
      .preInstructions(units)
      .rpc();
    const instance = await coordinator.account.coordinatorInstance.fetch(keys.coordinatorInstance);
    assert.equal(instance.runId, runId);
    assert.ok(instance.coordinatorAccount.equals(account.publicKey));
    const run = await read();
    assert.equal(Buffer.from(run.runId).toString().replaceAll("\0", ""), runId);
    assert.equal(Buffer.from(run.metadata.name).toString().replaceAll("\0", ""), "A run");
    assert.equal(run.metadata.numParameters.toNumber(), 7);
    assert.equal(run.config.globalBatchSizeEnd, 32);
    assert.equal(run.config.epochTime.toNumber(), 10_000);
    assert.equal(run.model.body.maxSeqLen, 64);
    assert.equal(run.model.body.checkpoint.variant, 2);
    assert.equal(Buffer.from(run.clientVersion).toString().replaceAll("\0", ""), "test");
    assert.equal(COORDINATOR_SIZE, coordinator.account.coordinatorAccount.size);
  });

  test("refusals come as Anchor's errors, by name", async () => {
    const stranger = await funded(connection);
    await assert.rejects(
      coordinator.methods
        .setPaused(false)
        .accountsPartial({ ...keys, authority: stranger.publicKey })
        .signers([stranger])
        .rpc(),
      (error) => {
        assert.ok(error instanceof AnchorError, String(error));
        assert.equal(error.error.errorCode.number, 2003);
        assert.equal(error.error.errorCode.code, "ConstraintRaw");
        return true;
      },
    );
    const known = new Map(coordinator.idl.errors.map((one) => [one.code, one.name]));
    await assert.rejects(
      coordinator.methods.tick().accountsPartial({ ...keys, user: owner.publicKey }).preInstructions(units).rpc(),
      (error) => {
        assert.ok(error instanceof AnchorError, String(error));
        assert.equal(error.error.errorCode.code, "CoordinatorErrorHalted");
        assert.equal(error.error.errorCode.number, 6015);
        assert.equal(known.get(6015).toLowerCase(), "coordinatorerrorhalted");
        return true;
      },
    );
  });

  test("a node joins, and a tick begins the warm-up", async () => {
    await authorizer.methods
      .authorizationCreate(ANYBODY, SCOPE)
      .rpc();
    await authorizer.methods
      .authorizationGrantorUpdate(true)
      .accountsPartial({ grantor: owner.publicKey, authorization: permission(ANYBODY) })
      .rpc();
    assert.ok((await authorizer.account.authorization.fetch(permission(ANYBODY))).active);
    await coordinator.methods
      .setPaused(false)
      .accountsPartial({ ...keys, authority: owner.publicKey })
      .preInstructions(units)
      .rpc();
    assert.equal((await read()).runState, WAITING);

    const change = expected("a change of the coordinator account");
    const emitter = coordinator.account.coordinatorAccount.subscribe(account.publicKey, "confirmed");
    emitter.on("change", (run) => run.membersLen.toNumber() === 1 && change.resolve(run));
    const user = await funded(connection);
    const node = Keypair.generate();
    await coordinator.methods
      .joinRun({ signer: [...user.publicKey.toBytes()], p2PIdentity: [...node.publicKey.toBytes()] })
      .accountsPartial({ ...keys, user: user.publicKey, authorization: permission(ANYBODY), node: node.publicKey })
      .preInstructions(units)
      .signers([user, node])
      .rpc();
    const seen = await change.promise;
    assert.ok(seen.members[0].signer.equals(user.publicKey));
    assert.ok(seen.members[0].p2P.equals(node.publicKey));
    await coordinator.account.coordinatorAccount.unsubscribe(account.publicKey);

    await pass(connection, 2);
    const instance = { coordinatorInstance: keys.coordinatorInstance, user: user.publicKey };
    await coordinator.methods.tick().accountsPartial(instance).preInstructions(units).signers([user]).rpc();
    const run = await read();
    assert.equal(run.runState, WARMUP);
    assert.equal(run.clients.len.toNumber(), 1);
    assert.ok(run.clients.items[0].signer.equals(user.publicKey));
    const manifest = await coordinator.account.runManifest.fetch(keys.manifest);
    assert.ok(manifest.coordinatorAccount.equals(account.publicKey));
    assert.ok(manifest.authorizer.equals(authorizer.programId));
  });

  test("an indexer reads what happened", async () => {
    // In pages from the newest on, until what it has seen; then in a batch.
    const listed = [];
    for (let before; ; ) {
      const page = await connection.getSignaturesForAddress(account.publicKey, { limit: 2, before }, "confirmed");
      if (page.length === 0) break;
      listed.push(...page);
      before = page.at(-1).signature;
    }
    const since = await connection.getSignaturesForAddress(account.publicKey, { until: listed[1].signature }, "confirmed");
    assert.deepEqual(since.map((one) => one.signature), [listed[0].signature]);
    const transactions = await connection.getTransactions(
      listed.map((one) => one.signature),
      { commitment: "confirmed", maxSupportedTransactionVersion: 0 },
    );
    const coder = new BorshInstructionCoder(coordinator.idl);
    const names = transactions.flatMap((one) => {
      const { message } = one.transaction;
      return message.compiledInstructions
        .filter((call) => message.staticAccountKeys[call.programIdIndex].equals(coordinator.programId))
        .map((call) => coder.decode(Buffer.from(call.data))?.name);
    });
    assert.deepEqual(names.reverse(), ["initCoordinator", "update", "setPaused", "joinRun", "tick"]);
    assert.ok(transactions.every((one) => one.blockTime > 0 && one.meta.err === null));
    const all = await coordinator.account.coordinatorInstance.all();
    assert.ok(all.some((one) => one.account.runId === runId));
    const [info, none] = await connection.getMultipleAccountsInfo([account.publicKey, Keypair.generate().publicKey]);
    assert.deepEqual([info.data.length, none], [COORDINATOR_SIZE, null]);
  });

  test("a treasurer's run", async () => {
    const mint = await createMint(connection, owner, owner.publicKey, null, 0);
    const index = new BN(Date.now());
    const run = derived(treasurer.programId, "Run", index.toArrayLike(Buffer, "le", 8));
    const own = Keypair.generate();
    const id = `${runId}-paid`;
    const instance = derived(coordinator.programId, "coordinator", id);
    await treasurer.methods
      .runCreate(index, id, "test", owner.publicKey, owner.publicKey)
      .accountsPartial({
        collateralMint: mint,
        coordinatorAccount: own.publicKey,
        coordinatorProgram: coordinator.programId,
        authorizer: authorizer.programId,
      })
      .preInstructions([...units, await room(own)])
      .signers([own])
      .rpc();
    const kept = await treasurer.account.run.fetch(run);
    assert.ok(kept.coordinatorAccount.equals(own.publicKey));
    assert.ok(kept.collateralMint.equals(mint) && kept.coordinatorInstance.equals(instance));
    assert.equal((await getAccount(connection, getAssociatedTokenAddressSync(mint, run, true))).amount, 0n);
    const participant = derived(treasurer.programId, "Participant", run, owner.publicKey);
    await treasurer.methods
      .participantCreate()
      .accountsPartial({ run })
      .rpc();
    assert.equal((await treasurer.account.participant.fetch(participant)).claimedEarnedPoints.toNumber(), 0);
    await treasurer.methods
      .runUpdate(null, { ...CONFIG, totalSteps: 7 }, null, null, null, null, null, null)
      .accountsPartial({ run, coordinatorManifest: derived(coordinator.programId, "manifest", id) })
      .preInstructions(units)
      .rpc();
    assert.equal((await coordinator.account.coordinatorAccount.fetch(own.publicKey)).config.totalSteps, 7);
  });
});
