"""The machines of a cluster as the supervisor writes them down once a second, for page and shell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError

from turbodiff.plan.hardware import Machine
from turbodiff.spec.models import Frozen

if TYPE_CHECKING:
    from turbodiff.jobs.store import Store

CLUSTER = "cluster"  # the fact's name
STALE_S = 10.0  # after which what the supervisor wrote down counts no more
NodeState = Literal["ok", "unreachable", "other_version"]


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


class ClusterFacts(Frozen):
    """A cluster that the supervisor works with; `joined` is False while its head cannot be reached."""

    address: str
    joined: bool = False
    nodes: tuple[NodeFacts, ...] = ()


def cluster_facts(store: Store) -> ClusterFacts | None:
    """The newest that the supervisor wrote down; None where none runs, or it works with no cluster."""
    rows = store.rows("SELECT value, at_s FROM fact WHERE name = ?", CLUSTER)
    if not rows or abs(store.now() - rows[0]["at_s"]) > STALE_S:
        return None
    try:
        return ClusterFacts.model_validate_json(rows[0]["value"])
    except ValidationError:  # "null", of another version, or damaged; the next second has another
        return None
