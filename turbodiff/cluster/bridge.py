"""The Ray driver: a child of the supervisor that passes JSON lines on to the cluster's actors, and back.

    python -m turbodiff.cluster.bridge --events-fd 5 --commands-fd 6 --address HOST:PORT --outputs FOLDER --run-id ID

A process of its own with descriptors of its own, because Ray writes into the driver's stdout, and ends the driver
process, with no exception, a minute after the head is gone. All actors end with it. Only this file imports Ray.
"""

import argparse
import asyncio
import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from turbodiff.archive.clips import PARTIAL, poster_path, sidecar_path
from turbodiff.cluster.host import PIECE_BYTES, GpuHost, NodeScout
from turbodiff.spec.events import RunCommand, read_command
from turbodiff.spec.files import sha256_of
from turbodiff.supervisor.worker_process import Lines

EVERY_S = 1.0  # between two looks at a node
WAIT_S = 0.5  # of a call that waits for a worker's words
START_S = 180.0  # of an actor, where the node's card is free: importing takes long from a cold disk
ANSWER_S = 10.0  # of a scout
AGAIN_S = 60.0  # from a scout that could not start to the next one
LOST_S = 20.0  # after which an actor that cannot be reached is given up
MOST_BYTES = 4 << 30  # of a clip; what has no end is cut here and refused by its SHA-256
GROUPS = {"listen": 1, "files": 2}


