"""Tasks of lm-eval: finds them by name, and measures one document at a time."""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from psyche_lightning.errors import ConfigError, nearest, needing
from psyche_lightning.protocol.evals import MAX_MEASURES, MAX_NAME, Measure
from psyche_lightning.recipe.config import EvalsSection

logger = logging.getLogger(__name__)

SHOWN = 20
"""Tasks of a folder that a message names."""


def known_tasks(names: Sequence[str], folder: str | Path | None, option: str) -> Any:
    """lm-eval's manager of some tasks, which it brings or has from a folder.

    Args:
        names: the tasks or groups that are needed. If the folder has all of them, the many of lm-eval are not read.
        folder: a folder of further tasks; None for none.
        option: what sets the folder, for the message.

    Raises:
        ConfigError: lm-eval is not installed, the folder does not exist, or a name is unknown.
    """
    with needing("lm-eval", "eval", "the evaluation of tasks"):
        import lm_eval
        from lm_eval.tasks import TaskManager
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"There is no folder {str(folder)!r} with tasks.")
    own = None if folder is None else TaskManager(include_path=str(folder), include_defaults=False)
    if own is not None and {*names} <= {*own.all_subtasks}:
        return own
    known = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in known.all_tasks:
            here = f"{option} adds a folder of your own."
            if own is not None:
                here = f"the folder {folder} has {', '.join(own.all_tasks[:SHOWN]) or 'none'}."
            raise ConfigError(
                f"lm-eval {lm_eval.__version__} has no task {name!r}.{nearest(name, known.all_tasks)} "
                f"`lm-eval ls tasks` lists its tasks; {here}"
            )
    return known


def load_tasks(section: EvalsSection) -> list[Task]:
    """Load a recipe's tasks, and make the requests of all their documents, as ``psyche eval`` does.

    Args:
        section: names tasks; not groups, whose figures are computed over tasks.

    Raises:
        ConfigError: one does not exist, is a group, cannot be loaded, or has no documents.
    """
    if not section.tasks:
        return []
    from lightning.pytorch.utilities.seed import isolate_rng
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    known = known_tasks(section.tasks, section.tasks_from, "evals.tasks_from")
    with isolate_rng():  # some tasks draw while they load; the seeds are those of lm-eval's own evaluation
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        found = []
        for name in section.tasks:
            try:
                loaded = known.load([name])["tasks"]
            except Exception as error:  # the Hub, data sets and a task's own code raise many types
                raise ConfigError(f"lm-eval cannot load the task {name!r}: {error}") from error
            if list(loaded) != [name]:
                parts = ", ".join(list(loaded)[:8]) + (", ..." if len(loaded) > 8 else "")
                raise ConfigError(f"evals.tasks has {name!r}, which is a group of tasks; name its tasks: {parts}.")
            task = loaded[name]
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            try:
                # All at once: the examples before a question depend on the questions before it.
                task.build_all_requests(limit=section.limit, rank=0, world_size=1)
                found.append(Task(name, task, section.limit))
            except Exception as error:
                raise ConfigError(f"lm-eval cannot ask the questions of the task {name!r}: {error}") from error
    return found


