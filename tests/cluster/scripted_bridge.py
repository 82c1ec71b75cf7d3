"""A bridge without Ray: tells of one node that runs the program of $NODE_PROGRAM, and starts scripted workers there.

Words of a worker are told twice, the second time under the name of a port that nobody asked for.
"""

import json
import os
import select
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from supervisor.bench import SCRIPTED

from turbodiff.cluster.host import GpuHost, program
from turbodiff.spec.models import Inventory
from turbodiff.supervisor.worker_process import Lines
from turbodiff.weights.locate import inventory

EVENTS, COMMANDS = (int(sys.argv[sys.argv.index(flag) + 1]) for flag in ("--events-fd", "--commands-fd"))
OUTPUTS = Path(sys.argv[sys.argv.index("--outputs") + 1])


def say(**told):
    os.write(EVENTS, json.dumps(told).encode() + b"\n")


def bring(line):
    event = json.loads(line)
    if event["type"] == "result":
        there = Path(event["fields"]["path"])
        here = OUTPUTS / ".partial" / f"1.1.{os.getpid()}.x.mp4"
        here.parent.mkdir(parents=True, exist_ok=True)
        damage = os.environ.get("DAMAGE", "").encode()
        here.write_bytes(there.read_bytes() + damage)
        for ending in (".json", ".jpg"):
            beside = Path(f"{there}{ending}")
            Path(f"{here}{ending}").write_bytes(beside.read_bytes() if beside.exists() else b"")
        event["fields"]["path"] = str(here)
    return json.dumps(event)


def main():
    os.set_blocking(COMMANDS, False)
    commands, hosts = Lines(COMMANDS), {}
    say(op="joined")
    node = {"op": "node", "node": "n1", "state": "ok", "cards": 1, "host": "far", "host_ooms": 0, "machine": {}}
    found = Inventory(files=()) if "NO_WEIGHTS" in os.environ else inventory()
    say(**node, program=os.environ.get("NODE_PROGRAM", program()), inventory=found.model_dump_json())
    while not commands.closed:
        select.select([COMMANDS], [], [], 0.05)
        for line in commands.read():
            order = json.loads(line)
            if order["op"] == "start":
                host = hosts[order["port"]] = GpuHost("run", SCRIPTED, None)
                say(op="up", port=order["port"], **host.facts())
            elif order["op"] == "send":
                hosts[order["port"]].send(order["command"])
            elif order["op"] == "end":
                hosts.pop(order["port"]).end()
        for port, host in list(hosts.items()):
            heard = host.pump(0.05)
            heard["events"] = [bring(line) for line in heard["events"]]
            for name in (port, "0" * 16):
                say(op="heard", port=name, **heard)
            if heard["status"] is not None:
                say(op="over", port=port, status=heard["status"], lost="", why="")
                hosts.pop(port)
    for host in hosts.values():
        host.end()


if __name__ == "__main__":
    main()
