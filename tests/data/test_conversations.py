"""Conversations, and prompts with completions: labels on the answers alone, packed or not."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from psyche_lightning.errors import ConfigError
from psyche_lightning.plugins import load_plugins
from psyche_lightning.train.packing import check_packing

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
MARKED = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
{%- else -%}{{ message.content + '<|im_end|>' }}
{%- endif -%}{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
BRACKETS = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ bos_token + '[INST] ' + message.content + ' [/INST]' }}
{%- elif message.role == 'assistant' -%}{{ ' ' + message.content + eos_token }}
{%- else -%}{{ raise_exception('only user and assistant may speak') }}{%- endif -%}
{%- endfor -%}"""
THINKING = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' and loop.last -%}{{ '<think></think>' }}{%- endif -%}
{{ message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
ENDED = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- else -%}{{ eos_token }}{%- endif -%}"""
"""As phi-3's: the conversation has an end, and each message one of its own."""
ONCE = """\
{%- for message in messages -%}{{ message.role + ':\n' + message.content + '\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant:\n' }}{%- else -%}{{ eos_token }}{%- endif -%}"""
"""Only the conversation has an end."""
COUNTED = "{{ messages|length }}" + CHATML
UNPROMPTED = "{%- for message in messages -%}{{ message.role + ': ' + message.content + eos_token }}{%- endfor -%}"

SHORT = [("user", "hi"), ("assistant", "hello!")]
LONG = [("system", "be kind"), ("user", "one"), ("assistant", "first"), ("user", "two"), ("assistant", "second one")]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tokenizers, by their chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["first second assistant user one two"] * 9,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet),
    )
    found = {}
    for name, template in (
        ("chatml", CHATML), ("marked", MARKED), ("brackets", BRACKETS), ("thinking", THINKING), ("counted", COUNTED),
        ("unprompted", UNPROMPTED), ("none", None), ("ended", ENDED), ("once", ONCE),
    ):  # fmt: skip
        folder = tmp_path_factory.mktemp(name)
        made = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
            additional_special_tokens=special[2:4],
        )  # fmt: skip
        made.chat_template = template
        made.save_pretrained(folder)
        found[name] = str(folder)
    return found


def conversation(turns: list[tuple[str, str]], **keys: str) -> list[dict[str, str]]:
    role, content = keys.get("role", "role"), keys.get("content", "content")
    return [{role: who, content: said} for who, said in turns]


def opened(folder: Path, rows: list[dict[str, Any]], seq_len: int = 64, **options: Any) -> Any:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"path": str(folder / "a.jsonl"), "seq_len": seq_len, "shuffle": False, **options}
    return load_plugins().data_providers()["datasets"](config, seed=0)


def chats(*turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"messages": conversation(one)} for one in turns]


def trained(data: Any) -> list[str]:
    """The text that has labels, in each sample; ``|`` stands where others are between."""
    found = []
    for sample in data.samples(0, len(data)):
        labels = sample["labels"]
        assert torch.equal(labels[labels != -100], sample["input_ids"][labels != -100])
        spans: list[list[int]] = [[]]
        for label in labels.tolist():
            if label != -100:
                spans[-1].append(label)
            elif spans[-1]:
                spans.append([])
        found.append("|".join(data.tokenizer.decode(span) for span in spans if span))
    return found


def texts(data: Any) -> list[str]:
    return [data.tokenizer.decode(sample["input_ids"]).replace("<pad>", "") for sample in data.samples(0, len(data))]


@pytest.mark.parametrize(
    ("template", "short", "long"),
    [
        ("chatml", "hello!<|im_end|>", "first<|im_end|>|second one<|im_end|>"),
        ("marked", "hello!<|im_end|>", "first<|im_end|>|second one<|im_end|>"),
        ("brackets", " hello!</s>", " first</s>| second one</s>"),
        ("ended", "hello!<|im_end|>", "first<|im_end|>|second one<|im_end|>"),
        ("once", "hello!\n</s>", "first\n|second one\n</s>"),
    ],
)
def test_answers_alone_are_trained(
    tokenizers: dict[str, str], tmp_path: Path, template: str, short: str, long: str
) -> None:
    turns = LONG[1:] if template == "brackets" else LONG
    data = opened(tmp_path, chats(SHORT, turns), packed=False, tokenizer=tokenizers[template])
    assert trained(data) == [short, long]
    whole = [
        data.tokenizer.apply_chat_template(conversation(one), tokenize=False, add_generation_prompt=False)
        for one in (SHORT, turns)
    ]
    assert texts(data) == whole, "as the template writes them, without a second <s>"
    assert all(set(sample) == {"input_ids", "labels"} for sample in data.samples(0, 2))
    end = "</s>" if template in ("brackets", "once") else "<|im_end|>"
    assert data.end_of_text == data.tokenizer.convert_tokens_to_ids(end)
    packed = opened(tmp_path, chats(SHORT, turns), tokenizer=tokenizers[template])
    assert "|".join(trained(packed)) == f"{short}|{long}"


