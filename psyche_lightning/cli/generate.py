"""``psyche generate``: completes a text with a trained model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from psyche_lightning.errors import ConfigError, needing
from psyche_lightning.recipe.positions import positions
from psyche_lightning.text import plain

logger = logging.getLogger(__name__)


def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A folder in Hugging Face format, a folder of checkpoints, or an address.",
        ),
    ],
    prompt: Annotated[str, typer.Option(help="The text to complete.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message to answer, in the tokenizer's chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to add.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always chooses the most likely token.")] = 0.8,
    seed: Annotated[int | None, typer.Option(help="Seed, to get the same text every time.")] = None,
) -> None:
    """Complete a text with a checkpoint, by default the newest.

    Examples:
        psyche generate psyche-demo/nodes/0/checkpoint --prompt 'def main('
        psyche generate /models/chat --chat --prompt 'Who are you?' --seed 1
    """
    if not prompt:
        raise ConfigError("The prompt is empty; give at least one character after --prompt.")
    from psyche_lightning.cli.saved import find

    checkpoint, base = find(model)
    import torch
    from transformers import TextStreamer
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    set_verbosity_error()  # type: ignore[no-untyped-call]
    disable_progress_bar()  # type: ignore[no-untyped-call]
    loaded = _load_model(base)
    if base != checkpoint:
        loaded = _with_adapter(loaded, checkpoint)
    tokenizer = _load_tokenizer(checkpoint)
    if seed is not None:
        torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    ids = torch.tensor([_encoded(tokenizer, prompt, chat=chat)])
    room = positions(loaded)
    if room is not None and ids.shape[1] >= room:
        raise ConfigError(f"The prompt has {ids.shape[1]} tokens, but the model takes only {room}; shorten it.")
    if room is not None and ids.shape[1] + max_new_tokens > room:
        max_new_tokens = room - ids.shape[1]
        logger.info("the model takes %d tokens, so at most %d are added", room, max_new_tokens)

    end = loaded.generation_config.eos_token_id
    ends = [end] if isinstance(end, int) else end or []

    class Streamer(TextStreamer):  # a checkpoint is text of others, and so is what it writes
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(plain(text, lines=True), stream_end)

        def put(self, value: torch.Tensor) -> None:
            if value.numel() != 1 or int(value) not in ends:
                super().put(value)  # type: ignore[no-untyped-call]

    streamer = Streamer(tokenizer, skip_special_tokens=True)
    with torch.inference_mode():
        loaded.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=streamer, **sampling
        )


def _encoded(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    """The ids of a prompt, as in training: with what the tokenizer puts before a text, not what it puts after.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """
    if chat:
        if not tokenizer.chat_template:
            raise ConfigError("The checkpoint's tokenizer has no chat template, so it knows no messages; omit --chat.")
        message = [{"role": "user", "content": prompt}]
        found = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
        return list(found)
    from psyche_lightning.data.tokenizer import prompt_ids

    return prompt_ids(tokenizer, prompt)


def _with_adapter(model: Any, folder: Path) -> Any:
    with needing("peft", "peft", "An adapter"):
        from peft import PeftModel
    try:
        found: Any = PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ConfigError(f"The adapter in {str(folder)!r} cannot be loaded: {error}") from error
    return found.eval()


def _load_model(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"The model in {str(checkpoint)!r} cannot be loaded: {error}") from error
    model.eval()
    return model


def _load_tokenizer(checkpoint: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The tokenizer in {str(checkpoint)!r} cannot be loaded: {error}") from error
