"""The conformance kit of data providers: subclass one class, and pytest tests the contract.

Example::

    # tests/test_digits.py
    from psyche_lightning.testing.data import DataContract

    class TestDigits(DataContract):
        def make_factory(self):
            return digits  # as it is registered

        def make_config(self, folder):
            return {"seq_len": 16, "largest": 9}

For a provider that reads its samples from a source that can fail, such as a server, subclass :class:`OutageContract`
instead. The kit needs pytest alone (``pip install psyche-lightning[testing]``).
"""

# ruff: noqa: D102 - the name of a test says what it shows
from __future__ import annotations

import abc
import contextlib
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from psyche_lightning.errors import ConfigError, DataError
from psyche_lightning.hookspecs import DataProvider

IGNORED = -100
SEED = 7
MOST = 64
"""The most samples that a test reads."""

Sample = dict[str, torch.Tensor]


def same(first: list[Sample], second: list[Sample]) -> bool:
    """Whether two lists of samples are equal bit for bit."""
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


def _content(sample: Sample) -> list[tuple[str, list[int]]]:
    return [(name, tensor.tolist()) for name, tensor in sorted(sample.items())]


class _Ids(Dataset[Sample]):
    """A data set of samples by id, for a DataLoader with workers."""

    def __init__(self, provider: DataProvider, count: int) -> None:
        self._provider = provider
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        return self._provider.samples(index, index + 1)[0]


