"""Places where checkpoints lie: a folder, an address that fsspec opens, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from psyche_lightning.checkpoints.manifest import NAME
from psyche_lightning.errors import CheckpointError, ConfigError, PsycheError, nearest

HUB = "hf"


class Place:
    """A folder of folders, by its address; every failure is a :class:`CheckpointError` that names it.

    Use :func:`open_place`. Methods block and may be called from any thread.

    Args:
        address: as the user wrote it.
        fs: a file system of fsspec.
        root: the address as that file system writes it.
    """

    def __init__(self, address: str, fs: Any, root: str) -> None:
        self.address = address
        self._fs = fs
        self._root = root.rstrip("/") or "/"

    def __str__(self) -> str:
        return self.address

    def name(self, path: str) -> str:
        """The address of something in it, for people."""
        return f"{self.address.rstrip('/')}/{path}" if path else self.address

    def _at(self, path: str) -> str:
        return posixpath.join(self._root, path) if path else self._root

    @contextlib.contextmanager
    def _doing(self, what: str, path: str = "") -> Iterator[None]:
        try:
            yield
        except PsycheError:
            raise
        except Exception as error:  # every file system has errors of its own
            raise CheckpointError(f"cannot {what} {self.name(path)}: {_reason(error)}") from error

    # --- reading ----------------------------------------------------------------------------------------------------

    @property
    def local(self) -> Path | None:
        """The folder, if it is on this machine."""
        protocol = self._fs.protocol
        names = (protocol,) if isinstance(protocol, str) else protocol
        return Path(self._root) if "file" in names else None

    def entries(self, path: str = "") -> dict[str, int | None]:
        """Names in a folder, with the sizes of files in bytes and None for folders; empty where nothing is."""
        with self._doing("look at", path):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._at(path), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
            named = {posixpath.basename(entry["name"].rstrip("/")): entry for entry in found}
            return {name: None if entry["type"] == "directory" else entry["size"] for name, entry in named.items()}

    def read(self, path: str, limit: int) -> bytes | None:
        """A small file; None where there is none.

        Raises:
            CheckpointError: it is larger than ``limit`` bytes.
        """
        with self._doing("read", path):
            try:
                with self._fs.open(self._at(path), "rb") as file:
                    data: bytes = file.read(limit + 1)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None
        if len(data) > limit:
            raise CheckpointError(
                f"{self.name(path)} has more than {limit} bytes; that is no {path.rpartition('/')[2]}"
            )
        return data

    def download(self, path: str, target: Path) -> None:
        """Copy one file here."""
        with self._doing("read", path):
            self._fs.get_file(self._at(path), str(target))

    # --- writing ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the place if it is not there, so that one that cannot be written is known at the start."""
        with self._doing("write to"):
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.ls(self._root, detail=False)

    def upload(self, folder: Path, name: str) -> None:
        """Copy a folder's files into the folder ``name``, the manifest last; what was there goes first."""
        with self._doing("write", name):
            self.remove(name)
            self._fs.makedirs(self._at(name), exist_ok=True)
            files = sorted(folder.iterdir(), key=lambda path: (path.name == NAME, path.name))
            for file in files:
                self._fs.put_file(str(file), self._at(f"{name}/{file.name}"))

    def remove(self, name: str) -> None:
        """Remove a folder, its manifest first: what is left of an interrupted removal is incomplete."""
        with self._doing("remove", name):
            if NAME in self.entries(name):
                self._fs.rm_file(self._at(f"{name}/{NAME}"))
            if self.entries(name) or name in self.entries():  # a folder without files is none in an object store
                self._fs.rm(self._at(name), recursive=True)


class HubPlace(Place):
    """A repository of the Hugging Face Hub, or a folder in one. What is written goes through its own client.

    Args:
        address: ``hf://OWNER/NAME[@REVISION][/FOLDER]``.
        fs: an ``HfFileSystem``.
        root: as :class:`Place`.
    """

    def __init__(self, address: str, fs: Any, root: str) -> None:
        super().__init__(address, fs, root)
        with self._doing("understand the address"):
            found = fs.resolve_path(root)
        self._folder: str = found.path_in_repo
        self._repo: dict[str, Any] = {
            "repo_id": found.repo_id,
            "repo_type": found.repo_type,
            "revision": found.revision,
        }

    def prepare(self) -> None:
        """Look whether the repository is there. It is not made: whether it is public is its owner's decision."""
        with self._doing("write to"):
            self._fs._api.repo_info(**self._repo)

    def upload(self, folder: Path, name: str) -> None:
        """Two commits: the files, then the manifest."""
        path = posixpath.join(self._folder, name)
        with self._doing("write", name):
            self.remove(name)
            self._fs._api.upload_folder(
                **self._repo,
                folder_path=folder,
                path_in_repo=path,
                ignore_patterns=[NAME],
                commit_message=f"{name}: files",
            )
            self._fs._api.upload_file(
                **self._repo,
                path_or_fileobj=folder / NAME,
                path_in_repo=f"{path}/{NAME}",
                commit_message=f"{name}: manifest",
            )

    def remove(self, name: str) -> None:
        """One commit."""
        with self._doing("remove", name):
            if self.entries(name):
                path = posixpath.join(self._folder, name)
                self._fs._api.delete_folder(**self._repo, path_in_repo=path, commit_message=f"{name}: removed")


def open_place(address: str) -> Place:
    """The place of an address: a folder, ``PROTOCOL://...`` of fsspec, or ``hf://OWNER/NAME[@REVISION][/FOLDER]``.

    Raises:
        ConfigError: the protocol is unknown or its package is not installed.
        CheckpointError: the address cannot be opened.
    """
    import fsspec
    from fsspec.registry import known_implementations

    protocol, separator, rest = address.partition("://")
    if separator and not rest.strip("/"):
        raise ConfigError(f"The address {address!r} has nothing after {protocol}://; expected a folder there.")
    try:
        fs, root = fsspec.core.url_to_fs(address if separator else str(Path(address).expanduser().absolute()))
    except ImportError as error:
        raise ConfigError(f"The address {address!r} needs a package that is not installed: {error}.") from error
    except ValueError as error:
        if separator and protocol not in known_implementations:
            raise ConfigError(
                f"The address {address!r} begins with an unknown protocol.{nearest(protocol, known_implementations)} "
                "Use a folder, or an address such as s3://BUCKET/FOLDER, gs://, file:// or hf://OWNER/NAME."
            ) from error
        raise CheckpointError(f"The address {address!r} cannot be opened: {error}") from error
    except Exception as error:  # every file system has errors of its own
        raise CheckpointError(f"The address {address!r} cannot be opened: {_reason(error)}") from error
    is_repository = protocol == HUB and not rest.startswith("buckets/")
    return HubPlace(address, fs, root) if is_repository else Place(address, fs, root)


def _reason(error: BaseException) -> str:
    """An error in one line; those of the Hub have more."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # how the Hub's file system says it
        return _reason(error.__cause__)
    if isinstance(error, GatedRepoError):
        return "the repository is gated: ask for access on its page, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such repository, or this machine's user may not see it; make it with `hf repos create "
            "OWNER/NAME`, or log in with `hf auth login`"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}"