class Bridge:
    """Reads commands, keeps a task for each node and each worker, and writes what they say."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.run_id, self.outputs, self._events_fd = args.run_id, Path(args.outputs), args.events_fd
        self._commands = Lines(args.commands_fd)
        self._tasks = set[asyncio.Task[None]]()
        self._orders = dict[str, asyncio.Queue[dict[str, Any]]]()  # by worker
        self._nodes = dict[str, dict[str, Any]]()  # what our workers hold there, by node
        self._unfit = dict[str, float]()  # nodes whose scout cannot start, and when another one is tried (monotonic)

    def say(self, op: str, **fields: object) -> None:
        """Write one line."""
        data = json.dumps({"op": op, **fields}).encode() + b"\n"
        while data:
            data = data[os.write(self._events_fd, data) :]

    async def serve(self) -> None:
        """Until the supervisor closes its pipe."""
        loop, over = asyncio.get_running_loop(), asyncio.Event()

        def hear() -> None:
            for line in self._commands.read():
                self._obey(json.loads(line))
            if self._commands.closed:
                over.set()

        loop.add_reader(self._commands.fd, hear)
        self._start(self._watch_nodes())
        await over.wait()

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _obey(self, order: dict[str, Any]) -> None:
        if order["op"] == "start":
            self._orders[order["port"]] = asyncio.Queue()
            self._start(self._keep_port(order))
        elif order["op"] in ("held", "fetch"):
            own = self._nodes.get(order["node"])
            if own and order["op"] == "held":
                own.update(pids=order["pids"], held_bytes=order["held_bytes"])
            elif own:
                own["fetch"].append(order["model"])
        elif order["port"] in self._orders:
            self._orders[order["port"]].put_nowait(order)

    async def _watch_nodes(self) -> None:
        while True:
            found = await asyncio.to_thread(ray.nodes)  # it waits while the head is silent
            cards = {one["NodeID"]: int(one["Resources"].get("GPU", 0)) for one in found if one["Alive"]}
            for node in [node for node in self._unfit if node not in cards]:
                self._unfit.pop(node)
                self.say("node", node=node, state="lost", cards=0, why="it is gone")
            for one in found:
                node = one["NodeID"]
                is_due = self._unfit.get(node, 0.0) <= time.monotonic()
                if cards.get(node) and node not in self._nodes and is_due:
                    self._nodes[node] = {"pids": [], "held_bytes": {}, "fetch": []}
                    self._start(self._follow(node, one["NodeManagerHostname"], cards[node]))
            await asyncio.sleep(EVERY_S)

    async def _follow(self, node: str, host: str, cards: int) -> None:
        """Tell every second what a node has, until it is gone."""
        scout = ray.remote(num_cpus=0, num_gpus=0)(NodeScout).options(scheduling_strategy=on(node)).remote()
        silent_since_s: float | None = None
        patience_s, has_answered = START_S, False
        while True:
            try:
                own = self._nodes[node]
                while own["fetch"]:
                    await asyncio.wait_for(scout.fetch.remote(own["fetch"][0]), patience_s)
                    own["fetch"].pop(0)
                told = await asyncio.wait_for(scout.look.remote(own["pids"], own["held_bytes"]), patience_s)
                self.say("node", node=node, state="ok", cards=cards, **told)
                self._unfit.pop(node, None)
                silent_since_s, patience_s, has_answered = None, ANSWER_S, True
            except (ActorUnavailableError, TimeoutError):
                silent_since_s = silent_since_s or time.monotonic()
                self.say("node", node=node, state="unreachable", cards=cards)
            except RayError as error:
                if has_answered or (isinstance(error, RayActorError) and await self._is_gone(node, error)):
                    self.say("node", node=node, state="lost", cards=0, why=first_line(error))
                else:  # a start costs the node a process of Python, and the next one fails as this one did
                    self._unfit[node] = time.monotonic() + AGAIN_S
                    self.say("node", node=node, state="unfit", cards=cards, host=host, why=last_line(error))
                self._nodes.pop(node)
                return
            await asyncio.sleep(EVERY_S)

    async def _keep_port(self, order: dict[str, Any]) -> None:
        """One worker on one card, from its start to its end."""
        port, node = order["port"], order["node"]
        actor = ray.remote(num_cpus=0, num_gpus=1, max_restarts=0, max_task_retries=0, concurrency_groups=GROUPS)(
            GpuHost
        )
        host = actor.options(scheduling_strategy=on(node)).remote(self.run_id, order["argv"], order["allocator"])
        orders = asyncio.create_task(self._pass_orders(port, host))
        try:
            facts = await asyncio.wait_for(host.facts.remote(), START_S)
            self.say("up", port=port, **facts)
            await self._listen(port, host)
        except TimeoutError:
            self.say("over", port=port, status=None, lost="", why="the cluster gives no card")
        except RayActorError as error:
            lost = first_line(error) if await self._is_gone(node, error) else ""
            self.say("over", port=port, status=None, lost=lost, why=first_line(error))
        except RayError as error:
            self.say("over", port=port, status=None, lost="", why=first_line(error))
        except Exception as error:  # noqa: BLE001  words that no worker of ours says: that worker is at fault
            self.say("over", port=port, status=None, lost="", why=f"{type(error).__name__}: {first_line(error)}")
        finally:
            orders.cancel()
            self._orders.pop(port, None)
            with contextlib.suppress(RayError):
                ray.kill(host, no_restart=True)

    async def _is_gone(self, node: str, error: RayActorError) -> bool:
        """Whether an actor ended because its node did: Ray says so at once, its list of nodes up to a minute later."""
        if isinstance(error, ActorUnavailableError) or "its node has died" in str(error):
            return True
        if "its worker process has died" in str(error):  # as only the node itself can tell
            return False
        with contextlib.suppress(TimeoutError):
            found = await asyncio.wait_for(asyncio.to_thread(ray.nodes), ANSWER_S)
            return not any(one["NodeID"] == node and one["Alive"] for one in found)
        return True

    async def _listen(self, port: str, host: Any) -> None:
        """Pass on a worker's words until its end. Raises RayActorError: its actor is gone, or silent for too long."""
        pump, silent_since_s = host.pump.options(concurrency_group="listen"), None
        while True:
            try:
                heard = await pump.remote(WAIT_S)
                silent_since_s = None
            except ActorUnavailableError:
                silent_since_s = silent_since_s or time.monotonic()
                if time.monotonic() - silent_since_s > LOST_S:
                    raise
                await asyncio.sleep(EVERY_S)
                continue
            lines = [await self._with_clip(port, host, line) for line in heard.pop("events")]
            self.say("heard", port=port, events=lines, **heard)
            if heard["status"] is not None:
                self.say("over", port=port, status=heard["status"], lost="", why="")
                return

    async def _pass_orders(self, port: str, host: Any) -> None:
        sent = dict[str, str]()  # where the node has a file of ours
        while True:
            order = await self._orders[port].get()
            with contextlib.suppress(RayError):  # `_listen` hears of the end
                if order["op"] == "signal":
                    await host.signal.remote(order["number"])
                    continue
                if order["op"] == "end":
                    await host.end.remote()
                    ray.kill(host, no_restart=True)
                    return
                command = read_command(order["command"])
                for path in command.request.files if isinstance(command, RunCommand) else ():
                    if path not in sent:
                        sent[path] = await self._put(host, Path(path))
                await host.send.remote(order["command"], sent)

    async def _put(self, host: Any, path: Path) -> str:
        """Where the node has a file now; its own path where we cannot read it, and the worker says so."""
        put = host.put.options(concurrency_group="files")
        try:
            digest, n_bytes = await asyncio.to_thread(sha256_of, path), path.stat().st_size
            there: str = await put.remote(digest, path.suffix, 0, b"", n_bytes)
            with path.open("rb") as file:
                while not there and (piece := file.read(PIECE_BYTES)):
                    there = await put.remote(digest, path.suffix, file.tell() - len(piece), piece, n_bytes)
        except OSError:
            return str(path)
        return there or str(path)

    async def _with_clip(self, port: str, host: Any, line: str) -> str:
        """A line as it is; a result's once its clip lies among our gallery's unfinished files, under that path."""
        event = json.loads(line)
        if event["type"] != "result":
            return line
        fields, read = event["fields"], host.read.options(concurrency_group="files")
        there = Path(fields["path"])
        here = self.outputs / PARTIAL / f"{event['job']}.{event['attempt']}.{os.getpid()}.{port}.mp4"
        with contextlib.suppress(OSError):  # a full disk: what came is refused by its SHA-256
            here.parent.mkdir(parents=True, exist_ok=True)
            for name in (Path, sidecar_path, poster_path):
                with name(here).open("wb") as file:
                    while (piece := await read.remote(str(name(there)), file.tell())) and file.tell() < MOST_BYTES:
                        await asyncio.to_thread(file.write, piece)
        await host.forget.remote(str(there))
        event["fields"] = {**fields, "path": str(here), "sidecar": str(sidecar_path(here))}
        return json.dumps(event)


