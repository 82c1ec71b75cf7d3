"""A worker without torch: speaks the protocol of turbodiff.runtime.worker and does what a script says.

The prompt of a request may be a JSON script, or {"attempts": [script, script, ...]} with one script per attempt (the
last one repeats). Keys, all optional:

    steps, dt_s          how many steps, seconds each
    load_s               before the first step; load_bytes reads that many bytes meanwhile
    die                  "SIGKILL", "SIGSEGV", "SIGABRT", or "exit 0", "exit 3"
    die_at               "step" (default), "publish": before the clip has its name, "sidecar": with its sidecar
                         written, "linked": right after it has its name
    hang                 "sleep" | "spin" | "gil": instead of the second step
    error                fields of the error event, instead of the first step
    lost                 that rank of those that share its clip, and it ends of that instead of the first step
    wait                 need_bytes of a `wait` event
    damage               "truncate" | "missing" | "empty": what happens to the clip after its verification
    deaf                 true: ignores cancel
    clip                 the file whose bytes its clip has
    late                 true: sends words of attempt 0 first
    odd                  true: sends a step without its number
    print                a line for stderr
    seconds              what the phases report; seconds_on: by the UUID of the card

The cards of a command get a process each; where one of these ends, the steps begin again without them.
"""

import argparse
import faulthandler
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from turbodiff.spec.events import (  # started by path
    BeatEvent,
    ErrorEvent,
    HelloEvent,
    LinkEvent,
    NoticeEvent,
    PhaseEvent,
    PlanEvent,
    PreviewEvent,
    ResultEvent,
    RunCommand,
    StepEvent,
    WaitEvent,
)

CLIP = b"\x00\x00\x00\x18ftypmp42" + b"frames " * 64


class Voice:
    def __init__(self, fd):
        self.fd, self.job, self.attempt = fd, 0, 0
        self.lock = threading.Lock()

    def say(self, event):
        self.send(event.model_copy(update={"job": self.job, "attempt": self.attempt}).line())

    def send(self, line):
        with self.lock:
            os.write(self.fd, line.encode() + b"\n")


class Cancelled(Exception):
    pass


class Orders:
    def __init__(self, fd):
        self.jobs, self.cancelled, self.decode_now = queue.SimpleQueue(), set(), set()
        threading.Thread(target=self.read, args=(os.fdopen(fd, "rb"),), daemon=True).start()

    def read(self, stream):
        for line in stream:
            order = json.loads(line)
            if order["cmd"] == "run":
                self.jobs.put(order)
            elif order["cmd"] == "cancel":
                self.cancelled.add(order["job"])
            elif order["cmd"] == "stop_and_decode":
                self.decode_now.add(order["job"])
            else:
                break
        self.jobs.put(None)
        time.sleep(0.2)
        os._exit(0)


def script_of(order):
    try:
        script = json.loads(order["request"]["prompt"])
    except ValueError:
        return {}
    if not isinstance(script, dict):
        return {}
    attempts = script.get("attempts")
    return attempts[min(order["attempt"], len(attempts)) - 1] if attempts else script


def die(how):
    sys.stderr.flush()
    if how.startswith("exit"):
        os._exit(int(how.split()[1]))
    os.kill(os.getpid(), getattr(signal, how))
    time.sleep(5)


def hang(how):
    if how == "spin":
        while True:
            pass
    if how == "gil":
        pow(7, 10**9)
    time.sleep(3600)


