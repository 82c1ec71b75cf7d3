"""The machines of a cluster as the supervisor writes them down once a second, for page and shell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError

from turbodiff.plan.hardware import Machine
from turbodiff.spec.models import Frozen, Inventory, all_models

if TYPE_CHECKING:
    from turbodiff.jobs.store import Store

CLUSTER = "cluster"  # the fact's name
STALE_S = 10.0  # after which what the supervisor wrote down counts no more
NodeState = Literal["ok", "unreachable", "other_version", "same_cards", "unfit"]


class NodeCard(Frozen):
    """A card of a node: its name, "" while that is not known, and the job that it runs; `ours`: Ray gave it to us."""

    name: str = ""
    job: int | None = None
    ours: bool = False


class NodeDownload(Frozen):
    """How the download of a model to a node is doing: `share` of its bytes are there; `error` says why it failed."""

    model: str
    state: str = "running"  # as in diagnostics/downloads.py
    share: float = 0.0
    error: Mapping[str, str] = Field(default_factory=dict)


class NodeFacts(Frozen):
    """A machine of the cluster. `program` is the version that it runs where that is another one."""

    host: str = ""
    state: NodeState = "ok"
    cards: tuple[NodeCard, ...] = ()
    program: str = ""
    downloads: tuple[NodeDownload, ...] = ()
    machine: Machine | None = None  # while it answers
    inventory: Inventory | None = None  # the weights there, likewise

    @property
    def models(self) -> frozenset[str]:
        """The models that it has every file of."""
        return whole_models(self.inventory) if self.inventory else frozenset()


class ClusterFacts(Frozen):
    """A cluster that the supervisor works with; `joined` is False while its head cannot be reached, or does not let us
    in: `refused` says why it was not joined at the last try."""

    address: str
    downloads: bool = False  # its nodes may download the weights that a job waits for
    joined: bool = False
    refused: Literal["", "token", "version", "unreachable"] = ""

    @property
    def state(self) -> str:
        """joined, away, refused for a token that is missing or wrong, or other_version of Ray or Python."""
        known = {"token": "refused", "version": "other_version"}
        return "joined" if self.joined else known.get(self.refused, "away")

    nodes: tuple[NodeFacts, ...] = ()


def whole_models(inventory: Inventory) -> frozenset[str]:
    """The models of which every file is among these weights."""
    found = {(file.model, file.component) for file in inventory.files}
    whole = (spec.name for spec in all_models() if all((spec.name, file.component) in found for file in spec.files))
    return frozenset(whole)


def cluster_facts(store: Store) -> ClusterFacts | None:
    """The newest that the supervisor wrote down; None where none runs, or it works with no cluster."""
    rows = store.rows("SELECT value, at_s FROM fact WHERE name = ?", CLUSTER)
    if not rows or abs(store.now() - rows[0]["at_s"]) > STALE_S:
        return None
    try:
        return ClusterFacts.model_validate_json(rows[0]["value"])
    except ValidationError:  # "null", of another version, or damaged; the next second has another
        return None
