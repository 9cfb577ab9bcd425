"""Every recipe that comes with psyche: as it is (on the meta device), and its CPU twin for real."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from psyche_lightning.checkpoints.model import ModelCopy
from psyche_lightning.cli import main
from psyche_lightning.distro import DisTrO
from psyche_lightning.errors import ConfigError
from psyche_lightning.lightning.optimizers import TakenStep
from psyche_lightning.plugins import load_plugins
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.estimate import Estimate, estimate, meta_model, muon_matrices, saved_dtype
from psyche_lightning.recipe.loading import recipe_folders
from psyche_lightning.train.activations import activations
from psyche_lightning.train.module import CausalModule

RECIPES = sorted(path.stem for path in recipe_folders()[1].glob("*.yaml"))
BILLION = 10**9
PLAIN = ("trainer.masters=float32", "trainer.delta=float32")


def data_of(provider: str, folder: Path) -> list[str]:
    """Overrides that give a recipe a little data of this machine."""
    if provider == "text":
        return ["data.config.max_bytes=2000000"]
    assert provider == "tokens"
    assert main(["data", "tokenize", functools.__file__, "--out", str(folder)]) == 0
    return [f"data.config.path={folder}"]


@functools.cache
def size_of(name: str) -> Estimate:
    return estimate(load_recipe(name))


def test_the_recipes_exist() -> None:
    assert {"consilience-40b", "demo", "hf-llama", "mla-1b", "mla-200m", "mla-8b", "tokens"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_it_resolves_and_its_size_is_known(name: str) -> None:
    recipe = load_recipe(name)
    size = size_of(recipe.name)
    assert size.trainable == size.parameters > 0
    assert recipe.trainer.devices * sum(size.memory.values()) >= 3 * 2 * size.parameters
    load_plugins().data_providers()[recipe.data.name]
    load_plugins().transports()[recipe.node.transport]


@pytest.mark.parametrize("name", RECIPES)
def test_its_twin_is_small_and_learns_on_this_machine(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, data_of(load_recipe(name, twin=True).data.name, tmp_path / "tokens"), twin=True)
    assert recipe.run.init_min_clients == 1
    assert recipe.run.total_steps * recipe.run.global_batch_size_end <= 16
    plugins = load_plugins()
    data = plugins.data_providers()[recipe.data.name](recipe.data.options, seed=recipe.run.seed)
    torch.manual_seed(recipe.run.seed)
    model = plugins.models()[recipe.model.name](recipe.model.options)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    model.to(getattr(torch, recipe.model.dtype))
    optimizer = DisTrO(model.named_parameters(), lr=0.01, config=recipe.distro)
    samples = data.samples(0, 4)
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in ("input_ids", "labels")}
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(math.log(256), rel=0.05)
    assert losses[-1] < 0.9 * losses[0]


def test_the_published_run_has_its_schedule_and_our_size() -> None:
    recipe = load_recipe("consilience-40b")
    size = size_of(recipe.name)
    assert 39 * BILLION <= size.parameters <= 41 * BILLION
    schedule = recipe.schedule
    steps = [0, 1000, 2000, 163_000, 238_000, 313_000, 325_000]
    assert [schedule(step) for step in steps] == pytest.approx([0, 1e-4, 2e-4, 2e-4, 1.1e-4, 2e-5, 2e-5])
    run = recipe.run
    assert (run.global_batch_size_start, run.global_batch_size_end) == (12288, 32768)
    assert (run.global_batch_size_warmup_tokens, run.total_steps) == (549_755_813_888, 325_000)
    assert (run.warmup_time, run.cooldown_time, run.epoch_time, run.max_round_train_time) == (3600, 120, 100_000, 360)
    assert (run.min_clients, run.init_min_clients, recipe.data.seq_len) == (16, 16, 2048)
    assert run.cold_start_warmup_steps == 100
    assert (recipe.data.name, sorted(recipe.data.config)) == ("mix", ["url", "vocab_size"])
    assert load_recipe("consilience-40b", twin=True).data.config == {"path": "stdlib"}
    assert (recipe.distro.chunk, recipe.distro.k, recipe.distro.decay) == (64, 4, 0.995)
    assert (recipe.optimizer.weight_decay, recipe.optimizer.clip_grad_norm) == (0.1, 1.0)
    # bf16 parameters, gradients and look-ahead copy; float32 delta and masters; votes of two payloads
    whole = estimate(load_recipe("consilience-40b", [*PLAIN, "trainer.devices=1"])).memory
    votes = whole["votes of its last two payloads"]
    assert sum(whole.values()) - votes == pytest.approx((2 + 2 + 2 + 4 + 4) * size.parameters, rel=1e-3)
    assert votes < 0.01 * size.parameters
    # What the recipe's text says of a node.
    text = said("consilience-40b")
    assert f"{sum(size.memory.values()) / 1e9:.1f} GB on each" in text
    traffic = size.bytes_per_round(16)
    assert f"{traffic / 1e6:.0f} MB up and down" in text
    assert f"{8 * traffic / 1e6 / run.max_round_train_time:.0f} Mbit/s" in text
    shares = [batch // 16 for batch in (run.global_batch_size_start, run.global_batch_size_end)]
    assert f"{shares[0]:,} to {shares[1]:,} samples" in text
    low, high = (share * recipe.data.seq_len * 4 / 1e6 for share in shares)
    assert f"{low:.1f} to {high:.1f} MB" in text


def said(name: str) -> str:
    """The text of a recipe, without the marks of comments."""
    return Path(f"recipes/{name}.yaml").read_text().replace("\n#   ", " ").replace("\n# ", " ")


def needed(name: str, *overrides: str) -> tuple[float, float, float]:
    """GB of a device for which a recipe is made, what it needs when it is fullest, and what activations take."""
    recipe = load_recipe(name, overrides)
    found = activations(recipe)
    assert recipe.trainer.device_memory is not None
    assert found is not None
    return recipe.trainer.device_memory, estimate(recipe).with_activations(found) / 1e9, found / 1e9


def test_recipes_for_cards_fit_or_say_what_is_lacking() -> None:
    there, fullest, active = needed("consilience-40b")
    assert (there, fullest < 0.9 * there) == (80, True)
    assert f"about {active:.0f} GB of activations" in said("consilience-40b")
    there, fullest, active = needed("mla-1b")
    assert (there, fullest < 0.9 * there) == (24, True)
    there, fullest, active = needed("mla-8b")
    assert f"lack {fullest - there:.0f} GB each" in said("mla-8b")
    assert f"{fullest - active:.1f} GB for their shares" in said("mla-8b")
    assert f"about {active:.1f} GB of activations" in said("mla-8b")
    there, fullest, _ = needed("mla-8b", "trainer.devices=3")
    assert fullest < there
    assert "With `trainer.devices=3` it fits" in said("mla-8b")
    assert [round(size_of(name).parameters / BILLION) for name in ("mla-1b", "mla-8b")] == [1, 8]


def test_each_device_holds_its_share() -> None:
    def held(*overrides: str) -> dict[str, int]:
        return estimate(load_recipe("demo", overrides)).memory

    whole = held()
    assert held("trainer.devices=2") == whole, "with DDP each has everything"
    fsdp = held("trainer.devices=2", "trainer.inner=fsdp")
    work = whole.pop("Muon at work on a matrix")
    assert {name: fsdp[name] for name in whole} == {name: -(-amount // 2) for name, amount in whole.items()}
    model: Any = meta_model(load_recipe("demo"))
    largest = max(one.numel() for one in muon_matrices(load_recipe("demo"), model))
    assert fsdp["Muon at work on a matrix"] == work + 2 * 4 * largest, "its gradient and momentum as a whole"
    blocks = [sum(one.nbytes for one in block.parameters()) for block in model.model.layers]
    outside = whole["parameters"] - sum(blocks)
    assert fsdp["parameters that are gathered for a while"] == 2 * max(blocks) + outside
    assert fsdp["gradients until they are divided"] == max(blocks) + outside


def test_the_demo_is_of_the_size_that_it_promises() -> None:
    size = size_of("demo")
    assert 1_000_000 <= size.parameters <= 4_000_000


def test_bytes_per_round() -> None:
    size = Estimate(parameters=10, trainable=8, memory={}, payload=100)
    assert size.bytes_per_round(3) == 200
    assert size.allreduce_bytes_per_round(2) == 32
    assert size.allreduce_bytes_per_round(4) == 48


def test_a_schedule_counts_each_payload_as_often_as_it_is_sent() -> None:
    later = "distro.schedule=[{from_step: 0, k: 32}, {from_step: 21, k: 4}]"
    size = estimate(load_recipe("demo", [later, "total_steps=100"], twin=True))
    payloads = [estimate(load_recipe("demo", [f"k={k}"], twin=True)).payload for k in (32, 4)]
    assert [(stage.first, stage.k, stage.steps, stage.payload, stage.rounds) for stage in size.stages] == [
        (1, 32, 1, payloads[0], 20),
        (21, 4, 1, payloads[1], 80),
    ]
    assert size.payload == payloads[0]
    assert size.published == 20 * payloads[0] + 80 * payloads[1]
    assert [stage.rounds for stage in estimate(load_recipe("demo", [later, "total_steps=7"], twin=True)).stages] == [
        7,
        0,
    ]


def test_muon_s_momentum_needs_memory() -> None:
    chosen = load_recipe(
        "demo", ["optimizer.name=muon", "optimizer.muon_for={'*.o_proj.*': true, '*': false}"], twin=True
    )
    model: Any = meta_model(chosen)
    (output,) = (parameter for name, parameter in model.named_parameters() if ".o_proj." in name)
    assert estimate(chosen, model).memory["momentum of Muon"] == 4 * output.numel()
    assert "momentum of Muon" not in estimate(load_recipe("demo", ["optimizer.name=adamw"], twin=True)).memory


@pytest.mark.parametrize("saved", ["float32", "bfloat16"])
def test_a_checkpoint_s_copy_is_as_large_as_its_file(saved: str, tmp_path: Path) -> None:
    tied = ["model.name=hf", "model.config={model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 2, vocab_size: 300}"]
    recipe = load_recipe("demo", [*tied, f"save_dtype={saved}"], twin=True)
    model = load_plugins().models()[recipe.model.name](recipe.model.options)
    ModelCopy(model, dtype=saved_dtype(recipe, recipe.model.options)).save(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    assert estimate(recipe).copied == sum(value.nbytes for value in file.values())
    assert {value.dtype for value in file.values()} == {getattr(torch, saved)}


def test_with_local_steps_an_all_reduce_is_made_for_each_step_that_a_share_has_samples_for() -> None:
    size = Estimate(parameters=8, trainable=8, memory={}, payload=100, steps=8, samples=24)
    assert size.allreduce_bytes_per_round(2) == 8 * 32
    assert size.allreduce_bytes_per_round(4) == 6 * 48


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("optimizer.name=muon",),
        ("distro.float32_gradients=true",),
        ("trainer.masters=split",),
        ("trainer.delta=bfloat16", "trainer.masters=split"),
        ("trainer.delta=int8",),
        ("distro.local_steps=2", "global_batch_size_start=4"),
        ("distro.local_steps=2", "global_batch_size_start=4", "optimizer.name=muon"),
    ],
)
def test_the_memory_is_what_a_node_holds_after_a_round(dtype: str, settings: tuple[str, ...]) -> None:
    recipe = load_recipe("demo", [f"model.dtype={dtype}", "decay=0.9", *settings], twin=True)
    model = load_plugins().models()[recipe.model.name](recipe.model.options).to(getattr(torch, dtype))
    module = CausalModule(model, recipe.optimizer, recipe.schedule)
    optimizer = module.configure_optimizers()["optimizer"]
    step = TakenStep(optimizer, module, recipe.distro, recipe.trainer.holding)
    ids = torch.randint(256, (2, recipe.data.seq_len))
    module.training_step({"input_ids": ids, "labels": ids}, 0).backward()  # type: ignore[union-attr, no-untyped-call]
    with step.working():
        step.step_locally()
    step.distro.apply([step.distro.encode()], step.distro.lr_bits())

    def held(values: Any) -> int:
        if isinstance(values, torch.Tensor):
            return values.nbytes if values.ndim else 0  # counters of steps
        return sum(map(held, values.values())) if isinstance(values, dict) else 0

    parameters = list(model.parameters())
    found = {
        "parameters": sum(parameter.nbytes for parameter in parameters),
        "gradients": sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None),
        **step.distro.held(),
        "state": held(dict(optimizer.state)) + step.distro.held()["masters"] + step.distro.held()["momentum"],
    }
    memory = dict(estimate(recipe).memory)
    passing = ("copy for local steps", "where local steps led, in float32")
    assert [name for name in passing if name in memory] == list(passing[: 2 if dtype == "bfloat16" else 1]) * bool(
        recipe.distro.local_steps
    )
    passing = (*passing, "directions of Muon, in float32", "Muon at work on a matrix")
    for name in (*passing, "votes of its last two payloads", "the largest one in float32, for digests"):
        memory.pop(name, None)
    assert memory.pop("parameters") == found["parameters"]
    assert memory.pop("gradients") == found["gradients"]
    assert memory.pop("delta (what is yet to be sent)") == found["delta"]
    assert sum(memory.values()) == pytest.approx(found["state"], abs=64)  # split masters have a few ties


def test_a_node_that_computes_in_bfloat16_needs_masters() -> None:
    asked = estimate(load_recipe("demo", ["trainer.precision=bf16-true"], twin=True))
    assert asked.memory == estimate(load_recipe("demo", ["model.dtype=bfloat16"], twin=True)).memory
    assert asked.memory["float32 masters"] == 4 * asked.parameters


def test_patterns_know_the_names_that_parameters_have_in_training() -> None:
    fewer = load_recipe("demo", ["distro.k_for={'model.lm_head.*': 2}"], twin=True)
    assert estimate(fewer).payload < estimate(load_recipe("demo", twin=True)).payload
    with pytest.raises(ConfigError, match="matches no parameter"):
        estimate(load_recipe("demo", ["distro.k_for={'lm_head.*': 2}"], twin=True))


def test_frozen_parameters_are_counted_apart() -> None:
    recipe = load_recipe("demo", twin=True)
    whole = estimate(recipe)
    model: Any = meta_model(recipe)
    model.get_input_embeddings().requires_grad_(False)
    part = estimate(recipe, model)
    assert part.parameters == whole.parameters
    assert part.trainable == whole.trainable - 256 * 64
    assert part.memory["parameters"] == whole.memory["parameters"]
    assert part.memory["gradients"] == 4 * part.trainable
    assert part.payload < whole.payload
