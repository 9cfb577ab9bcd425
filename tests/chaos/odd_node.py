"""``psyche train`` on a node that does something wrong; the rest of it is what everybody runs.

    python odd_node.py KIND SEED train demo ...

Kinds: ``corrupt`` changes one byte of each large blob that it serves; ``slow`` takes a second to serve one, and says
so first; ``lossy`` loses a tenth of what it fetches; ``rude`` mixes garbage of all kinds into what it tells others. The
roles of :mod:`psyche_lightning.simulation.roles` break the rules with what the node's core sends.
"""

import random
import struct
import sys
import time
from dataclasses import replace

import psyche_lightning.builtin.transports as builtin
from psyche_lightning.cli import main
from psyche_lightning.errors import TransportError
from psyche_lightning.node import events as ev
from psyche_lightning.node.runtime import Runtime
from psyche_lightning.protocol.messages import Stuck, seal
from psyche_lightning.simulation.roles import ROLES, Role
from psyche_lightning.transports.framing import Kind, frame

LARGE = 20_000  # bytes: more than a payload of the demo's twin, less than the pieces of its matrices
LOSS = 0.1
KIND, RNG = sys.argv[1], random.Random(sys.argv[2])
make = builtin.tcp


def serving(read):
    def read_blob(digest):
        data = read(digest)
        if data is None or len(data) < LARGE:
            return data
        if KIND == "slow":
            print(f"serving {digest.hex()[:12]}", flush=True)
            time.sleep(1.0)
            return data
        place = RNG.randrange(len(data))
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    return read_blob


def garbage(context, attempt):
    """A frame that no honest node sends."""
    foreign = seal(context.identity, "another run", Stuck(0, 0, attempt)).raw
    return RNG.choice(
        [
            frame(Kind.MESSAGE, foreign),
            frame(Kind.MESSAGE, RNG.randbytes(300)),
            RNG.randbytes(300),
            struct.pack("!IB", 1 << 31, Kind.MESSAGE),
            struct.pack("!IB", 60_000, Kind.MESSAGE) + RNG.randbytes(100),
            struct.pack("!IB", 40, 200) + bytes(40),
        ]
    )


def odd(options):
    transport = make(options)
    start, fetch, broadcast = transport.start, transport.fetch, transport.broadcast
    state = {"context": None, "count": 0}

    async def odd_start(context):
        state["context"] = context
        return await start(
            replace(context, read_blob=serving(context.read_blob)) if KIND in ("slow", "corrupt") else context
        )

    async def odd_fetch(digest, providers, **options):
        if KIND == "lossy" and RNG.random() < LOSS:
            print(f"lost {digest.hex()[:12]}", flush=True)
            raise TransportError(f"nobody delivered blob {digest.hex()[:8]}: the test dropped it")
        return await fetch(digest, providers, **options)

    def odd_broadcast(message):
        broadcast(message)
        if KIND == "rude":
            state["count"] += 1
            for peer in transport._peers.values():
                if RNG.random() < 0.1:
                    peer.put(garbage(state["context"], state["count"]))

    transport.start, transport.fetch, transport.broadcast = odd_start, odd_fetch, odd_broadcast
    return transport


def play_role():
    handle, carry_out, plays = Runtime.handle, Runtime._carry_out, {}

    def role(runtime):
        key = runtime, runtime._scope  # which the coordinator tells after a while
        if key not in plays:
            plays[key] = Role(KIND, runtime.node.identity, runtime._scope, RNG, runtime.node.store.put)
        return plays[key]

    def hear(runtime, event):
        if isinstance(event, ev.Received):
            role(runtime).hear(event.envelope)
        handle(runtime, event)

    def carry(runtime, effect):
        for played in role(runtime).play(effect):
            carry_out(runtime, played)

    Runtime.handle, Runtime._carry_out = hear, carry


if KIND in ROLES:
    play_role()
else:
    builtin.tcp = odd
sys.exit(main(sys.argv[3:]))
