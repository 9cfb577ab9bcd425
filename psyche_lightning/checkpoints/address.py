"""Storage for checkpoints: a folder, an address that fsspec opens, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from psyche_lightning.checkpoints.manifest import NAME
from psyche_lightning.errors import CheckpointError, ConfigError, PsycheError, nearest

HUB = "hf"


class Storage:
    """The folders at an address; every failure is a :class:`CheckpointError` that names the address.

    Use :func:`open_storage`. Methods block and may be called from any thread.

    Args:
        address: as the user wrote it.
        fs: an fsspec file system.
        root: the address in that file system's form.
    """

    def __init__(self, address: str, fs: Any, root: str) -> None:
        self.address = address
        self._fs = fs
        self._root = root.rstrip("/") or "/"

    def __str__(self) -> str:
        return self.address

    def name(self, path: str) -> str:
        """The address of a path in it, for people."""
        return f"{self.address.rstrip('/')}/{path}" if path else self.address

    def _at(self, path: str) -> str:
        return posixpath.join(self._root, path) if path else self._root

    @contextlib.contextmanager
    def _doing(self, what: str, path: str = "") -> Iterator[None]:
        try:
            yield
        except PsycheError:
            raise
        except Exception as error:  # every file system has its own errors
            raise CheckpointError(f"cannot {what} {self.name(path)}: {_reason(error)}") from error

    # --- reading ----------------------------------------------------------------------------------------------------

    @property
    def local(self) -> Path | None:
        """The folder, if it is on this machine."""
        protocol = self._fs.protocol
        names = (protocol,) if isinstance(protocol, str) else protocol
        return Path(self._root) if "file" in names else None

    def entries(self, path: str = "") -> dict[str, int | None]:
        """Names in a folder, with the size of each file in bytes and None for folders; empty if there is no folder."""
        with self._doing("list", path):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._at(path), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
            named = {posixpath.basename(entry["name"].rstrip("/")): entry for entry in found}
            return {name: None if entry["type"] == "directory" else entry["size"] for name, entry in named.items()}

    def read(self, path: str, limit: int) -> bytes | None:
        """Returns a small file, or None if it does not exist.

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
                f"{self.name(path)} has more than {limit} bytes; it cannot be a {path.rpartition('/')[2]}"
            )
        return data

    def download(self, path: str, target: Path) -> None:
        """Copy one file to this machine."""
        with self._doing("read", path):
            self._fs.get_file(self._at(path), str(target))

    # --- writing ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Create the folder if it does not exist, so that a failure to write shows at the start."""
        with self._doing("write to"):
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.ls(self._root, detail=False)

    def upload(self, folder: Path, name: str) -> None:
        """Copy a folder's files into the folder ``name``, the manifest last; removes earlier content first."""
        with self._doing("write", name):
            self.remove(name)
            self._fs.makedirs(self._at(name), exist_ok=True)
            files = sorted(folder.iterdir(), key=lambda path: (path.name == NAME, path.name))
            for file in files:
                self._fs.put_file(str(file), self._at(f"{name}/{file.name}"))

    def remove(self, name: str) -> None:
        """Remove a folder, its manifest first, so that an interrupted removal leaves an incomplete checkpoint."""
        with self._doing("remove", name):
            if NAME in self.entries(name):
                self._fs.rm_file(self._at(f"{name}/{NAME}"))
            if self.entries(name) or name in self.entries():  # an object store has no empty folders
                self._fs.rm(self._at(name), recursive=True)


class HubStorage(Storage):
    """A repository of the Hugging Face Hub, or a folder in it. It writes through the Hub's own client.

    Args:
        address: ``hf://OWNER/NAME[@REVISION][/FOLDER]``.
        fs: an ``HfFileSystem``.
        root: as for :class:`Storage`.
    """

    def __init__(self, address: str, fs: Any, root: str) -> None:
        super().__init__(address, fs, root)
        with self._doing("read the address"):
            found = fs.resolve_path(root)
        self._folder: str = found.path_in_repo
        self._repo: dict[str, Any] = {
            "repo_id": found.repo_id,
            "repo_type": found.repo_type,
            "revision": found.revision,
        }

    def prepare(self) -> None:
        """Check that the repository exists. It is not created, because its owner decides whether it is public."""
        with self._doing("write to"):
            self._fs._api.repo_info(**self._repo)

    def upload(self, folder: Path, name: str) -> None:
        """Make two commits: first the files, then the manifest."""
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
        """Make one commit."""
        with self._doing("remove", name):
            if self.entries(name):
                path = posixpath.join(self._folder, name)
                self._fs._api.delete_folder(**self._repo, path_in_repo=path, commit_message=f"{name}: removed")


def open_storage(address: str) -> Storage:
    """Open an address: a folder, ``PROTOCOL://...`` of fsspec, or ``hf://OWNER/NAME[@REVISION][/FOLDER]``.

    Raises:
        ConfigError: the protocol is unknown or its package is not installed.
        CheckpointError: the address cannot be opened.
    """
    import fsspec
    from fsspec.registry import known_implementations

    protocol, separator, rest = address.partition("://")
    if separator and not rest.strip("/"):
        raise ConfigError(f"The address {address!r} has nothing after {protocol}://; expected a folder.")
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
    except Exception as error:  # every file system has its own errors
        raise CheckpointError(f"The address {address!r} cannot be opened: {_reason(error)}") from error
    is_repository = protocol == HUB and not rest.startswith("buckets/")
    return HubStorage(address, fs, root) if is_repository else Storage(address, fs, root)


def _reason(error: BaseException) -> str:
    """An error in one line; errors of the Hub have several."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # the Hub's file system hides the cause
        return _reason(error.__cause__)
    if isinstance(error, GatedRepoError):
        return "the repository is gated: ask for access on its page, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return (
            "the repository does not exist, or this machine's user may not see it; create it with `hf repos create "
            "OWNER/NAME`, or log in with `hf auth login`"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}"