def publish(order, script, voice):
    """Like archive/clips.py: sidecar first, the name of the clip is the commit."""
    request, outputs = order["request"], Path(order["outputs"])
    partial = outputs / ".partial" / f"{order['job']}.{order['attempt']}.{os.getpid()}.mp4"
    partial.parent.mkdir(parents=True, exist_ok=True)
    data = CLIP + f"{request['nonce']} {order['attempt']}".encode()
    data = Path(script["clip"]).read_bytes() if "clip" in script else data
    partial.write_bytes(data)
    if script.get("die_at") == "publish":
        die(script["die"])
    now = datetime.now(UTC)
    seed = 7 if request["seed"] is None else request["seed"]
    final = outputs / f"{now:%Y-%m-%d}" / f"t2v_{seed}_{request['nonce'][:8]}_{now:%Y%m%d_%H%M%S}.mp4"
    final.parent.mkdir(parents=True, exist_ok=True)
    while final.exists():
        final = final.with_name(f"{final.stem}_2.mp4")
    size = {"frames": request["num_frames"], "width": request["width"], "height": request["height"]}
    facts = {"sha256": hashlib.sha256(data).hexdigest(), **size, "fps": request["fps"]}
    identity = {"v": 1, "created": now.isoformat(), "job": order["job"], "attempt": order["attempt"]}
    record = {**identity, "request": {**request, "seed": seed}, "plan": order["plan"], **facts}
    sidecar_partial = Path(f"{partial}.json")
    sidecar_partial.write_text(json.dumps(record))
    if script.get("die_at") == "sidecar":
        die(script["die"])
    sidecar = Path(f"{final}.json")
    sidecar_partial.replace(sidecar)
    os.link(partial, final)
    partial.unlink()
    if script.get("die_at") == "linked":
        die(script["die"])
    damage = script.get("damage")
    if damage == "missing":
        final.unlink()
    elif damage:
        os.truncate(final, 0 if damage == "empty" else len(data) // 2)
    ran = {"attention": "dense"}
    voice.say(ResultEvent(path=str(final), sidecar=str(sidecar), seconds=1.0, ran=ran, **facts))


def run(order, voice, orders):
    script = script_of(order)
    voice.job, voice.attempt = order["job"], order["attempt"]
    command = RunCommand.model_validate(order)  # a worker of another machine tells of files by the asker's names
    order = order | {"request": command.request.with_files(command.names).model_dump(mode="json")}
    if command.plan:
        order["plan"] = command.plan.with_files(command.names).model_dump(mode="json")
    if script.get("late"):
        voice.attempt = 0
        voice.say(ResultEvent(path="/nowhere.mp4", sha256="0"))
        voice.attempt = order["attempt"]
    if script.get("odd"):
        head = {"v": 1, "job": voice.job, "attempt": voice.attempt, "type": "step", "t_s": 0.0}
        voice.send(json.dumps({**head, "fields": {"n": "many"}}))
    if "print" in script:
        print(script["print"], file=sys.stderr, flush=True)
    if "wait" in script:
        voice.say(WaitEvent(need_bytes=script["wait"], free_bytes=0))
        return
    if order.get("plan"):
        voice.say(PlanEvent(plan=order["plan"]))
    voice.say(PhaseEvent(name="text_encode", state="start"))
    load(script)
    took_s = script.get("seconds_on", {}).get(os.environ.get("CUDA_VISIBLE_DEVICES"), script.get("seconds", 0.1))
    voice.say(PhaseEvent(name="text_encode", state="done", seconds=took_s, peak_bytes=1 << 30))
    if command.measure_link:  # as much as only the first job would say
        voice.say(LinkEvent(cards=1 + len(command.cards), bytes_s=1e9 * command.job))
    voice.say(PhaseEvent(name="denoise", state="start"))
    if "error" in script:
        fail(script["error"], voice)
        return
    if "lost" in script and command.plan and command.cards:
        shares = [share for rank, share in enumerate(command.plan.shares) if rank != script["lost"]]
        voice.say(PlanEvent(plan=command.plan.model_copy(update={"shares": tuple(shares)})))
        fail({"code": "ranks_lost", "what": "a process is gone", "got": "ended with -9"}, voice)
        os._exit(1)
    denoise(order, script, voice, orders)
    voice.say(PhaseEvent(name="denoise", state="done", seconds=took_s, peak_bytes=2 << 30))
    publish(order, script, voice)


def fail(error, voice):
    voice.say(ErrorEvent(**{"code": "unexpected", "what": "scripted", "exit_code": 1, **error}))
    if error.get("code") == "oom":
        os._exit(1)


def follow(order):
    cards = [{**os.environ, "CUDA_VISIBLE_DEVICES": card} for card in order.get("cards", ())]
    return [subprocess.Popen(["sleep", "600"], env=environment) for environment in cards]


def end(followers):
    for follower in followers:
        follower.kill()
        follower.wait()


def denoise(order, script, voice, orders):
    followers = follow(order)
    try:
        while not steps(order, script, voice, orders, followers):
            end(followers)
            voice.say(NoticeEvent(key="ranks_lost", text="lost", numbers={"why": "ended", "left": 1}))
            followers = []
    finally:
        end(followers)


def steps(order, script, voice, orders, followers):
    """False where a follower was lost."""
    total = script.get("steps", 2)
    for i in range(1, total + 1):
        if any(follower.poll() is not None for follower in followers):
            return False
        if i == 2 and "hang" in script:
            hang(script["hang"])
        time.sleep(script.get("dt_s", 0.0))
        if order["job"] in orders.cancelled and not script.get("deaf"):
            raise Cancelled
        voice.say(StepEvent(i=i, n=total, t=0.5, expert="single", dt_s=script.get("dt_s", 0.0), eta_s=0.0))
        voice.say(PreviewEvent(jpeg="AAAA", i=i))
        if script.get("die") and script.get("die_at", "step") == "step":
            die(script["die"])
        if order["job"] in orders.decode_now:
            break
    return True


def load(script):
    end = time.monotonic() + script.get("load_s", 0.0)
    while time.monotonic() < end:
        if script.get("load_bytes"):
            with Path("/dev/zero").open("rb") as zeros:
                zeros.read(1 << 16)
        time.sleep(0.05)


def beat(voice):
    while True:
        time.sleep(0.5)
        try:
            voice.say(BeatEvent(rss_bytes=1 << 20, held_bytes=int(os.environ.get("SCRIPTED_HELD_BYTES", "0"))))
        except OSError:
            os._exit(1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--events-fd", type=int, required=True)
    parser.add_argument("--commands-fd", type=int, required=True)
    parser.add_argument("--die-at-start", default="")
    parser.add_argument("--device", default="")
    args = parser.parse_args()
    faulthandler.register(signal.SIGUSR1)
    voice, orders = Voice(args.events_fd), Orders(args.commands_fd)
    if args.die_at_start:
        print("Traceback: no such module", file=sys.stderr, flush=True)
        die(args.die_at_start)
    voice.say(HelloEvent(pid=os.getpid(), torch="0", device="cpu", device_name="scripted", cudnn=""))
    threading.Thread(target=beat, args=(voice,), daemon=True).start()
    while (order := orders.jobs.get()) is not None:
        try:
            run(order, voice, orders)
        except Cancelled:
            voice.say(ErrorEvent(code="cancelled", what="stopped", exit_code=130))
        voice.job = voice.attempt = 0


if __name__ == "__main__":
    main()
