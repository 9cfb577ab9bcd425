"""Psyche's own run configurations."""

import pytest

from psyche_lightning.errors import ConfigError
from psyche_lightning.recipe import load_recipe

BIG = """
[config]
warmup_time = 3600
cooldown_time = 120
epoch_time = 100000
max_round_train_time = 360
round_witness_time = 5
min_clients = 16
init_min_clients = 16
witness_nodes = 0
verification_percent = 0
global_batch_size_start = 12288
global_batch_size_end = 32768
global_batch_size_warmup_tokens = 549755813888
total_steps = 325000
waiting_for_members_extra_time = 10
[model.LLM]
architecture = "HfDeepseek"
data_type = "Pretraining"
max_seq_len = 2048
cold_start_warmup_steps = 100
data_location = { WeightedHttp = "https://example.org/mix.json" }
[model.LLM.checkpoint.Hub]
repo_id = "org/model-init"
[model.LLM.lr_schedule.WarmupStableDecay]
base_lr = 2e-4
warmup_init_lr = 0.0
warmup_steps = 2000
stable_steps = 161000
cosine_decay_steps = 150000
cosine_decay_final_lr = 2e-5
linear_decay_steps = 12000
linear_decay_final_lr = 2e-5
[model.LLM.optimizer.Distro]
clip_grad_norm = 1.0
weight_decay = 0.1
compression_decay = 0.995
compression_chunk = 64
compression_topk = 4
quantize_1bit = true
"""


@pytest.fixture
def recipe(tmp_path):
    def load(text, *overrides):
        path = tmp_path / "run.toml"
        path.write_text(text)
        return load_recipe(path, overrides)

    return load


def test_the_40b_run_is_a_recipe(recipe):
    found = recipe(BIG)
    assert (found.name, found.run.total_steps, found.run.global_batch_size_end) == ("run", 325000, 32768)
    assert found.run.cold_start_warmup_steps == 100
    assert (found.distro.k, found.distro.chunk, found.distro.decay) == (4, 64, 0.995)
    assert (found.model.name, found.model.path) == ("hf", "org/model-init")
    assert (found.data.name, found.data.config, found.data.seq_len) == (
        "mix",
        {"url": "https://example.org/mix.json"},
        2048,
    )
    assert (found.optimizer.weight_decay, found.optimizer.clip_grad_norm) == (0.1, 1.0)
    assert [found.schedule(step) for step in (1000, 2000, 160000)] == [1e-4, 2e-4, 2e-4]


def test_overrides_win_as_in_any_recipe(recipe):
    found = recipe(BIG, "total_steps=9", "data.name=text", "data.config={path: stdlib}", "model.name=mla", "k=2")
    assert (found.run.total_steps, found.data.name, found.model.name, found.distro.k) == (9, "text", "mla", 2)


def test_config_alone_is_enough(recipe):
    found = recipe("run_id = 'alone'\n" + BIG[: BIG.index("[model.LLM]")])
    assert (found.name, found.run.min_clients, found.data.name) == ("alone", 16, "text")


@pytest.mark.parametrize(
    ("place", "name", "config"),
    [
        ('"Dummy"', "text", {}),
        ('{ Local = "/data" }', "tokens", {"path": "/data"}),
        ('{ Preprocessed = "/data" }', "parquet", {"path": "/data"}),
        (
            '{ Http = { token_size_in_bytes = "FourBytes", shuffle = "DontShuffle", '
            'location = { SingleUrl = "http://h/a.bin" } } }',
            "tokens",
            {"token_size": 4, "shuffle": False, "url": "http://h/a.bin"},
        ),
        (
            '{ Http = { token_size_in_bytes = "TwoBytes", shuffle = { Seeded = ' + str([7] * 32) + " }, location = "
            '{ NumberedFiles = { url_template = "http://h/{}.bin", start_index = 1, n_left_pad_zeros = 5, '
            "num_files = 3 } } } }",
            "tokens",
            {"token_size": 2, "shuffle": [7] * 32, "url": "http://h/{}.bin", "start": 1, "pad": 5, "count": 3},
        ),
    ],
)
def test_each_place_of_data_has_its_provider(recipe, place, name, config):
    found = recipe(BIG.replace('{ WeightedHttp = "https://example.org/mix.json" }', place))
    assert (found.data.name, found.data.config) == (name, config)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[config]", "[settings]", r"no section \[config\]"),
        ("warmup_time = 3600", "warmup_tim = 3600", "unknown key 'warmup_tim'.*Known keys: warmup_time"),
        ("warmup_time = 3600", 'warmup_time = "long"', "run.warmup_time is 'long'"),
        ("HfDeepseek", "Torchtitan", "Torchtitan is not supported"),
        ('WeightedHttp = "https://example.org/mix.json"', 'Server = "h:1"', "'Server' is not supported.*choose Local"),
        ("[model.LLM.optimizer.Distro]", "[model.LLM.optimizer.Dummy]", "'Dummy' is not supported"),
        ("max_seq_len = 2048", "", r"\[model.LLM\] does not have Psyche's form: KeyError\('max_seq_len'\)"),
        ("[config]", "[config", "not a readable TOML file"),
    ],
)
def test_unsupported_settings_are_refused_by_name(recipe, old, new, message):
    with pytest.raises(ConfigError, match=message):
        recipe(BIG.replace(old, new, 1))