def test_packed_texts_have_positions_of_their_own(tokenizers: dict[str, str], tmp_path: Path) -> None:
    data = opened(tmp_path, chats(SHORT, LONG, *[SHORT] * 4), tokenizer=tokenizers["chatml"])
    alone = opened(tmp_path, chats(SHORT, LONG, *[SHORT] * 4), packed=False, tokenizer=tokenizers["chatml"])
    assert len(data) < len(alone) == 6
    assert sum(one.count("<|im_end|>") for one in trained(data)) == 7
    pieces = []
    for sample in data.samples(0, len(data)):
        starts = torch.where(sample["position_ids"] == 0)[0].tolist()
        assert (sample["labels"][starts] == -100).all()
        for begin, end in zip(starts, [*starts[1:], 64], strict=True):
            assert sample["position_ids"][begin:end].tolist() == list(range(end - begin))
            pieces.append(data.tokenizer.decode(sample["input_ids"][begin:end]).replace("<pad>", ""))
    assert sorted(filter(None, pieces)) == sorted(texts(alone)), "no conversation is divided among samples"


def test_the_loss_of_packed_conversations_is_that_of_each_alone(tokenizers: dict[str, str], tmp_path: Path) -> None:
    rows = chats(SHORT, [*SHORT[:1], ("assistant", "no")], LONG)
    packed = opened(tmp_path, rows, seq_len=128, tokenizer=tokenizers["chatml"])
    alone = opened(tmp_path, rows, seq_len=128, packed=False, tokenizer=tokenizers["chatml"])
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model: Any = load_plugins().models()["hf"]({"model_type": "llama", "vocab_size": packed.vocab_size, **sizes})
    check_packing(model, packed)

    def loss(data: Any) -> float:
        samples = data.samples(0, len(data))
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        return float(model(**batch, use_cache=False).loss.detach())

    assert len(packed) == 1
    assert loss(packed) == pytest.approx(loss(alone), abs=1e-5)


def test_prompts_and_completions(tokenizers: dict[str, str], tmp_path: Path) -> None:
    rows = [{"prompt": "2 + 2 =", "completion": " four"}, {"prompt": "fir", "completion": "st one"}]
    plain = opened(tmp_path, rows, packed=False, tokenizer=tokenizers["none"])
    assert trained(plain) == [" four</s>", "st one</s>"], "also where the tokenizer would join both"
    assert texts(plain) == ["2 + 2 = four</s>", "first one</s>"]
    assert texts(opened(tmp_path, rows, packed=False, bos=True, tokenizer=tokenizers["none"]))[0].startswith("<s>2")
    named = [{"question": "a", "answer": "b"}]
    other = opened(tmp_path, named, prompt="question", completion="answer", packed=False)
    assert trained(other) == ["b\0"], "of bytes"
    both = [{"prompt": conversation(LONG[:4]), "completion": conversation(LONG[4:])}]
    for template in ("chatml", "marked"):
        data = opened(tmp_path, both, packed=False, tokenizer=tokenizers[template])
        assert trained(data) == ["second one<|im_end|>"], "answers in a prompt are not trained"


def test_rows_with_nothing_in_them_are_left_out_and_said(
    tokenizers: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"messages": None}, *chats(SHORT), {"messages": []}]
    assert trained(opened(tmp_path, rows, packed=False, tokenizer=tokenizers["chatml"])) == ["hello!<|im_end|>"]
    assert "2 texts of" in caplog.text
    pairs = [
        {"prompt": None, "completion": "one"},
        {"prompt": "a", "completion": None},
        {"prompt": "", "completion": "x"},
    ]
    data = opened(tmp_path, pairs, packed=False, tokenizer=tokenizers["none"])
    assert trained(data) == ["e</s>", "</s>"], "an answer to nothing, whose first token nothing predicts"
    assert "1 texts of" in caplog.text


@pytest.mark.parametrize("kind", ["sharegpt", "parts", "parquet"])
def test_other_forms_of_messages(tokenizers: dict[str, str], tmp_path: Path, kind: str) -> None:
    rows: list[dict[str, Any]] = chats(LONG)
    if kind == "sharegpt":
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        said = [(names[who], what) for who, what in LONG]
        rows = [{"conversations": conversation(said, role="from", content="value")}]
    elif kind == "parts":
        rows = [{"messages": [{"role": who, "content": [{"type": "text", "text": what}]} for who, what in LONG]}]
    data = opened(tmp_path, rows, packed=False, tokenizer=tokenizers["chatml"])
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
        data = opened(tmp_path, [], packed=False, tokenizer=tokenizers["chatml"], path=str(tmp_path / "a.parquet"))
    assert trained(data) == ["first<|im_end|>|second one<|im_end|>"]


