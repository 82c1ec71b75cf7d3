"""Who uses the API under a name: each has a token, a share of the cards, a part of the queue, perhaps a webhook.

Tokens are random, 256 bits, shown once; the database keeps their SHA-256, which nobody can log in with. No password
hash is needed for what cannot be guessed.
"""

import hashlib
import hmac
import re
import secrets
import sqlite3

from pydantic import Field

from turbodiff.jobs.database import Database
from turbodiff.spec.errors import RequestError
from turbodiff.spec.models import Frozen
from turbodiff.spec.page_flags import is_web_address

NAME = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,38}[a-z0-9])?")
TOKEN = re.compile(rf"({NAME.pattern})\.[\w-]{{43}}")
MOST_SHARE, MOST_WAITING, MOST_USERS = 100, 10_000, 10_000
WAITING = 100  # jobs of a user that may wait, unless told otherwise


class User(Frozen):
    """Somebody with a name.

    Args:
        share: jobs of theirs that run in one round of the queue.
        most_waiting: jobs of theirs that may wait.
        webhook: what is told when a job of theirs is done or failed, signed with `webhook_key`; "" for nothing.
    """

    name: str
    share: int = Field(default=1, ge=1, le=MOST_SHARE)
    most_waiting: int = Field(default=WAITING, ge=1, le=MOST_WAITING)
    webhook: str = ""
    webhook_key: str = ""
    created_s: float = 0.0


def add_user(store: Database, user: User) -> tuple[str, User]:
    """Add a user; returns the token, which is kept nowhere, and the user as it was added.

    Raises:
        RequestError: the name is taken or none, a number is out of its range, or the webhook is no address.
    """
    if not NAME.fullmatch(user.name):
        raise RequestError(
            "no name for a user", code="bad_user", field="name", got=user.name[:60],
            expected="1 to 40 of a-z 0-9 _ -, a letter or digit first and last", try_instead="anna",
        )  # fmt: skip
    for field, got, most in (("share", user.share, MOST_SHARE), ("waiting", user.most_waiting, MOST_WAITING)):
        if not 1 <= got <= most:
            raise RequestError("out of its range", code="bad_user_limit", field=field, got=got, expected=f"1..{most}")
    if user.webhook and not is_web_address(user.webhook):
        raise RequestError(
            "an address begins with http:// or https://", code="bad_address", field="webhook", got=user.webhook[:200],
            expected="http:// | https://", try_instead="http://127.0.0.1:8080/turbodiff",
        )  # fmt: skip
    token = f"{user.name}.{secrets.token_urlsafe(32)}"
    key = secrets.token_hex(32) if user.webhook else ""
    made = user.model_copy(update={"webhook_key": key, "created_s": store.now()})
    values = (made.name, _hash(token), made.share, made.most_waiting, made.webhook, key, made.created_s)
    with store.write() as db:
        if db.execute("SELECT 1 FROM api_user WHERE name = ?", (user.name,)).fetchone():
            raise RequestError(
                "there is a user of that name", code="user_taken", field="name", got=user.name,
                try_instead=f"turbodiff users remove {user.name}",
            )  # fmt: skip
        if db.execute("SELECT count(*) FROM api_user").fetchone()[0] >= MOST_USERS:
            raise RequestError(
                "too many users", code="users_full", field="name", got=MOST_USERS, expected=f"at most {MOST_USERS}",
                try_instead="turbodiff users remove NAME",
            )  # fmt: skip
        db.execute("INSERT INTO api_user VALUES (?, ?, ?, ?, ?, ?, ?)", values)
    return token, made


def remove_user(store: Database, name: str) -> None:
    """Take a user's token away; their jobs stay.

    Raises:
        RequestError: there is no such user.
    """
    with store.write() as db:
        if db.execute("DELETE FROM api_user WHERE name = ?", (name,)).rowcount != 1:
            raise RequestError(
                "no such user", code="user_unknown", field="name", got=name[:60], try_instead="turbodiff users list"
            )


def users(store: Database) -> list[User]:
    """All of them, by name."""
    return [_user(row) for row in store.rows("SELECT * FROM api_user ORDER BY name")]


def user_named(store: Database, name: str) -> User | None:
    """The user of that name."""
    rows = store.rows("SELECT * FROM api_user WHERE name = ?", name) if name else []
    return _user(rows[0]) if rows else None


def user_of_token(store: Database, token: str) -> User | None:
    """Whose token this is; None for nobody's."""
    named = TOKEN.fullmatch(token)
    rows = store.rows("SELECT * FROM api_user WHERE name = ?", named[1]) if named else []
    return _user(rows[0]) if rows and hmac.compare_digest(str(rows[0]["token_sha256"]), _hash(token)) else None


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _user(row: sqlite3.Row) -> User:
    return User.model_construct(**{name: row[name] for name in User.model_fields})
