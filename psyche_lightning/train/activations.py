"""How much memory the activations of a micro-batch take: counted in a pass of tensors that have no values."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from psyche_lightning.recipe import Recipe
from psyche_lightning.recipe.estimate import meta_model
from psyche_lightning.train.computing import apply_choices
from psyche_lightning.train.module import call_options

logger = logging.getLogger(__name__)

_AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class _Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that exist at one time, but for those that existed before.

    Attributes:
        peak: the most bytes at one time.
    """

    def __init__(self, before: list[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self.peak: int = 0
        self._now = 0
        self._before = {id(tensor.untyped_storage()) for tensor in before}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = id(storage)  # torch keeps one object for a storage as long as that lives
                if key not in self._before and key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self._now += storage.nbytes()
                    self.peak = max(self.peak, self._now)
                    weakref.finalize(storage, self.leave_out, key)
        return made

    def leave_gradient_out(self, parameter: torch.Tensor) -> None:
        """Count a gradient no more once it is whole: it is kept, and counted elsewhere."""
        assert parameter.grad is not None
        self.leave_out(id(parameter.grad.untyped_storage()))

    def leave_out(self, key: int) -> None:
        """Count a storage no more."""
        self._now -= self._sizes.pop(key, 0)


def activations(recipe: Recipe) -> int | None:
    """The most bytes that a micro-batch takes beside parameters and the gradients that are kept.

    Attention counts as that of kernels that do not write the matrix of all pairs down. The pass runs on fake tensors of
    the CPU, so it needs no memory, and a few seconds for the largest models.

    Returns:
        None for a model that looks at values while it computes, as a mixture of experts does.

    Raises:
        PluginError: no plugin has the model.
        ConfigError: the model's configuration is wrong, or it cannot do what ``trainer`` says.
    """
    model = meta_model(recipe)
    apply_choices(model, recipe.trainer)
    model.train()
    shape = recipe.trainer.micro_batch_size, recipe.data.seq_len
    dtype = _AUTOCAST.get(recipe.trainer.precision)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            kept = _without_values(model)
            ids = torch.zeros(shape, dtype=torch.int64)
            alive = _Alive([*kept, ids])
            with alive:
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.register_post_accumulate_grad_hook(alive.leave_gradient_out)  # type: ignore[no-untyped-call] # torch's
                with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                    loss = model(input_ids=ids, labels=ids, **call_options(model)).loss
                loss.backward()
    except Exception as error:  # models raise different types, and torch others for what depends on values
        logger.debug("the activations of %s are not known: %s", recipe.name, error)
        return None
    return alive.peak


def _without_values(model: torch.nn.Module) -> list[torch.Tensor]:
    """Give the model tensors without values in place of those on the meta device; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, tensor.requires_grad)
                    made[id(tensor)] = new
                tensors[name] = made[id(tensor)]  # type: ignore[assignment] # a parameter for a parameter
    return list(made.values())
