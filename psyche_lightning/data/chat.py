"""Encodes conversations, and marks the tokens that a model is to learn: the answers."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from psyche_lightning.data.tokenizer import Encoder
from psyche_lightning.errors import ConfigError

ASSISTANT = "assistant"
_MARKS = re.compile(r"\{%-?\s*generation\b")
_ROLES = {"human": "user", **dict.fromkeys(("bard", "bing", "chatgpt", "gpt", "model"), ASSISTANT)}
"""Other names of roles, in data with ``from`` and ``value``."""

Message = dict[str, Any]


class Text(NamedTuple):
    """An encoded text.

    Attributes:
        ids: token ids, int64 of shape [tokens].
        answers: which of them belong to answers, bool of the same shape.
    """

    ids: NDArray[np.int64]
    answers: NDArray[np.bool_]


def messages_of(value: Any, where: str) -> list[Message]:
    """The messages of a conversation, each with ``role`` and its content.

    Args:
        value: a list of objects with ``role`` and ``content`` or with ``from`` and ``value``, or an object of lists.
        where: the place, for errors.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(value, Mapping):
        value = [dict(zip(value, one, strict=False)) for one in zip(*value.values(), strict=False)]
    found = []
    for one in value if isinstance(value, (list, tuple)) else [None]:
        message = {key: part for key, part in one.items() if part is not None} if isinstance(one, Mapping) else {}
        if "from" in message and "role" not in message:
            message = {"role": _ROLES.get(message["from"], message["from"]), "content": message.get("value")}
        content = message.get("content", "")
        if isinstance(content, (list, tuple)) and all(isinstance(part, Mapping) and "text" in part for part in content):
            message["content"] = "".join(str(part["text"]) for part in content)
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content", ""), str):
            raise ConfigError(
                f"{where} has {str(value if one is None else one)[:60]!r} in place of a message, expected a list of "
                "objects with texts as role and content."
            )
        found.append(message)
    return found