def on(node: str) -> NodeAffinitySchedulingStrategy:
    """On that node and on no other."""
    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)


def first_line(error: BaseException) -> str:
    """What an error of Ray says, in one line."""
    return " ".join(str(error).split())[:300]


def last_line(error: BaseException) -> str:
    """What an error of Ray comes to: the last line of the traceback that it quotes."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:300]


def refusal(error: BaseException) -> tuple[str, str]:
    """Why `ray.init` failed, and its words: "token" where none was given or a wrong one, "version" where Ray or Python
    is another one there, else "unreachable". Ray quotes the error that has the words in the text of another one, as a
    traceback."""
    behind: BaseException | None = error
    while behind is not None:
        for line in reversed(str(behind).splitlines()):
            if "authentication token" in line.lower():
                return "token", line.strip()[:300]
        if "version mismatch" in str(behind).lower():
            return "version", first_line(behind)
        behind = behind.__cause__ or behind.__context__
    return "unreachable", first_line(error)


def main(argv: Sequence[str] | None = None) -> None:
    """Join the cluster and serve the supervisor."""
    flags = argparse.ArgumentParser(prog="turbodiff-bridge")
    for name in ("--events-fd", "--commands-fd"):
        flags.add_argument(name, type=int, required=True)
    for name in ("--address", "--outputs", "--run-id"):
        flags.add_argument(name, required=True)
    args = flags.parse_args(argv)
    os.set_blocking(args.commands_fd, False)
    bridge, namespace = Bridge(args), f"turbodiff-{args.run_id}"
    try:
        ray.init(address=args.address, namespace=namespace, log_to_driver=False, configure_logging=False)
    except (RayError, OSError, RuntimeError) as error:
        why, text = refusal(error)
        bridge.say("refused", why=why, text=text)
        raise SystemExit(1) from None
    bridge.say("joined")
    asyncio.run(bridge.serve())


if __name__ == "__main__":
    main()
