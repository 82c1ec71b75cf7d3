"""A supervisor whose cards are all of nodes, behind a bridge without Ray."""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from supervisor.bench import Bench
from supervisor.fixtures import make_bench, no_rest  # noqa: F401

from cluster.ray_nodes import filled_nodes, ray_nodes  # noqa: F401
from turbodiff.cluster import remote

NOBODY = SimpleNamespace(worker=None, free=False, broken=False)


class FarBench(Bench):
    """A bench whose slots come and go with the nodes."""

    def __init__(self, folder: Path, nodes: Path, **options: Any) -> None:
        self.nodes = nodes
        cluster = partial(remote.Cluster, address="far:6379", most_cards=9)
        super().__init__(folder, **{"devices": (), "cluster": cluster, **options})

    @property
    def slot(self) -> Any:
        return next(iter(self.supervisor.slots), NOBODY)

    def list_nodes(self, *nodes: dict[str, Any]) -> None:
        """What the bridge tells of from now on."""
        part = self.nodes.with_suffix(".part")
        part.write_text(json.dumps(nodes))
        part.replace(self.nodes)


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FarBench]]:
    """Makes a bench with the node "n1"; variables for the bridge."""
    made: list[FarBench] = []
    monkeypatch.setattr(remote, "BRIDGE", (sys.executable, str(Path(__file__).with_name("scripted_bridge.py"))))
    nodes = tmp_path / "nodes.json"
    nodes.write_text(json.dumps([{"node": "n1"}]))
    monkeypatch.setenv("NODES", str(nodes))

    def make(options: dict[str, Any] | None = None, **environment: str) -> FarBench:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        made.append(FarBench(tmp_path, nodes, **(options or {})))
        return made[-1]

    yield make
    for each in made:
        each.supervisor.close()


@pytest.fixture
def bench(far: Callable[..., FarBench]) -> FarBench:
    return far()
