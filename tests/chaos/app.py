"""The app of the chaos test: a real supervisor, a page that uses the store, a worker. `app.py FOLDER scripted|demo`."""

import sys
import time
from pathlib import Path

from supervisor.bench import SCRIPTED

from turbodiff.jobs.store import Store
from turbodiff.supervisor.supervisor import Supervisor
from turbodiff.supervisor.worker_process import WORKER


def page(folder: Path) -> None:
    store = Store(folder / "state")
    while True:
        store.jobs(50)
        store.put("page", time.time())
        time.sleep(0.05)


def main() -> int:
    folder, what = Path(sys.argv[1]), sys.argv[2]
    if what == "page":
        page(folder)
    worker = SCRIPTED if what == "scripted" else (*WORKER, "--device", "cpu")
    supervisor = Supervisor(
        folder / "state", folder / "outputs", worker_argv=worker, working=folder, sample=lambda: None
    )
    return supervisor.serve((sys.executable, __file__, str(folder), "page"))


if __name__ == "__main__":
    sys.exit(main())
