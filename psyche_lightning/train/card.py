"""The model card of a checkpoint: the run's facts, for readers on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from psyche_lightning.checkpoints.manifest import Metadata
from psyche_lightning.errors import counted
from psyche_lightning.recipe.config import Recipe
from psyche_lightning.version import __version__


@dataclass(frozen=True)
class Facts:
    """What a node knows of its run when it saves a checkpoint.

    Attributes:
        parameters: parameters of the model.
        trained: how many of them are trained.
        nodes: members of the run's newest epoch.
        payload: bytes of one node's payload, in the mean of the steps.
    """

    parameters: int
    trained: int
    nodes: int
    payload: int


def card(recipe: Recipe, metadata: Metadata, digest: str, facts: Facts) -> str:
    """The text of a model card, with the Hub's head of YAML; the same on all nodes, as any of them may upload it.

    Args:
        recipe: the node's recipe; no path of its machine gets into the card.
        metadata: of the checkpoint.
        digest: of its parameters, in hex.
        facts: what the node knows.
    """
    head = ["library_name: " + ("peft" if recipe.model.adapter else "transformers")]
    base = recipe.model.path
    if base is not None and "://" not in base and not Path(base).expanduser().exists():
        head.append(f"base_model: {base.partition('@')[0]}")
    head.append("tags: [psyche-lightning, distro]")
    share = "" if facts.trained == facts.parameters else f", of which {facts.trained:,} were trained"
    rows = {
        "parameters": f"{facts.parameters:,}{share}",
        "data": f"`{recipe.data.name}`; {metadata.data_index:,} samples of {recipe.data.seq_len:,} tokens",
        "nodes": f"{facts.nodes}, which shared only a network",
        "sent by a node for each step": f"{facts.payload:,} bytes to each other node, where an all-reduce of float32 "
        f"gradients has {4 * facts.trained:,}",
        "digest of the parameters": f"`{digest}`",
        "digest of the run's manifest": f"`{metadata.recipe}`",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return "\n".join(
        [
            "---",
            *head,
            "---",
            "",
            f"# {metadata.run}, step {metadata.step:,}",
            "",
            f"Trained by {counted(facts.nodes, 'node')} with psyche_lightning {__version__}.",
            "",
            "| | |",
            "|---|---|",
            table,
            "",
        ]
    )
