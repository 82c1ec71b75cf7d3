"""A bridge without Ray: tells of the nodes that the file $NODES lists, and starts workers "there", on this machine.

A node: {"node": "n1", "host": "far", "cards": 1, "machine": {...}, "program": "...", "weights": true, "state": "ok",
"inventory": "{...}"}, all but the first optional; what is null there is not said. Of one that leaves the list the
supervisor hears that it is lost; its workers live on and talk on, as those of a node that nobody can reach. Words of a
worker are told twice, the second time under the name of a port that nobody asked for.
"""

import json
import os
import select
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from turbodiff.cluster.host import GpuHost, program
from turbodiff.spec.events import read_command
from turbodiff.spec.files import sha256_of
from turbodiff.spec.models import Inventory
from turbodiff.supervisor.worker_process import Lines
from turbodiff.weights.locate import inventory

EVENTS, COMMANDS = (int(sys.argv[sys.argv.index(flag) + 1]) for flag in ("--events-fd", "--commands-fd"))
OUTPUTS = Path(sys.argv[sys.argv.index("--outputs") + 1])
EVERY_S = 0.2  # between two words about a node


def say(**told):
    data = json.dumps(told).encode() + b"\n"
    while data:
        data = data[os.write(EVENTS, data) :]


def listed():
    try:
        return {node["node"]: node for node in json.loads(Path(os.environ["NODES"]).read_text())}
    except (KeyError, ValueError):  # not set, or half written
        return None if "NODES" in os.environ else {"n1": {"node": "n1"}}


def bring(port, line):
    """The line of a result with the clip beside our own, as the real bridge fetches it."""
    event = json.loads(line)
    if event["type"] == "result":
        there = Path(event["fields"]["path"])
        here = OUTPUTS / ".partial" / f"{event['job']}.{event['attempt']}.{os.getpid()}.{port}.mp4"
        here.parent.mkdir(parents=True, exist_ok=True)
        damage = os.environ.get("DAMAGE", "").encode()
        here.write_bytes((there.read_bytes() if there.exists() else b"") + damage)
        for ending in (".json", ".jpg"):
            beside = Path(f"{there}{ending}")
            Path(f"{here}{ending}").write_bytes(beside.read_bytes() if beside.exists() else b"")
        event["fields"]["path"] = str(here)
    return json.dumps(event)


class Bridge:
    def __init__(self):
        os.set_blocking(COMMANDS, False)
        self.commands, self.hosts, self.known, self.told_s = Lines(COMMANDS), {}, set(), 0.0
        self.where, self.cards = {}, {}  # by port: its node, the number of its card there
        self.fetching = {}  # by node: the model, the looks until it is there

    def serve(self):
        say(op="joined")
        while not self.commands.closed:
            select.select([COMMANDS], [], [], 0.02)
            if time.monotonic() - self.told_s > EVERY_S:
                self.told_s = time.monotonic()
                self.tell()
            for line in self.commands.read():
                self.obey(json.loads(line))
            for port, host in list(self.hosts.items()):
                self.listen(port, host)
        for host in self.hosts.values():
            host.end()

    def tell(self):
        nodes = listed()
        if nodes is None:
            return
        for name in self.known - set(nodes):
            say(op="node", node=name, state="lost", cards=0, why="it left the list")
            for port in [port for port, there in self.where.items() if there == name]:
                say(op="over", port=port, status=None, lost="its node is gone", why="")
        for name, node in nodes.items():
            told = {"op": "node", "state": "ok", "cards": 1, "host": "far", "host_ooms": 0, "program": program()}
            told |= {"machine": {}, **node}
            if name not in self.known:
                found = inventory() if told.pop("weights", True) else Inventory(files=())
                told.setdefault("inventory", found.model_dump_json())
            if name in self.fetching:  # as many looks as the list says, then the weights are there
                model, left = self.fetching[name]
                told["downloads"] = [{"model": model, "state": "running" if left else "done", "share": 0.5}]
                self.fetching[name] = model, left - 1
                if left == 0:
                    self.fetching.pop(name)
                    told["inventory"] = inventory().model_dump_json()
            say(**{name: value for name, value in told.items() if value is not None})
        self.known = set(nodes)

    def obey(self, order):
        if order["op"] == "start":
            host = self.hosts[order["port"]] = GpuHost("run", order["argv"], None)
            used = [
                self.cards[port] for port, node in self.where.items() if node == order["node"] and port in self.hosts
            ]
            card = next(n for n in range(len(used) + 1) if n not in used)
            self.where[order["port"]], self.cards[order["port"]] = order["node"], card
            say(op="up", port=order["port"], pid=host.worker.pid, card=str(card))
        elif order["op"] == "fetch":
            self.fetching[order["node"]] = order["model"], listed()[order["node"]].get("fetches", 1)
        elif (host := self.hosts.get(order.get("port"))) is None:
            return
        elif order["op"] == "send":
            command, sent = read_command(order["command"]), {}
            for path in command.request.files if command.cmd == "run" else ():
                data = Path(path).read_bytes()
                sent[path] = host.put(sha256_of(Path(path)), Path(path).suffix, 0, data, len(data))
            host.send(order["command"], sent)
        elif order["op"] == "signal":
            host.signal(order["number"])
        elif order["op"] == "end":
            self.hosts.pop(order["port"]).end()

    def listen(self, port, host):
        heard = host.pump(0.0)
        heard["events"] = [bring(port, line) for line in heard["events"]]
        for name in (port, "0" * 16):
            say(op="heard", port=name, **heard)
        if heard["status"] is not None:
            say(op="over", port=port, status=heard["status"], lost="", why="")
            self.hosts.pop(port)


if __name__ == "__main__":
    Bridge().serve()
