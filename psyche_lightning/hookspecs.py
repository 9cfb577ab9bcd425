"""The hooks of psyche_lightning: everything that a plugin can add, and how to add it.

A plugin is an ordinary Python distribution, named ``psyche-lightning-<thing>`` by custom, with one entry point in the
group ``psyche_lightning`` that names a module (or an object). The functions of that module marked with
``@psyche_lightning.hookimpl`` are called once, when plugins are loaded::

    # pyproject.toml of the distribution psyche-lightning-hello
    [project.entry-points.psyche_lightning]
    hello = "psyche_lightning_hello.plugin"

    # psyche_lightning_hello/plugin.py
    from psyche_lightning import hookimpl

    @hookimpl
    def register_models(register):
        register("hello", build)

    def build(config):
        from psyche_lightning_hello.model import Hello  # heavy imports belong here

        return Hello(**config)

The rules are the same for all six hooks:

* **Signature.** An implementation takes exactly the argument ``register``. A hook that does not exist here, or other
  arguments, is an error of the plugin, which names the nearest hook and shows both signatures.
* **Registration.** Call ``register(name, factory)`` any number of times; coordinators register a
  :class:`CoordinatorKind`, which has several factories. A name has lower-case letters,
  digits, ``-``, ``_`` and ``.``, and begins with a letter; recipes and command lines use it. The host builds nothing
  until a name is used: registering is cheap, and the factory does the heavy imports. ``psyche --help`` also imports
  the entry point's module, so it must not import torch.
* **Order.** Built-ins first, then distributions by name. Order decides nothing: every name has one owner.
* **Conflicts.** A name that two plugins register belongs to neither. Using it is an error that names both plugins with
  their distributions; uninstall one, or exclude it with ``PSYCHE_PLUGINS``. Built-ins follow this rule too.
* **Failures.** A plugin that fails to import, or whose hook raises, adds nothing and does not affect the others.
  ``psyche plugins`` lists it with its error; the message about a missing name lists failed plugins too.
* **Choosing.** ``PSYCHE_PLUGINS=mla,psyche-lightning-iroh`` loads only the plugins with these entry-point or
  distribution names, ``PSYCHE_PLUGINS=`` none. Built-ins always load.

``psyche_lightning.testing`` has the conformance kits: ``transport``, ``coordinators``, ``models`` and ``data``.
``psyche plugin new`` writes a package to begin with, and ``docs/plugins.md`` builds one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    import typer

    from psyche_lightning.protocol.owner import ClockReading, RunAdmin
    from psyche_lightning.protocol.requests import Coordinator
    from psyche_lightning.transports.base import Transport
    from psyche_lightning.wire.identity import Identity

PROJECT = "psyche_lightning"

_Marked = TypeVar("_Marked", bound=Callable[..., Any])
hookspec: Callable[[_Marked], _Marked] = pluggy.HookspecMarker(PROJECT)
hookimpl: Callable[[_Marked], _Marked] = pluggy.HookimplMarker(PROJECT)

_Offer = TypeVar("_Offer", contravariant=True)


class Register(Protocol[_Offer]):
    """A hook's argument: call it once for each name."""

    def __call__(self, name: str, offer: _Offer) -> None:
        """Offer a factory, or a :class:`CoordinatorKind`, under ``name``.

        Raises:
            PluginError: the name or the offer is invalid, or this plugin already used the name.
        """


# ---------------------------------------------------------------------------------------------------------------------
# How nodes talk
# ---------------------------------------------------------------------------------------------------------------------


class TransportFactory(Protocol):
    """Builds a transport from a recipe's ``node.transport_options``."""

    def __call__(self, options: Mapping[str, Any]) -> Transport:
        """Build one node's transport; it opens nothing before ``start``.

        Args:
            options: the recipe's ``node.transport_options``, plain values. Unknown options are an error.

        Raises:
            ConfigError: an option is unknown or wrong; the text lists the choices.
        """
        ...


@hookspec
def register_transports(register: Register[TransportFactory]) -> None:
    """Register ways for nodes to exchange messages and blobs, chosen by the recipe's ``node.transport``.

    ``factory(options)`` returns a :class:`psyche_lightning.transports.base.Transport`, one per node; it runs on
    the thread that starts the node, before its event loop runs.

    Example::

        @hookimpl
        def register_transports(register):
            register("carrier-pigeon", lambda options: PigeonTransport(loft=options.get("loft", "roof")))

    Built in: ``tcp`` (asyncio TCP with TLS bound to node keys), ``memory`` (nodes of one process).
    """


class ClientFactory(Protocol):
    """Builds the client of one run's coordinator."""

    def __call__(self, url: str, run_id: str, identity: Identity, options: Mapping[str, Any]) -> Coordinator:
        """Build the client; it connects on first use.

        Args:
            url: the user's whole coordinator URL; the registered name is its scheme.
            run_id: the run.
            identity: the node's key, which signs its requests.
            options: more plain values; unknown ones are an error.

        Raises:
            ConfigError: the URL or an option is wrong.
        """
        ...


