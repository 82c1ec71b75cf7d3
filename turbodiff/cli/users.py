"""`turbodiff users`: who may use the API under a name, with a share of the cards and a part of the queue."""

import datetime
from typing import Annotated

import typer

from turbodiff.cli.flags import StateDir, open_studio

users_app = typer.Typer(help="Named users of the API: add, list, remove.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="a-z 0-9 _ -, up to 40 characters")]


@users_app.command("add")
def add_user(
    name: Name,
    share: Annotated[int, typer.Option("--share", help="jobs of theirs in each round of the queue")] = 1,
    waiting: Annotated[int, typer.Option("--waiting", help="jobs of theirs that may wait")] = 100,
    webhook: Annotated[
        str, typer.Option("--webhook", metavar="URL", help="told with a POST when a job of theirs is done or failed")
    ] = "",
    state_dir: StateDir = None,
) -> None:
    """Add a user; prints the token, once, and the key that signs their webhook."""
    import sys

    from turbodiff.cli.show import print_lines, print_raw, words_here
    from turbodiff.studio.serving import User

    asked = User.model_construct(name=name, share=share, most_waiting=waiting, webhook=webhook)
    token, user = open_studio(state_dir).serving.add(asked)
    print_raw(token)
    words = words_here()
    told = [words("shell.user_token", name=user.name, header="Authorization: Bearer TOKEN")]
    told += [words("shell.user_key", signing=user.webhook_key)] if user.webhook_key else []
    print_lines(told, sys.stderr)


@users_app.command("list")
def list_users(state_dir: StateDir = None) -> None:
    """Who has a name, with share, limit and the host of the webhook; never a token."""
    from urllib.parse import urlsplit

    from turbodiff.cli.show import print_table, words_here

    words = words_here()
    head = [words(f"shell.user_{column}") for column in ("name", "share", "waiting", "webhook", "since")]
    rows = []
    for user in open_studio(state_dir).serving.users():
        since = datetime.datetime.fromtimestamp(user.created_s).strftime("%Y-%m-%d")
        host = urlsplit(user.webhook).hostname or "" if user.webhook else ""
        rows.append([user.name, str(user.share), str(user.most_waiting), host, since])
    print_table(head, rows)


@users_app.command("remove")
def remove_user(name: Name, state_dir: StateDir = None) -> None:
    """Take a user's token away; their jobs and clips stay."""
    from turbodiff.cli.show import print_lines, words_here

    open_studio(state_dir).serving.remove(name)
    print_lines([words_here()("shell.user_removed", name=name)])


__all__ = ["users_app"]
