"""What ranks do in ``tests/distro/test_sharded.py``: each compares its part with a node of one device."""

import contextlib
from pathlib import Path

import torch
import torch.distributed as dist
from support.golden import CONFIG, FILES, recorded, replay
from support.golden import model as golden_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from psyche_lightning import MuonAdamW
from psyche_lightning.distro import (
    DisTrO,
    DistroConfig,
    LocalSteps,
    NonFiniteGradientError,
    ShardedDisTrO,
    shared_optimizer,
)
from psyche_lightning.distro.holding import Holding
from psyche_lightning.distro.shards import held
from psyche_lightning.errors import ConfigError, PsycheError, WireError
from psyche_lightning.node.parameters import ParameterReplica
from psyche_lightning.node.store import MemoryBlobStore
from psyche_lightning.wire.canonical import sha256


class Model(torch.nn.Module):
    """A tied table, odd matrices, a convolution, vectors, a scalar, frozen parameters, and a very small one."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(50, 24)
        self.inner = torch.nn.Linear(24, 37)
        self.convolution = torch.nn.Conv2d(5, 33, 3)
        self.back = torch.nn.Linear(37, 24)
        self.head = torch.nn.Linear(24, 50, bias=False)
        self.head.weight = self.table.weight
        self.norm = torch.nn.LayerNorm(1)
        self.long = torch.nn.Parameter(torch.randn(1000))
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.to(dtype)

    def forward(self, tokens):
        return self.head(self.back(torch.relu(self.inner(self.table(tokens))))) * self.scale


def sharded_model(dtype=torch.float32, shard=True):
    model = Model(dtype)
    if shard:
        fully_shard(model, mesh=mesh(), ignored_params={model.scale})
    return model


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def groups(model, config, muon=False):
    """Parameter groups with their own learning rates; perhaps one for Muon."""
    named = list(model.named_parameters())
    decay = {} if config.local_steps else {"weight_decay": 0.1}
    found = [
        {"params": [pair for pair in named if pair[1].ndim < 2], "lr": 3e-3},
        {"params": [pair for pair in named if pair[1].ndim > 2 or (pair[1].ndim == 2 and not muon)], **decay},
    ]
    matrices = {"params": [pair for pair in named if pair[1].ndim == 2], "muon": True, "momentum": 0.8, "lr": 2e-2}
    return [*found, matrices] if muon else found


def like(parameter, value):
    """A tensor placed as a parameter is."""
    value = value.to(parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements) if is_sharded(parameter) else value


def is_sharded(tensor):
    return isinstance(tensor, DTensor)


def whole(tensor):
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def noise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def encode(optimizer, model, seed, step, config):
    """A payload from equal gradients, or displacements."""
    some = noise(model, seed)
    parameters = dict(model.named_parameters())
    if config.local_steps:
        with optimizer.working(), torch.no_grad():
            for name, value in some.items():
                there = whole(parameters[name].detach()) + 0.01 * value
                parameters[name].copy_(like(parameters[name], there))
        return optimizer.encode(step)
    with optimizer.look_ahead() if config.lookahead else contextlib.nullcontext():
        seen = {name: whole(parameter.detach()).clone() for name, parameter in parameters.items()}
    for name, value in some.items():
        missing = name in ("long", "back.weight") and seed % 3 == 0
        parameters[name].grad = None if missing else like(parameters[name], value)
        for hook in (parameters[name]._post_accumulate_grad_hooks or {}).values() if not missing else ():
            hook(parameters[name])  # as a backward pass does
    payload = optimizer.encode(step)
    assert all(parameter.grad is None or name in some for name, parameter in parameters.items())
    return payload, seen


def published(optimizer):
    return {name: tensor.clone() for name, tensor in optimizer.published()}


def same(ours, theirs):
    """Whether named tensors are equal to the bit."""
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def one_device(model, config, holding, muon):
    return shared_optimizer(groups(model, config, muon), 1e-2, config, holding)


def all_rounds(cases):
    """Several :func:`rounds`."""
    for case in cases:
        try:
            rounds(*case)
        except Exception as error:
            error.add_note(f"in the case {case}")
            raise


def rounds(options, dtype, shard=True, how=None, muon=False):
    """Rounds beside a node of one device, with a peer: equal payloads, parameters, delta and figures; also resumed."""
    config, dtype = DistroConfig(**options), getattr(torch, dtype)
    alone, peer, model = Model(dtype), Model(dtype), sharded_model(dtype, shard)
    holding = Holding(**(how or {}))
    ours = ShardedDisTrO(groups(model, config, muon), 1e-2, config=config, budget=1 << 14, holding=holding)
    theirs, others = one_device(alone, config, holding, muon), one_device(peer, config, holding, muon)
    first = dist.get_rank() == 0
    assert ours.layout_digest == theirs.layout_digest
    assert ours.payload_sizes == theirs.payload_sizes
    assert ours.abstention(1) == theirs.abstention(1)
    ours.observing = theirs.observing = True
    for step in range(1, 7):
        for group in (*ours.param_groups, *theirs.param_groups, *others.param_groups):
            group["lr"] *= 0.9
        mine, reference = encode(ours, model, step, step, config), encode(theirs, alone, step, step, config)
        from_peer = encode(others, peer, 100 + step, step, config)
        if not config.local_steps:
            (mine, seen), (reference, expected), (from_peer, _) = mine, reference, from_peer
            assert same(seen, expected)
        assert mine == reference
        payloads = [mine, from_peer] if step != 4 else []
        for optimizer in (ours, theirs, others):
            optimizer.apply(payloads, theirs.lr_bits(), step)
        assert published(ours) == {} if not first else same(published(ours), published(theirs))
        found = [dict(model.named_parameters()), dict(alone.named_parameters())]
        assert same(*[{name: whole(p.detach()) for name, p in named.items()} for named in found])
        for one, two in zip(ours.figures(), theirs.figures(), strict=True):
            assert one.keys() == two.keys()
            for name, value in one.items():
                torch.testing.assert_close(value, two[name], rtol=1e-5, atol=0, equal_nan=True)
        if step == 2:  # somebody loads other values into the module
            with torch.no_grad():
                for name, value in noise(model, 7).items():
                    for module in (model, alone, peer):
                        parameter = dict(module.named_parameters())[name]
                        parameter.copy_(like(parameter, value))
        if step == 3:
            state, delta = ours.state_dict(), list(ours.delta())
            assert ours.nonce == theirs.nonce == 3
            for parameter in model.parameters():  # else the old optimizer still takes streamed gradients
                (parameter._post_accumulate_grad_hooks or {}).clear()
            ours = ShardedDisTrO(groups(model, config, muon), 1e-2, config=config, holding=holding)
            ours.load_state_dict(state)
            ours.observing = True
        if step == 5:
            delta, momentum = dict(theirs.delta()), dict(theirs.momentum())
            for found, expected in ((dict(ours.delta()), delta), (dict(ours.momentum()), momentum)):
                assert same(found, expected) if first else not found
            assert len(momentum) == (3 if muon else 0)
            ours.reset()
            for name in momentum:
                ours.load_momentum(name, momentum[name] if first else None)
            for name in delta:
                ours.load_delta(name, delta[name] if first else None)
                ours.load_published(name, dict(theirs.published())[name] if first else None)
            ours.nonce = theirs.nonce
    assert torch.equal(ours.prints(), ours.prints())


def by_columns(dtype):
    """A model whose matrices are divided in another way than ``fully_shard`` does."""
    model = Model(dtype)
    for module in (model.inner, model.back):
        module.weight = torch.nn.Parameter(distribute_tensor(module.weight.detach(), mesh(), [Shard(1)]))
    return model


def own_steps():
    """Steps of Muon and AdamW beside those of one device, with a matrix that has no gradient at times.

    Returns the arithmetic of Muon's products on one device, and here: with each matrix on one rank, and on every one.
    """
    found = []
    for dtype, divided in (
        (torch.float32, sharded_model),
        (torch.bfloat16, sharded_model),
        (torch.float32, by_columns),
    ):
        models = Model(dtype), divided(dtype)
        made = [MuonAdamW(groups(model, DistroConfig(), muon=True)) for model in models]
        work = [0, 0]
        for step in range(1, 4):
            for number, (model, optimizer) in enumerate(zip(models, made, strict=True)):
                for name, value in noise(model, step).items():
                    parameter = dict(model.named_parameters())[name]
                    parameter.grad = like(parameter, value) if step != 2 or name != "inner.weight" else None
                with FlopCounterMode(display=False) as counter:
                    optimizer.step()
                work[number] += counter.get_total_flops()
            values = [{name: whole(p.detach()) for name, p in model.named_parameters()} for model in models]
            assert same(*values)
            momenta = [[whole(one["momentum_buffer"]) for one in o.state.values() if len(one) == 1] for o in made]
            assert len(momenta[0]) == 3
            assert all(map(torch.equal, *momenta))
        found.append(tuple(work))
    return found


def golden():
    """The digests after the recorded rounds on rank 0; the scalar and the empty parameter are not sharded."""
    return [_replayed(kind) for kind in FILES]


def _replayed(kind):
    module = golden_model()
    for name, value in list(module.named_parameters()):
        if value.ndim and value.numel():
            setattr(module, name, torch.nn.Parameter(distribute_tensor(value.detach(), mesh(), [Shard(0)])))
    options = {"local_steps": 1, "scale": 1.7} if kind is LocalSteps else {}
    decay = 0.1 if kind is DisTrO else 0.0
    config = DistroConfig(CONFIG.chunk, CONFIG.k, **options)
    optimizer = ShardedDisTrO(module.named_parameters(), 1e-2, decay, config, budget=1)
    return replay(optimizer, recorded(kind), apply=optimizer.apply)


def replicas():
    """Snapshots go from one device to ranks and back, frozen parameters and buffers as well."""
    one, other, first = Model(torch.bfloat16), Model(torch.bfloat16), dist.get_rank() == 0
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    for module in (one, other):
        module.register_buffer("counts", torch.arange(5.0) + (module is other))
        module.frozen_table = torch.nn.Parameter(torch.full((33, 2), float(module is other)), requires_grad=False)
    ours = fully_shard(one, mesh=mesh(), ignored_params={one.scale})
    tokens = torch.arange(5)
    config = DistroConfig(chunk=16, k=4)
    shared = ShardedDisTrO(ours.named_parameters(), 1e-2, config=config)
    alone = DisTrO(other.named_parameters(), 1e-2, config=config)
    mine, theirs = ParameterReplica(shared, ours), ParameterReplica(alone, other)
    assert (mine.layout, mine.size, mine.tensors) == (theirs.layout, theirs.size, theirs.tensors)
    store, blobs = MemoryBlobStore(), MemoryBlobStore()
    put = store.put if first else sha256
    with torch.no_grad():
        ours(tokens)  # the whole model's parameters stay gathered after it
    wanted, buffers = theirs.snapshot(store.put), theirs.snapshot_buffers(store.put)
    found = []
    for bad in (b"no index", store.get(buffers)):
        try:
            mine.load(blobs.put(bad), blobs.get)
        except WireError as error:
            found.append(str(error))
    before = mine.prints()
    mine.load(wanted, store.get if first else None)
    mine.load_buffers(buffers, store.get if first else None)
    assert before != mine.prints()
    assert not first or mine.digest(put) == wanted
    if not first:
        mine.digest(put)
    with torch.no_grad():
        assert torch.equal(ours(tokens), other(tokens))
    assert torch.equal(ours.counts, other.counts)
    shared.ranks.reshard(ours)
    for name, value in noise(other, 3).items():
        for module in (ours, other):
            parameter = dict(module.named_parameters())[name]
            parameter.grad = like(parameter, value)
    payload = alone.encode()
    assert shared.encode() == payload
    for replica in (mine, theirs):
        replica.check(payload, 1)
        replica.apply([payload], shared.lr_bits(), 1)
    digest, other_digest = mine.snapshot(blobs.put if first else sha256), theirs.digest(sha256)
    assert not first or digest == other_digest
    if first:  # one device takes it
        theirs.load(wanted, store.get)
        theirs.load(digest, blobs.get)
        assert theirs.digest(sha256) == digest
    with torch.no_grad():
        assert torch.equal(ours(tokens), other(tokens))
    return found


def peak(layers, width):
    """Peak memory of a rank above what it had at the start, in bytes; with one rank, of a node of one device."""
    alone = dist.get_world_size() == 1
    start = memory("VmRSS")
    torch.manual_seed(dist.get_rank())
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers)))
    if not alone:
        for layer in model:
            fully_shard(layer, mesh=mesh())
        fully_shard(model, mesh=mesh())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            held(parameter).fill_(1 / width)
    kind = DisTrO if alone else ShardedDisTrO
    optimizer = kind(model.named_parameters(), lr=1e-3, budget=8 << 20)
    for _ in range(2):
        model(torch.randn(4, width)).square().mean().backward()
        optimizer.apply([optimizer.encode()], optimizer.lr_bits())
        for parameter in model.parameters():
            parameter.grad = None
    assert sum(1 for _ in optimizer.published()) == (0 if dist.get_rank() else layers)
    return memory("VmHWM") - start


def memory(what):
    """A figure of this process's memory, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return 1024 * int(line.split()[1])
    raise AssertionError(what)


