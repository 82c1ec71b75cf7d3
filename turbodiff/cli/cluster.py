"""`turbodiff cluster`: what the cards of other machines do, and the commands that bring machines together."""

import os
import socket
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from turbodiff.cli.flags import StateDir, open_studio
from turbodiff.spec.errors import RequestError, TurbodiffError, not_started
from turbodiff.spec.page_flags import TOKEN_FILE, TOKEN_MODE, check_cluster

if TYPE_CHECKING:
    from turbodiff.spec.wording import Words
    from turbodiff.studio.cards import NodeDownload

PORT = 6379
REACH_S = 10.0  # until somebody answers at the head's address
# a token is asked for; a node that is silent is given up after about ten seconds instead of a minute; workers are as
# urgent as any process, where Ray would have them wait for all others (nice 15)
SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}

cluster_app = typer.Typer(help="Cards of other machines over Ray: status, commands, join.", no_args_is_help=True)
Head = Annotated[str, typer.Argument(help="HOST:PORT of the head")]


@cluster_app.command("status")
def cluster_status(state_dir: StateDir = None) -> None:
    """The nodes of the cluster that the running app works with, their cards and jobs."""
    from turbodiff.cli.show import print_lines, print_table, words_here

    words, studio = words_here(), open_studio(state_dir)
    told = studio.cards.cluster() if studio.served else None
    if told is None:
        raise TurbodiffError(
            "no app works with a cluster", code="no_cluster", try_instead="turbodiff serve --cluster ADDRESS"
        )
    state = words(f"shell.cluster_{told.state}", address=told.address, file=TOKEN_FILE, mode=TOKEN_MODE)
    print_lines([state])
    head = [words(f"shell.cluster_{name}") for name in ("node", "state", "cards", "jobs")]
    print_table(
        head,
        (
            [
                node.host,
                "; ".join([words(f"shell.node_{node.state}"), *(_download(one, words) for one in node.downloads)]),
                f"{sum(card.ours for card in node.cards)}/{len(node.cards)} "
                + ", ".join(card.name for card in node.cards if card.name),
                ", ".join(str(card.job) for card in node.cards if card.job),
            ]
            for node in told.nodes
        ),
    )


def _download(found: "NodeDownload", words: "Words") -> str:
    if found.state == "done":
        return words("shell.node_downloaded", model=found.model)
    why = words.error(found.error) if found.state == "failed" else ""
    key = "failed" if found.state == "failed" else "downloads"
    return words(f"shell.node_{key}", model=found.model, share=f"{found.share:.0%}", why=why)


@cluster_app.command("commands")
def cluster_commands(
    head: Annotated[str, typer.Argument(help="name or address of the head, as the others reach it")] = "HEAD",
) -> None:
    """Print what to run on the head, on every other machine, and here."""
    from turbodiff.cli.show import print_raw, words_here

    words = words_here()
    settings = " ".join(f"{name}={value}" for name, value in SETTINGS.items())
    options = f"--port={PORT} --node-ip-address={head} --include-dashboard=false --disable-usage-stats"
    for line in (
        f"# {words('shell.cluster_on_head', file=TOKEN_FILE)}",
        "ray get-auth-token --generate >/dev/null && chmod 600 ~/.ray/auth_token",
        f"{settings} ray start --head {options}",
        f"# {words('shell.cluster_on_node')}",
        f"turbodiff cluster join {head}:{PORT}",
        f"# {words('shell.cluster_here')}",
        f"RAY_AUTH_MODE=token turbodiff serve --cluster {head}:{PORT}",
    ):
        print_raw(line)


@cluster_app.command("join")
def cluster_join(
    head: Head, dry_run: Annotated[bool, typer.Option("--dry-run", help="show the command alone")] = False
) -> None:
    """Offer the cards of this machine to a cluster, until Ctrl-C."""
    from turbodiff.cli.show import print_raw

    if head == "auto":
        raise RequestError("a node joins the head by its address", code="bad_cluster", field="HEAD", got=head)
    check_cluster(head, "HEAD")
    argv = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={head}", "--block"]
    if dry_run:
        print_raw(" ".join([*(f"{name}={value}" for name, value in SETTINGS.items()), *argv]))
        return
    if find_spec("ray") is None:
        raise RequestError(
            "a cluster is joined with Ray", code="cluster_missing", field="HEAD",
            try_instead='pip install "turbodiff[cluster]"',
        )  # fmt: skip
    host, _, port = head.rpartition(":")
    try:  # Ray tries for minutes, and says then where in its code it gave up
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except (OSError, UnicodeError) as error:  # the latter of a name that is none
        raise TurbodiffError(
            "nobody answers at the head's address", code="head_silent", field="HEAD", got=f"{head}: {error}",
            try_instead=f"turbodiff cluster commands {host}",
        ) from None  # fmt: skip
    try:
        os.execve(sys.executable, argv, {**os.environ, **SETTINGS})
    except OSError as error:
        raise not_started(sys.executable, error) from None


__all__ = ["cluster_app"]