class DataContract(abc.ABC):
    """What every data provider must do; subclass it as ``Test...`` and define the two methods.

    Attributes:
        picklable: whether a worker process can get the provider; set it to False for a provider that cannot be pickled.
    """

    picklable: bool = True

    @abc.abstractmethod
    def make_factory(self) -> Callable[..., DataProvider]:
        """Returns the factory that the plugin registers: ``factory(config, seed=...)``."""

    @abc.abstractmethod
    def make_config(self, folder: Path) -> dict[str, Any]:
        """Returns a valid configuration with ``seq_len``, for at least three samples.

        Args:
            folder: an empty folder for files that the provider reads. A later call with the same folder must write the
                same files.
        """

    # -- helpers ------------------------------------------------------------------------------------------------------

    @pytest.fixture
    def config(self, tmp_path: Path) -> dict[str, Any]:
        """The configuration of one test."""
        return self.make_config(tmp_path)

    @pytest.fixture
    def provider(self, config: dict[str, Any]) -> DataProvider:
        """The provider of one test."""
        return self.make_factory()(config, seed=SEED)

    # -- properties ---------------------------------------------------------------------------------------------------

    def test_it_says_what_it_has(self, provider: DataProvider, config: dict[str, Any]) -> None:
        assert len(provider) >= 3
        assert type(provider.vocab_size) is int
        assert provider.vocab_size >= 2
        assert provider.seq_len == config["seq_len"]

    def test_samples_have_the_contract_s_form(self, provider: DataProvider) -> None:
        samples = provider.samples(0, min(len(provider), MOST)) + provider.validation()
        names = set(samples[0])
        assert {"input_ids", "labels"} <= names <= {"input_ids", "labels", "position_ids"}
        for sample in samples:
            assert set(sample) == names, "all samples must have the same tensors"
            for tensor in sample.values():
                assert tensor.dtype == torch.int64
                assert tensor.shape == (provider.seq_len,)
                assert tensor.device.type == "cpu"

    def test_ids_are_within_the_vocabulary(self, provider: DataProvider) -> None:
        for sample in provider.samples(0, min(len(provider), MOST)) + provider.validation():
            ids, labels = sample["input_ids"], sample["labels"]
            assert int(ids.min()) >= 0
            assert int(ids.max()) < provider.vocab_size
            trained = labels[labels != IGNORED]
            assert not len(trained) or (int(trained.min()) >= 0 and int(trained.max()) < provider.vocab_size)
            positions = sample.get("position_ids")
            assert positions is None or (int(positions.min()) >= 0 and int(positions.max()) < provider.seq_len)

    def test_no_text_predicts_the_next_one(self, provider: DataProvider) -> None:
        for sample in provider.samples(0, min(len(provider), MOST)) + provider.validation():
            if "position_ids" in sample:
                begins = sample["position_ids"].diff() != 1
                assert bool((sample["labels"][1:][begins] == IGNORED).all()), "the first token of a text has no label"

    def test_the_tokenizer_fits_and_can_be_saved(self, provider: DataProvider, tmp_path: Path) -> None:
        tokenizer = provider.tokenizer
        if tokenizer is not None:
            assert len(tokenizer) <= provider.vocab_size
            tokenizer.save_pretrained(tmp_path / "saved")
            assert any((tmp_path / "saved").iterdir())

    def test_the_fingerprint_is_text(self, provider: DataProvider) -> None:
        assert isinstance(getattr(provider, "fingerprint", ""), str)

    # -- the same on every node ---------------------------------------------------------------------------------------

    def test_two_nodes_see_the_same(self, provider: DataProvider, config: dict[str, Any]) -> None:
        other = self.make_factory()(config, seed=SEED)
        assert len(other) == len(provider)
        count = min(len(provider), MOST)
        assert same(other.samples(0, count), provider.samples(0, count))
        assert same(other.validation(), provider.validation())
        assert getattr(other, "fingerprint", None) == getattr(provider, "fingerprint", None)

    def test_the_order_of_calls_does_not_matter(self, provider: DataProvider, config: dict[str, Any]) -> None:
        count = min(len(provider), MOST)
        whole = provider.samples(0, count)
        other = self.make_factory()(config, seed=SEED)
        chance = random.Random(0)
        for number in chance.sample(range(count), count):
            assert same(other.samples(number, number + 1), [whole[number]])
        for _ in range(20):
            start = chance.randrange(count)
            stop = chance.randint(start, count)
            assert same(other.samples(start, stop), whole[start:stop])

    def test_ids_are_half_open_as_in_python(self, provider: DataProvider) -> None:
        assert len(provider.samples(1, 3)) == 2
        assert len(provider.samples(2, 3)) == 1
        assert provider.samples(2, 2) == []

    def test_ids_go_on_after_the_last_sample(self, provider: DataProvider) -> None:
        length = len(provider)
        first, last, again = (provider.samples(start, start + 1) for start in (0, length - 1, length))
        assert same(provider.samples(length - 1, length + 1), [*last, *again])
        for far in (5 * length, length * (2**62 // length), length * (2**70 // length)):
            one = provider.samples(far + 1, far + 2)
            assert one[0].keys() == first[0].keys()
            assert same(provider.samples(far, far + 2)[1:], one)

    def test_each_pass_has_every_sample_once(self, provider: DataProvider) -> None:
        length = len(provider)
        if length <= MOST:
            passes = [provider.samples(start, start + length) for start in (0, length, 7 * length)]
            contents = [sorted(_content(sample) for sample in one) for one in passes]
            assert contents[0] == contents[1] == contents[2], "a pass may have another order, but the same samples"
            assert same(provider.samples(0, 2 * length + 1)[: 2 * length], [*passes[0], *passes[1]])

    def test_samples_are_the_caller_s(self, provider: DataProvider) -> None:
        before = [{name: tensor.clone() for name, tensor in sample.items()} for sample in provider.samples(0, 2)]
        for sample in provider.samples(0, 2):
            for tensor in sample.values():
                tensor.fill_(1)
        assert same(provider.samples(0, 2), before), "a change to a returned sample changed the data"
        sample = provider.samples(0, 1)[0]
        sample["labels"].fill_(0)
        assert torch.equal(sample["input_ids"], before[0]["input_ids"]), "labels and input_ids share memory"

    def test_validation_is_always_the_same(self, provider: DataProvider) -> None:
        first = provider.validation()
        provider.samples(0, 3)
        assert same(provider.validation(), first)

    def test_looking_ahead_changes_nothing(self, provider: DataProvider) -> None:
        before = provider.samples(0, 3)
        prefetch = getattr(provider, "prefetch", None)
        if prefetch is not None:
            length = len(provider)
            for start, stop in ((0, 3), (length - 1, length + 2), (0, min(3 * length, 10_000)), (2, 2)):
                prefetch(start, stop)
        assert same(provider.samples(0, 3), before)

    # -- worker processes ---------------------------------------------------------------------------------------------

    def test_it_can_be_sent_to_another_process(self, provider: DataProvider) -> None:
        if self.picklable:
            before = provider.samples(0, 3)
            assert same(pickle.loads(pickle.dumps(provider)).samples(0, 3), before)

    def test_workers_of_a_data_loader_see_the_same(self, provider: DataProvider, config: dict[str, Any]) -> None:
        if self.picklable:
            count = min(len(provider), MOST)
            before = provider.samples(0, count)
            used = self.make_factory()(config, seed=SEED)  # has read some samples before, but not all
            used.samples(count - 1, count)
            loader = DataLoader(_Ids(used, count), batch_size=None, num_workers=2, timeout=60)
            assert same(list(loader), before)

    # -- wrong options ------------------------------------------------------------------------------------------------

    def test_an_unknown_option_is_refused_by_name(self, config: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="no_such_option"):
            self.make_factory()({**config, "no_such_option": 1}, seed=SEED)

    @pytest.mark.parametrize("length", [0, -1, 1.5, "16", None, True])
    def test_a_sample_has_a_whole_number_of_tokens(self, config: dict[str, Any], length: Any) -> None:
        with pytest.raises(ConfigError, match="seq_len"):
            self.make_factory()({**config, "seq_len": length}, seed=SEED)


class OutageContract(DataContract):
    """What a provider must do if the source of its samples can fail; define :meth:`outage` as well."""

    @abc.abstractmethod
    def outage(self) -> contextlib.AbstractContextManager[None]:
        """Makes the source of the samples unavailable until the context ends.

        A test enters it after it has opened the provider. Choose a configuration with which the provider gives up soon.
        """

    def test_a_failure_names_the_ids_and_passes(self, config: dict[str, Any]) -> None:
        factory = self.make_factory()
        before = factory(config, seed=SEED).samples(0, len(factory(config, seed=SEED)))
        provider = factory(config, seed=SEED)
        with self.outage():
            for _ in range(2):
                with pytest.raises(DataError) as caught:
                    provider.samples(0, len(before))
                assert caught.value.ids, "the error must name the ids"
                assert set(caught.value.ids) <= set(range(len(before)))
                assert not caught.value.lasting, "the error must not be lasting: the source comes back"
        assert same(provider.samples(0, len(before)), before)

    def test_what_was_obtained_ahead_is_there(self, config: dict[str, Any]) -> None:
        provider = self.make_factory()(config, seed=SEED)
        before = provider.samples(0, 2)
        with self.outage():
            assert same(provider.samples(0, 2), before), "the provider must keep samples that it has read for a while"

    def test_looking_ahead_never_fails(self, config: dict[str, Any]) -> None:
        provider = self.make_factory()(config, seed=SEED)
        with self.outage():
            provider.prefetch(0, 3)  # type: ignore[attr-defined]