def test_templates_that_write_answers_otherwise_later(tokenizers: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"Row 0 of .* writes the first 3 of the messages otherwise .*each_answer=true"
    ):
        opened(tmp_path, chats(LONG), tokenizer=tokenizers["thinking"])
    data = opened(tmp_path, chats(LONG), packed=False, each_answer=True, tokenizer=tokenizers["thinking"])
    assert trained(data) == ["<think></think>first<|im_end|>", "<think></think>second one<|im_end|>"]
    with pytest.raises(ConfigError, match="otherwise when the conversation goes on"):
        opened(tmp_path, chats(SHORT), each_answer=True, tokenizer=tokenizers["counted"])


def test_a_template_without_a_generation_prompt(tokenizers: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="writes 'assistant: ' before an answer, but has no generation prompt"):
        opened(tmp_path, chats(SHORT), tokenizer=tokenizers["unprompted"])


def test_a_template_of_ones_own(tokenizers: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        opened(tmp_path, chats(SHORT), tokenizer=tokenizers["none"])
    (tmp_path / "own.jinja").write_text(CHATML)
    for template in (CHATML, str(tmp_path / "own.jinja")):
        data = opened(tmp_path, chats(SHORT), tokenizer=tokenizers["none"], chat_template=template)
        assert data.tokenizer.chat_template == CHATML, "which is saved with checkpoints"
        assert trained(data) == ["hello!<|im_end|>"]


def test_texts_that_are_too_long_are_cut_and_said(
    tokenizers: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    late = [("user", "many words " * 20), ("assistant", "late")]
    rows = chats(SHORT, late, [("user", "nobody answers")], [("user", "hi"), ("assistant", "word " * 90)])
    with caplog.at_level("INFO"):
        data = opened(tmp_path, rows, seq_len=32, tokenizer=tokenizers["chatml"], packed=False)
    assert "2 texts of" in caplog.text
    assert "left out, 1 of them because no answer begins within seq_len=32" in caplog.text
    assert "1 texts are cut at seq_len=32" in caplog.text
    first, second = trained(data)
    assert first == "hello!<|im_end|>"
    assert second.startswith("word word")
    with pytest.raises(ConfigError, match=r"No answer is left to train of the 1 row of .*: 1 of them because"):
        opened(tmp_path, chats(late), seq_len=32, tokenizer=tokenizers["chatml"])


def test_answers_without_an_end_are_said(
    tokenizers: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    data = opened(tmp_path, chats(SHORT), chat_template=template)
    assert trained(data) == ["hello!\n"], "of bytes, with white space that ends an answer"
    assert data.end_of_text is None
    assert "do not end with one special token" in caplog.text


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"messages": "hi"}], {}, "Row 0 of .* has 'hi' in place of a message"),
        ([{"messages": [{"role": "user", "content": 3}]}], {}, "in place of a message"),
        ([{"prompt": "a"}], {"packed": True}, "has the columns prompt, expected one with conversations"),
        (chats(SHORT), {"packed": 1}, "packed is 1, expected true or false"),
        (chats(SHORT), {"bos": True}, "bos is for prompts that are texts"),
        (chats(SHORT), {"messages": "chat"}, "expected one with conversations"),
        (chats(SHORT), {"messages": "messages", "prompt": "a"}, "expected one kind"),
        ([{"prompt": "a", "completion": "b"}], {"each_answer": True}, "are for messages"),
        (chats([("robot", "x"), ("assistant", "y")]), {"template": "brackets"}, "only user and assistant may speak"),
    ],
)
def test_wrong_data_and_options_are_explained(
    tokenizers: dict[str, str], tmp_path: Path, rows: Any, options: dict[str, Any], message: str
) -> None:
    tokenizer = tokenizers[options.pop("template", "chatml")]
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, rows, tokenizer=tokenizer, **options)


def test_texts_win_over_messages(tokenizers: dict[str, str], tmp_path: Path) -> None:
    rows = [{"text": "a text of its own " * 9, **chats(SHORT)[0]}]
    data = opened(tmp_path, rows, tokenizer=tokenizers["chatml"])
    assert "a text of its own" in texts(data)[0]
    asked = opened(tmp_path, rows, tokenizer=tokenizers["chatml"], messages="messages")
    assert trained(asked) == ["hello!<|im_end|>"]


def test_every_copy_has_the_same_samples(tokenizers: dict[str, str], tmp_path: Path) -> None:
    rows = chats(*[[("user", str(n)), ("assistant", "word " * (n % 7 + 1))] for n in range(60)])
    data = opened(tmp_path, rows, shuffle=True, validation_samples=2, tokenizer=tokenizers["chatml"])
    copy = pickle.loads(pickle.dumps(data))
    assert all(
        torch.equal(one[name], other[name])
        for one, other in zip(data.samples(0, 9), copy.samples(0, 9), strict=True)
        for name in one
    )
    assert len(data.validation()) == 2
    rows[0]["messages"][1]["content"] = "other"
    assert opened(tmp_path, rows, tokenizer=tokenizers["chatml"]).fingerprint != data.fingerprint
