"""Put on the path of the web process by test_fuzz.py: notes every write, connection and program that Python starts.

One line per event in the file that $WATCH_FILE names: what, then its subject as JSON.
"""

import json
import os
import sys
from pathlib import Path

WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.move"}
OTHERS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "subprocess.Popen", "os.system", "os.exec"}


def watch(event, args):
    if event == "open":
        path, mode, flags = args
        writes = any(letter in mode for letter in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not writes or isinstance(path, int) or os.path.isdir(path):  # noqa: PTH112  (Path's raises)
            return  # a folder opened for writing is a temporary file without a name (O_TMPFILE)
        subject = str(Path(os.fsdecode(path)).absolute())
    elif event in WRITES:
        if isinstance(args[-1], int) and args[-1] >= 0 and event == "os.remove":
            return  # relative to a folder's descriptor
        subject = [
            str(Path(os.fsdecode(path)).absolute()) for path in args if isinstance(path, (str, bytes, os.PathLike))
        ]
    elif event in OTHERS:
        subject = [repr(arg)[:300] for arg in args]
    else:
        return
    os.write(notes, json.dumps([event, subject]).encode() + b"\n")


if "webui.server" in getattr(sys, "orig_argv", ()) and os.environ.get("WATCH_FILE"):
    notes = os.open(os.environ["WATCH_FILE"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.addaudithook(watch)
