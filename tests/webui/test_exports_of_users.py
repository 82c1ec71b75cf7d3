"""A named user fetches the exports of their own clips, whatever the format; those of others are not there."""

import asyncio
from pathlib import Path

import httpx
import pytest

from turbodiff.jobs.attempts import claim, finish_job
from turbodiff.jobs.users import User, add_user
from turbodiff.spec.clips import ClipResult
from turbodiff.spec.exports import FORMATS
from turbodiff.spec.page_flags import page_parser
from turbodiff.spec.request import make_request
from turbodiff.studio import Studio
from webui.server import make_app


def test_a_named_user_fetches_their_exports_of_every_format_and_no_other_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    args = page_parser().parse_args([])
    args.password = "open sesame"
    studio = Studio(tmp_path / "state", tmp_path / "outputs")
    tokens = [add_user(studio._store, User(name=name))[0] for name in ("anna", "ben")]
    clip = tmp_path / "outputs" / "2026-01-01" / "t2v_1_wan2.1-1.3b_20260101_000000.mp4"
    clip.parent.mkdir(parents=True)
    clip.write_bytes(b"clip")
    studio._store.submit(make_request({"prompt": "x"}), user="anna")
    job = claim(studio._store)
    assert job
    finish_job(studio._store, job.id, job.attempt, ClipResult(path=str(clip), frames=9))
    names = [f"{clip.stem}.0123abcd{kind.suffix}" for kind in FORMATS.values()]
    (studio.state / "exports").mkdir(exist_ok=True)
    for name in names:
        (studio.state / "exports" / name).write_bytes(b"made earlier")
    app = make_app(studio, args)

    async def codes() -> list[list[int]]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            heads = [{"authorization": f"Bearer {token}"} for token in (*tokens, args.password)]
            return [[(await client.get(f"/exports/{name}", headers=head)).status_code for head in heads]
                    for name in names]  # fmt: skip

    assert asyncio.run(codes()) == [[200, 404, 200]] * len(names)
    studio.close()
