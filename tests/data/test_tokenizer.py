"""What begins and ends a text: in training, and in the tokenizer that is saved with checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from psyche_lightning.data.documents import DocumentData
from psyche_lightning.data.splits import DataSet
from psyche_lightning.data.text import TextData
from psyche_lightning.data.tokenizer import Encoder
from psyche_lightning.errors import ConfigError

BEGIN, END = 0, 1


def saved(folder: Path, template: str | None = None, **special: str) -> str:
    """A tokenizer with ``<s>`` and ``</s>`` in a folder; the template says what it puts around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["hello"], trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    if template is not None:
        ids = [("<s>", BEGIN), ("</s>", END)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return str(folder)


BOTH = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("template", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("bos", [False, True])
def test_a_prompt_is_encoded_as_training_encodes(tmp_path: Path, template: str | None, bos: bool) -> None:
    encoder = Encoder(saved(tmp_path / "own", template, **BOTH), bos=bos)
    ids = encoder.encode(b"hello").tolist()
    assert (ids[0] == BEGIN, ids[-1], BEGIN in ids[1:]) == (bos, END, False)
    encoder.tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("hello")["input_ids"] == ids[:-1]


def test_a_tokenizer_that_only_goes_along_stays_as_it_is(tmp_path: Path) -> None:
    encoder = Encoder(saved(tmp_path, "<s> $A </s>", **BOTH))
    assert encoder.tokenizer("hello")["input_ids"][0] == BEGIN


def test_a_beginning_is_an_option_of_what_reads_texts(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path / "own", **BOTH)
    (tmp_path / "a.txt").write_text("hello" * 100)
    text = TextData(1, 8, path=str(tmp_path / "a.txt"), tokenizer=tokenizer, bos=True, validation_samples=0)
    assert sum((sample["input_ids"] == BEGIN).sum().item() for sample in text.samples(0, len(text))) == 1
    (tmp_path / "a.jsonl").write_text('{"text": "hello"}\n' * 20)
    rows = DataSet(str(tmp_path / "a.jsonl"))
    documents = DocumentData(1, rows, 9, tokenizer=tokenizer, bos=True, shuffle=False)
    (sample,) = documents.samples(0, 1)
    assert sample["input_ids"].tolist() == 3 * Encoder(tokenizer, bos=True).encode(b"hello").tolist()
    for wrong in ("bytes", saved(tmp_path / "none")):
        with pytest.raises(ConfigError, match="has no beginning-of-text id"):
            DocumentData(1, rows, 9, tokenizer=wrong, bos=True)
    with pytest.raises(ConfigError, match="bos is 'yes', expected true or false"):
        DocumentData(1, rows, 9, tokenizer=tokenizer, bos="yes")  # type: ignore[arg-type]


def test_texts_without_a_separator_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Encoder(saved(tmp_path / "a", **BOTH), bos=False)
    Encoder(saved(tmp_path / "b"))
    assert not caplog.records
    Encoder(saved(tmp_path / "b"), bos=False)
    assert "has no end-of-text id, so texts are joined without a separator" in caplog.text


def test_a_beginning_that_training_leaves_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Encoder(saved(tmp_path / "a", "<s> $A", **BOTH), bos=True)
    assert not caplog.records
    Encoder(saved(tmp_path / "a", "<s> $A", **BOTH), bos=False)
    assert "begins each text with '<s>', but this training does not" in caplog.text


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[5, 6], [7], [8, 9], [6, 8]], True),
        ([[5, 6, END], [7, END], [8, END], [9, END]], False),
        ([[BEGIN, 6], [BEGIN, 5], [BEGIN, 4], [BEGIN, 8]], False),
    ],
)
def test_rows_of_ids_without_a_separator_are_said(
    tmp_path: Path, rows: Any, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"input_ids": {row}}}\n' for row in rows))
    with caplog.at_level(logging.WARNING):
        DocumentData(1, DataSet(str(tmp_path / "a.jsonl")), 2, vocab_size=300)
    assert ("joined without a separator" in caplog.text) == said