class Task:
    """A task of lm-eval with the requests of its documents.

    Args:
        name: its name.
        task: lm-eval's task, with all its requests.
        limit: only so many documents; None for all.

    Attributes:
        name: as given.
    """

    def __init__(self, name: str, task: Any, limit: int | None) -> None:
        self.name = name
        self._task = task
        self._documents = [(doc, []) for _, doc in task.doc_iterator(rank=0, limit=limit, world_size=1)]  # type: list[tuple[Any, list[Any]]]
        for request in task.instances:
            self._documents[request.doc_id][1].append(request)
        for _, requests in self._documents:
            requests.sort(key=lambda request: request.idx)
        self._left_out: set[str] = set()

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._documents)

    def measure(self, harness: Any, number: int) -> list[Measure]:
        """Ask the questions of one document, and judge the answers.

        Args:
            harness: the model, see :func:`harness_of`.
            number: the document.

        Returns:
            The task's metrics, as far as they can be added up.
        """
        document, requests = self._documents[number]
        kinds = dict.fromkeys(request.request_type for request in requests)
        for kind in kinds:
            asked = [one for one in requests if one.request_type == kind for _ in range(one.repeats or 1)]
            for request in asked:
                request.resps, request.filtered_resps = [], {}
            for request, answer in zip(asked, getattr(harness, kind)(asked, disable_tqdm=True), strict=True):
                request.resps.append(answer)
        for each in getattr(self._task, "_filters", ()):
            each.apply(requests)
        figures = []
        for key in requests[0].filtered_resps:
            answers = [request.filtered_resps[key] for request in requests]
            for metric, value in self._task.process_results(document, answers).items():
                figure = self._figure(metric, key, value)
                if figure is not None:
                    figures.append(figure)
        return figures[:MAX_MEASURES]

    def _figure(self, metric: str, key: str, value: Any) -> Measure | None:
        name = (metric if key == "none" else f"{metric} ({key})")[:MAX_NAME]
        aggregation = self._task.aggregation().get(metric)  # lm-eval takes the mean if a metric has none
        kind = "mean" if aggregation is None else getattr(aggregation, "__name__", "")
        if kind not in _SUMS or not getattr(aggregation, "__module__", "lm_eval.").startswith("lm_eval."):
            if name not in self._left_out:
                self._left_out.add(name)
                text = (
                    "%s: the metric %s is computed from all answers at once, so nodes leave it out; psyche eval has it"
                )
                logger.warning(text, self.name, name)
            return None
        total, weight = _SUMS[kind](value)
        return Measure(name, float(total), float(weight), kind in ("perplexity", "weighted_perplexity"))


_SUMS: dict[str, Callable[[Any], tuple[float, float]]] = {
    "mean": lambda value: (value, 1.0),
    "nanmean": lambda value: (0.0, 0.0) if math.isnan(value) else (value, 1.0),
    "perplexity": lambda value: (value, 1.0),
    "weighted_perplexity": lambda value: value,
    "bits_per_byte": lambda value: (-value[0] / math.log(2), value[1]),
}
"""What one document adds to total and weight of a metric, by lm-eval's name of the metric's aggregation."""


def evaluated_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model to evaluate; it shares the frozen parameters, which never change."""
    frozen: dict[int, Any] = {id(one): one for one in model.parameters() if not one.requires_grad}
    made = copy.deepcopy(model, frozen).eval()
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    return made


def harness_of(model: torch.nn.Module | str, tokenizer: Any, **options: Any) -> Any:
    """lm-eval's view of a model.

    Args:
        model: a causal language model on its device, or the folder of one.
        tokenizer: its tokenizer, which may be changed.
        options: of lm-eval's ``HFLM``.

    Raises:
        ConfigError: lm-eval cannot use the model.
    """
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoConfig

    class Quiet(HFLM):  # type: ignore[misc] # lm-eval has no types
        """Shows no second bar within that of the questions."""

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **options: Any) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)

    try:
        config: Any = AutoConfig.from_pretrained(model) if isinstance(model, str) else model.config
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:  # such as the one of bytes
            end = config.eos_token_id
            if not isinstance(end, int):
                raise ValueError(
                    "neither its tokenizer nor its configuration names the token that begins or ends a text; set "
                    "eos_token_id in config.json"
                )
            tokenizer.eos_token_id = end
        return Quiet(pretrained=model, tokenizer=tokenizer, **options)
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        name = model if isinstance(model, str) else type(model).__name__
        raise ConfigError(f"lm-eval cannot evaluate {name!r}: {error}") from error


def saved_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer as it would come from a checkpoint.

    Raises:
        ConfigError: there is none.
    """
    import tempfile

    from transformers import AutoTokenizer

    if tokenizer is None:
        raise ConfigError("evals is set, but the data has no tokenizer for its texts.")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)