def refusals():
    """Clear errors, the same on every rank."""
    found = []
    for model, options in (
        (torch.nn.Linear(3, 3, bias=False), {}),
        (torch.nn.Linear(70, 70), {"muon": True}),
    ):
        fully_shard(model, mesh=mesh())
        named = [{"params": list(model.named_parameters()), **options}]
        try:
            ShardedDisTrO(named, lr=0.1)
        except ConfigError as error:
            found.append(str(error))
    model = sharded_model()
    optimizer = ShardedDisTrO(model.named_parameters(), lr=0.1, config=DistroConfig(chunk=8, k=2))
    for name, value in noise(model, 1).items():
        parameter = dict(model.named_parameters())[name]
        parameter.grad = like(parameter, value)
    if dist.get_rank() == 1:
        model.inner.weight.grad.to_local()[-1, -1] = torch.inf
    for call in (
        optimizer.encode,
        lambda: optimizer.apply([b"short"], optimizer.lr_bits()),
        lambda: optimizer.load_delta("nobody", None if dist.get_rank() else torch.zeros(3)),
        lambda: optimizer.load_state_dict({**optimizer.state_dict(), "rank": 5}),
    ):
        try:
            call()
        except (NonFiniteGradientError, PsycheError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return [*found, optimizer.nonce]