class OwnerFactory(Protocol):
    """Builds the owner's side of one run."""

    def __call__(self, url: str, run_id: str, token: str | None) -> RunAdmin:
        """Build it; it connects on first use.

        Args:
            url: the whole coordinator URL.
            run_id: the run, which may not exist yet.
            token: the owner's token that a server requires, from ``psyche run --token-file``; None if none was given.

        Raises:
            ConfigError: the URL is wrong.
        """
        ...


class CoordinatorKind(NamedTuple):
    """The parts of one kind of coordinator. Nodes need the client; commands report other missing parts.

    Attributes:
        client: builds the client for nodes.
        owner: builds the owner's side for ``psyche run``.
        clock: reads the clock of the coordinator with this URL, for ``psyche doctor``. Raises ``CoordinatorError``
            if it is unreachable, and one with the code ``NoClock`` if it has no clock.
        account: reads a dump of a run's account, given its bytes and the file's name; returns a status like
            :meth:`~psyche_lightning.protocol.owner.RunAdmin.status`, for ``psyche run status --account-file``.
        demo: builds the stage for ``psyche demo --coordinator NAME``, a
            ``psyche_lightning.cli.demo.stage.Stage``.
        runs: lists the runs at this URL, each with ``run_id``, ``phase``, ``epoch``, ``step``, ``total_steps`` and
            ``clients``, for ``psyche run list``.
    """

    client: ClientFactory
    owner: OwnerFactory | None = None
    clock: Callable[[str], ClockReading] | None = None
    account: Callable[[bytes, str], dict[str, Any]] | None = None
    demo: Callable[[], Any] | None = None
    runs: Callable[[str], list[dict[str, Any]]] | None = None


@hookspec
def register_coordinators(register: Register[CoordinatorKind]) -> None:
    """Register kinds of coordinators; the name is the scheme of the coordinator's URL (``solana`` for ``solana://...``).

    A kind is a :class:`CoordinatorKind`, which needs only ``client(url, run_id, identity, options)``: it returns
    a client that implements :class:`psyche_lightning.protocol.requests.Coordinator`.

    Example::

        from psyche_lightning.hookspecs import CoordinatorKind

        @hookimpl
        def register_coordinators(register):
            register("solana", CoordinatorKind(client=make_client))

        def make_client(url, run_id, identity, options):
            from psyche_lightning_solana.client.coordinator import SolanaCoordinator

            return SolanaCoordinator(url, run_id, identity)

    Built in: ``http`` and ``https`` (``psyche coordinator``), ``embedded`` (a run of this process).
    """


# ---------------------------------------------------------------------------------------------------------------------
# What is trained
# ---------------------------------------------------------------------------------------------------------------------


class ModelFactory(Protocol):
    """Builds a model from a recipe's ``model.config``."""

    def __call__(self, config: Mapping[str, Any]) -> torch.nn.Module:
        """Build the model, with freshly initialized parameters on the current default device.

        Args:
            config: the recipe's ``model.config``, plain values; its ``path`` is a folder to load parameters from.

        Returns:
            A module with ``forward(input_ids, labels=...)``, both int64 of shape [batch, seq_len] (labels are not
            shifted, -100 is ignored), whose result has ``.loss`` (scalar, nats per token) and ``.logits``
            ([batch, seq_len, vocab]), and with ``save_pretrained``, which writes a Hugging Face-format folder. An
            attribute ``advised`` may have values for some of its parameters, as ``optimizer.lr_for`` and
            ``distro.k_for`` in a recipe: ``{"lr_for": {"*bias": 10}, "k_for": {"*bias": 128}}``. A node warns of a
            recipe that has none for them.

        Raises:
            ConfigError: a key is unknown or wrong.
        """
        ...


@hookspec
def register_models(register: Register[ModelFactory]) -> None:
    """Register models, chosen by the recipe's ``model.name``.

    ``--dry-run`` also calls ``factory(config)`` under ``torch.device("meta")``, to count a model of any size; there it
    must not touch parameter values. ``psyche train`` calls it so that large new tensors get their values later, one
    after the other and equal to the bit (:mod:`psyche_lightning.checkpoints.deferred`); a factory whose code it cannot
    follow is called again and builds everything at once. A plugin whose checkpoints have their own ``model_type``
    registers its classes with ``AutoConfig`` and ``AutoModelForCausalLM`` of ``transformers`` in the
    factory, and registers the model under that name: ``psyche generate`` calls ``factory({})`` on the meta device
    before it loads such a checkpoint.

    Example::

        @hookimpl
        def register_models(register):
            register("hello", lambda config: HelloModel(**config))

    Built in: ``hf`` (any causal language model of ``transformers``).
    """