class Chat:
    """Encodes conversations with a tokenizer's chat template.

    Where the template has ``{% generation %}`` marks, what stands between them is an answer. Otherwise an answer is
    what the template adds to the conversation before it and the generation prompt. This is checked: both must be
    beginnings of the whole conversation, except for what the template writes after all messages.

    Args:
        encoder: has the tokenizer.
        template: the template, or the path of a file (``*.jinja``) that has it; None for the tokenizer's own.
        each_answer: whether each answer is a text of its own, with the conversation before it.

    Raises:
        ConfigError: there is no template.
    """

    def __init__(self, encoder: Encoder, template: str | None = None, *, each_answer: bool = False) -> None:
        self._tokenizer = encoder.tokenizer
        self._each_answer = each_answer
        if template is not None:
            self._tokenizer.chat_template = _template(template)
        if not self._tokenizer.chat_template:
            raise ConfigError(
                "The tokenizer has no chat template, which the messages of a conversation need. Name the tokenizer of "
                "a chat model, or give a template: data.config.chat_template is its text or a file *.jinja."
            )
        self._marked = bool(_MARKS.search(self._tokenizer.get_chat_template()))
        self._checked = False
        self._ends = special_ids(encoder)

    def texts(self, messages: Sequence[Message], where: str, *, first: int = 0, tools: Any = None) -> list[Text]:
        """Encode a conversation.

        Args:
            messages: the messages.
            where: the conversation's place, for errors.
            first: number of messages that only lead to the answers.
            tools: descriptions of tools, for the template.

        Returns:
            The conversation; with ``each_answer`` a text for each answer; nothing without an answer. A message of the
            assistant that comes first answers nothing, and is not marked.

        Raises:
            ConfigError: the template refuses it, or does not keep its beginning when the conversation goes on.
        """
        answers = [place for place, one in enumerate(messages) if one["role"] == ASSISTANT and place >= max(first, 1)]
        if not answers:
            return []
        parts = [(messages[: one + 1], [one]) for one in answers] if self._each_answer else [(messages, answers)]
        return [self._text(part, which, where, tools) for part, which in parts]

    def _text(self, messages: Sequence[Message], answers: Sequence[int], where: str, tools: Any) -> Text:
        if self._marked:
            ids, marks = self._render(messages, where, tools, marks=True)
            if any(one["role"] == ASSISTANT for one in messages[: answers[0]]):
                marks[: len(self._beginning(ids, messages[: answers[0]], True, where, tools))] = False
            return Text(ids, marks)
        ids, marks = self._render(messages, where, tools)
        for place in answers:
            begin = len(self._beginning(ids, messages[:place], True, where, tools))
            end = self._after(ids, begin, messages[: place + 1], where, tools)
            if not self._checked:
                self._check_prompt(messages[: place + 1], where, tools)
                self._checked = True
            marks[begin:end] = True
        return Text(ids, marks)

    def _after(self, whole: NDArray[np.int64], begin: int, messages: Sequence[Message], where: str, tools: Any) -> int:
        """Where an answer, the last of the messages, ends in the whole conversation.

        A template may write a token after all messages, in place of a generation prompt. It does not belong to an
        answer that has an end of its own.
        """
        ids, _ = self._render(messages, where, tools)
        end = _shared(whole, ids)
        if end < len(ids) and not self._holds(whole[begin:end], messages[-1]):
            raise self._otherwise(len(messages), where)
        with contextlib.suppress(ConfigError):  # some templates refuse a prompt here
            ids, _ = self._render(messages, where, tools, prompt=True)
        own = self._end(whole, begin, min(end, _shared(whole, ids)))
        ended = own > begin and int(whole[own - 1]) in self._ends and self._holds(whole[begin:own], messages[-1])
        return own if ended else self._end(whole, begin, end)

    def _holds(self, ids: NDArray[np.int64], message: Message) -> bool:
        content = str(message.get("content", "")).strip()
        return bool(content) and content in self._tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)

    def _beginning(
        self, whole: NDArray[np.int64], messages: Sequence[Message], prompt: bool, where: str, tools: Any
    ) -> NDArray[np.int64]:
        """The ids of the first messages, with which the whole conversation must begin."""
        ids, _ = self._render(messages, where, tools, prompt=prompt)
        if _shared(whole, ids) < len(ids):
            raise self._otherwise(len(messages), where)
        return ids

    def _otherwise(self, count: int, where: str) -> ConfigError:
        return ConfigError(
            f"{where}: the chat template writes the first {count} of the messages otherwise when the "
            "conversation goes on, so the answers cannot be found in it. Set data.config.each_answer=true, which "
            "makes a text of each answer with what was said before it, or data.config.chat_template to a template "
            "with {% generation %} marks around the answers."
        )

    def _check_prompt(self, messages: Sequence[Message], where: str, tools: Any) -> None:
        """Refuse a template without a generation prompt that writes something between question and answer."""
        before, prompted, after = (
            self._apply(part, where, tools, tokenize=False, add_generation_prompt=prompt)
            for part, prompt in ((messages[:-1], False), (messages[:-1], True), (messages, False))
        )
        head, found, _ = after[len(before) :].partition(str(messages[-1].get("content", "")).strip())
        if before == prompted and found and head.strip():
            raise ConfigError(
                f"{where}: the chat template writes {head!r} before an answer, but has no generation prompt "
                "(add_generation_prompt), so this would be learned as a part of the answer. Set "
                "data.config.chat_template to a template with one, or with {% generation %} marks around the answers."
            )

    def _end(self, ids: NDArray[np.int64], begin: int, end: int) -> int:
        """The end of an answer without the white space between its end token and the next message."""
        special = [place for place in range(begin, end) if int(ids[place]) in self._ends]
        if special and not self._tokenizer.decode(ids[special[-1] + 1 : end].tolist()).strip():
            return special[-1] + 1
        return end

    def _render(
        self, messages: Sequence[Message], where: str, tools: Any, *, prompt: bool = False, marks: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        found = self._apply(
            messages, where, tools, add_generation_prompt=prompt, return_dict=True, return_assistant_tokens_mask=marks
        )
        ids = np.asarray(found["input_ids"], np.int64)
        return ids, np.asarray(found["assistant_masks"], bool) if marks else np.zeros(len(ids), bool)

    def _apply(self, messages: Sequence[Message], where: str, tools: Any, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(list(messages), tools=tools or None, **options)
        except Exception as error:  # templates raise what they like
            raise ConfigError(f"{where}: the chat template refuses the conversation: {error}") from error


def _shared(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """How many ids two rows have in common at their beginning."""
    size = min(len(one), len(other))
    apart = np.flatnonzero(one[:size] != other[:size])
    return int(apart[0]) if len(apart) else size


class Completion:
    """Encodes a prompt and its completion, which is the answer; an end-of-text id follows.

    Args:
        encoder: has the tokenizer.
        bos: whether the tokenizer's beginning-of-text id stands before each prompt.
    """

    def __init__(self, encoder: Encoder, *, bos: bool = False) -> None:
        self._tokenizer = encoder.tokenizer
        self._begin = [self._tokenizer.bos_token_id] if bos else []
        self._end = [] if encoder.end is None else [encoder.end]

    def texts(self, prompt: str, completion: str, where: str) -> list[Text]:
        """Encode one pair; nothing if there is no completion.

        Raises:
            ConfigError: the tokenizer joins the end of the prompt with the beginning of the completion.
        """
        if not completion:
            return []
        head, whole = self._ids(prompt), self._ids(prompt + completion)
        if whole[: len(head)] != head:  # as a prompt is encoded when there is no completion yet
            whole = head + self._ids(completion)
            if self._text(whole) != self._text(head) + completion:
                raise ConfigError(
                    f"{where}: the tokenizer joins the end of the prompt {prompt[-20:]!r} with the beginning of the "
                    f"completion {completion[:20]!r}. Move white space from the prompt's end to the completion's "
                    "beginning."
                )
        ids = np.asarray([*self._begin, *whole, *self._end], np.int64)
        return [Text(ids, np.arange(len(ids)) >= len(self._begin) + len(head))]

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def special_ids(encoder: Encoder) -> frozenset[int]:
    """The ids that are no text, such as those that end a message."""
    tokenizer: Any = encoder.tokenizer
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = set() if encoder.end is None else {encoder.end}
    return frozenset({*tokenizer.all_special_ids, *added, *end})


def _template(given: str) -> str:
    if "\n" in given or not given.endswith(".jinja"):
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The chat template {given!r} cannot be read: {error.strerror}.") from error
