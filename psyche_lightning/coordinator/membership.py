"""The members of a run: who belongs to it, who may join, and who never may again."""

from __future__ import annotations

from typing import Any

from psyche_lightning.errors import CoordinatorError, counted
from psyche_lightning.protocol.codec import from_json, to_json
from psyche_lightning.protocol.limits import MAX_REGION, REGION, is_region
from psyche_lightning.protocol.state import Client
from psyche_lightning.text import is_plain, plain
from psyche_lightning.wire.identity import KEY_SIZE, short

MAX_ADDRESS = 512


class Membership:
    """The members of one run and the rules of admission.

    Args:
        run_id: the run's name, for messages.
        room: the largest number of members.

    Attributes:
        members: everyone who joined and has not left, by signer.
        ejected: node keys that may never join again.
        revoked: node keys that the owner took out by name; they stay out even if everyone may join.
        by_link: whether a node that joins needs the run's join link, unless its key was allowed.
        links: how many join links the run had before the present one.
    """

    def __init__(self, run_id: str, room: int) -> None:
        self.members: dict[bytes, Client] = {}
        self.ejected: set[bytes] = set()
        self.revoked: set[bytes] = set()
        self.by_link = False
        self.links = 0
        self._without_link: set[bytes] = set()
        self._run_id = run_id
        self._room = room
        self._allowed: set[bytes] | None = None  # everyone while None

    @property
    def allowed(self) -> list[bytes] | None:
        """The node keys that may join; None for everyone."""
        return None if self._allowed is None else sorted(self._allowed)

    def allow(self, node: bytes | None) -> None:
        """Let a node with this key join, or everyone whose key was not revoked; they need no link."""
        if node is None:
            self._allowed, self.by_link = None, False
            return
        self.revoked.discard(node)
        self._without_link.add(node)
        if self._allowed is not None:
            self._allowed.add(node)

    def forbid(self, node: bytes | None) -> None:
        """Forbid a node with this key to be a member, or everyone who is neither a member now nor allowed by key.

        Without everyone, the link lets nobody in.
        """
        if node is not None:
            self.revoked.add(node)
            self._without_link.discard(node)
            if self._allowed is not None:
                self._allowed.discard(node)
        elif self._allowed is None:
            members = {member.node for member in self.members.values()}
            self._allowed, self.by_link = (members | self._without_link) - self.revoked, False

    def renew_link(self) -> None:
        """Make the present join link worthless; members need none to come back.

        Raises:
            CoordinatorError: the run is joined without a link (``NoLink``).
        """
        if not self.by_link:
            raise CoordinatorError(
                f"run {self._run_id!r} is joined without a link: everybody may, or those whom its owner authorized",
                code="NoLink",
            )
        self.links += 1
        self._without_link |= {member.node for member in self.members.values()}

    def admits(self, node: bytes) -> bool:
        """Whether a node with this key may be a member."""
        return not (node in self.ejected or node in self.revoked) and (self._allowed is None or node in self._allowed)

    def check_link(self, signer: bytes, *, shown: bool, tried: bool) -> None:
        """Check that a node has the run's join link, if it needs it.

        Args:
            signer: the node.
            shown: whether it proved that it has the link.
            tried: whether it tried to.

        Raises:
            CoordinatorError: ``NotInvited``.
        """
        if self.by_link and not shown and signer not in self._without_link:
            what = "this node's join link is of another run, or of a former one" if tried else "this node has none"
            raise CoordinatorError(
                f"run {self._run_id!r} takes the nodes that have its join link, and {what}. Ask the run's owner for "
                f"the newest one, which `psyche run link {self._run_id}` prints, and start the node again with it: "
                "`psyche join LINK`, --coordinator LINK or PSYCHE_COORDINATOR.",
                code="NotInvited",
            )

    def check(self, signer: bytes, address: str = "", region: str = "") -> None:
        """Check that a node may become, or stay, a member.

        Raises:
            CoordinatorError: ``InvalidMember``, ``Ejected``, ``NotAuthorized``, or ``RunFull`` (retryable).
        """
        if len(signer) != KEY_SIZE or len(address) > MAX_ADDRESS or not is_plain(address):
            raise CoordinatorError(
                f"a member must have a key of {KEY_SIZE} bytes, and an address of at most {MAX_ADDRESS} characters "
                "without control characters",
                code="InvalidMember",
            )
        if not is_region(region):
            raise CoordinatorError(
                f"a member's region is {plain(region[:MAX_REGION])!r}; expected {REGION}", code="InvalidMember"
            )
        if signer in self.ejected:
            raise CoordinatorError(
                f"{short(signer)} is ejected from this run: it signed two results for one batch. A node whose folder "
                "was lost or copied needs a new key.",
                code="Ejected",
            )
        if signer in self.revoked:
            raise CoordinatorError(
                f"the owner of this run removed the node {signer.hex()}, which may not join again unless the owner "
                f"takes that back: `psyche run authorize {self._run_id} {signer.hex()}`",
                code="NotAuthorized",
            )
        if not self.admits(signer):
            raise CoordinatorError(
                f"the node {signer.hex()} may not join this run; its owner can allow it: "
                f"`psyche run authorize {self._run_id} {signer.hex()}`",
                code="NotAuthorized",
            )
        if signer not in self.members and len(self.members) >= self._room:
            raise CoordinatorError(
                f"the run has {counted(len(self.members), 'member')}, which is its limit; try again later",
                code="RunFull",
                retryable=True,
            )

    def dump(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "ejected": sorted(key.hex() for key in self.ejected),
            "revoked": sorted(key.hex() for key in self.revoked),
            "by_link": self.by_link,
            "links": self.links,
            "without_link": sorted(key.hex() for key in self._without_link),
            "allowed": None if self._allowed is None else sorted(key.hex() for key in self._allowed),
            "members": [to_json(member) for member in self.members.values()],
        }

    def restore(self, data: dict[str, Any]) -> None:
        """Restore what :meth:`dump` returned; other data raises the errors of reading it."""
        self.members = {member.signer: member for member in (from_json(Client, m) for m in data["members"])}
        self.ejected = {bytes.fromhex(key) for key in data.get("ejected", [])}
        self.revoked = {bytes.fromhex(key) for key in data.get("revoked", [])}
        self.by_link, self.links = data["by_link"] is True, int(data["links"])
        self._without_link = {bytes.fromhex(key) for key in data["without_link"]}
        allowed = data.get("allowed")
        self._allowed = None if allowed is None else {bytes.fromhex(key) for key in allowed}