class DataProvider(Protocol):
    """The samples of a run, the same on every node.

    ``psyche_lightning.testing.data`` is its conformance kit. A provider may also have:

    * an attribute ``fingerprint`` (text), which is part of the run's manifest: it differs between nodes whose samples
      differ, and joining reports the difference;
    * an attribute ``end_of_text`` (an id or None): the id after each text, if it is not the tokenizer's
      ``eos_token_id``; a new model ends its texts with it;
    * a method ``prefetch(start, stop)``, which is called before these ids are needed, begins to load them
      within its own bounds, and returns at once.

    Attributes:
        vocab_size: number of token ids.
        seq_len: tokens per sample.
    """

    vocab_size: int
    seq_len: int

    @property
    def tokenizer(self) -> Any:
        """A ``transformers`` tokenizer to save with checkpoints, or None; it may be an attribute."""
        ...

    def __len__(self) -> int:
        """Number of training samples; after that many ids, the next pass over them begins."""
        ...

    def samples(self, start: int, stop: int) -> list[dict[str, torch.Tensor]]:
        """The training samples with the ids ``range(start, stop)``.

        Deterministic and independent of earlier calls. Each pass (as many ids as there are samples) has every sample
        once, perhaps in an order of its own.

        Returns:
            For each id a dictionary with ``input_ids`` and ``labels``, and, if all samples have them,
            ``position_ids``, int64 of shape [seq_len]. Labels are not shifted; -100 is ignored. Where positions do not
            go up by one, another text begins, whose first token has the label -100.

        Raises:
            DataError: some samples remain unavailable after retries; it has their ids. The node then contributes
                nothing to the round, and the run assigns the ids again. If the error is lasting, the node leaves the
                run.
        """
        ...

    def validation(self) -> list[dict[str, torch.Tensor]]:
        """Samples of the same form that training never sees; possibly none."""
        ...


class DataProviderFactory(Protocol):
    """Builds a data provider from a recipe's ``data.config``."""

    def __call__(self, config: Mapping[str, Any], *, seed: int) -> DataProvider:
        """Open the data.

        Args:
            config: the recipe's ``data.config`` with ``seq_len`` filled in from ``data.seq_len``; plain values.
            seed: the run's seed, for shuffling.

        Raises:
            ConfigError: a key is unknown or wrong, or points to no data.
        """
        ...


@hookspec
def register_data_providers(register: Register[DataProviderFactory]) -> None:
    """Register sources of samples, chosen by the recipe's ``data.name``.

    ``factory(config, seed=...)`` returns a :class:`DataProvider`. All nodes of a run must see the same samples under
    the same ids: every setting that affects them belongs in ``config``, which is part of the run's manifest except for
    its keys ``path``, ``url``, ``tokenizer`` and ``fetch``, which may differ by machine.

    Example::

        @hookimpl
        def register_data_providers(register):
            register("digits", lambda config, *, seed: Digits(config["seq_len"], seed))

    Built in: ``tokens`` (token files, on disk or behind HTTP), ``mix`` (a weighted mix of them), ``datasets`` (texts
    and conversations of Hugging Face data sets), ``parquet`` (samples with labels and positions).
    """


# ---------------------------------------------------------------------------------------------------------------------
# What comes out
# ---------------------------------------------------------------------------------------------------------------------


class Exporter(Protocol):
    """Writes a checkpoint in another format."""

    def __call__(self, source: Path, target: Path) -> None:
        """Convert a checkpoint.

        Args:
            source: a folder in Hugging Face format on this machine, to be left as it is.
            target: an empty folder for the result.

        Raises:
            ConfigError: the checkpoint cannot be converted; the text says why.
            OSError: it cannot be read, or the result cannot be written.
        """
        ...


@hookspec
def register_exports(register: Register[Exporter]) -> None:
    """Register formats for ``psyche export CHECKPOINT --to NAME``, which other programs load.

    ``factory(source, target)`` is an :class:`Exporter`; a call converts one checkpoint.

    Example::

        @hookimpl
        def register_exports(register):
            register("words", export)

        def export(source, target):
            from psyche_lightning_words.files import convert

            convert(source / "model.safetensors", target / "model.words")

    Built in: none. The plugin ``mla`` writes its checkpoints as ``deepseek_v3``.
    """


# ---------------------------------------------------------------------------------------------------------------------
# What people type
# ---------------------------------------------------------------------------------------------------------------------


class CommandFactory(Protocol):
    """Returns a sub-command of ``psyche``."""

    def __call__(self) -> Callable[..., Any] | typer.Typer:
        """Import and return the command: a function with typer's annotations, or an app with sub-commands."""
        ...


@hookspec
def register_commands(register: Register[CommandFactory]) -> None:
    """Register sub-commands of ``psyche``; ``psyche --help`` shows the first line of the factory's docstring.

    Running the command calls ``factory()``; a ``PsycheError`` that it raises is printed without a traceback and
    ends with exit code 1. The names of the host's own commands are reserved.

    Example::

        @hookimpl
        def register_commands(register):
            register("hello", hello)

        def hello():
            \"\"\"Greet the network.\"\"\"
            from psyche_lightning_hello.command import greet

            return greet
    """
