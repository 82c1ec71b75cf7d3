"""Longer clips: which clip is continued, the rows that come after the form's own segment, what all take together."""

from collections.abc import Sequence

from turbodiff.spec.plan import Plan
from turbodiff.spec.request import Request
from webui.markup import Html, action, el, join, local, note, poster, void
from webui.wording import Words


def draw_rows(rows: Sequence[Sequence[str]], words: Words) -> Html:
    """The rows that come after, an empty one where there is none. page.js adds and removes them and keeps the form's
    hidden field in step: with Gradio's Dataframe no tap opens a keyboard on a phone, and a first letter gets lost."""
    drawn = []
    for number, row in enumerate(rows or [("", "", "")], 2):
        prompt, seconds, seed = (words(f"storyboard.{name}") for name in ("prompt", "seconds", "seed"))
        text = el("textarea", row[0], rows=2, cls="td-input", aria_label=prompt, placeholder=prompt)
        numbers = [
            void("input", type="text", value=value, cls="td-input", inputmode=mode, aria_label=name, placeholder=name)
            for value, mode, name in ((row[1], "decimal", seconds), (row[2], "numeric", seed))
        ]
        label = words("storyboard.drop", n=number)
        drop = local("dropsegment", "", "✕", cls="plain", title=label, aria_label=label)
        drawn.append(el("div", el("b", number, cls="td-num"), text, numbers, drop, cls="td-segment"))
    add = local("addsegment", "", words("storyboard.add"))
    return el("div", drawn, el("div", add, cls="td-acts"), cls="td-html", id="segments")


def draw_continued(clip: str, request: Request, frames: int, picture: str, words: Words) -> Html:
    """The clip that is continued, and a button that lets go of it."""
    told = words("storyboard.continues", prompt=request.prompt, time=words.seconds(frames / request.fps))
    free = _let_go(words)
    lines = el("div", el("b", told), el("p", words("storyboard.continues_how"), cls="td-quiet td-small"), free)
    shown = poster(picture)
    return el("div", shown, lines, cls="td-card td-line td-html", id="continued", data_clip=clip)


def draw_gone(words: Words) -> Html:
    """That the clip to continue is no longer there, and the same button."""
    return el("div", note(words("error.clip_unknown"), "warn"), _let_go(words), id="continued")


def _let_go(words: Words) -> Html:
    return action("fill", '{"continues": ""}', words("storyboard.let_go"), form=True, cls="plain")


def draw_sum(plans: Sequence[Plan], before: int, error: str, words: Words) -> Html:
    """What the whole storyboard takes: length, seconds, peak; or why a row cannot run. Nothing where there is one clip.

    Args:
        plans: of every segment, the form's own first.
        before: frames of the clip that is continued, 0 for none.
    """
    if error:
        return el("div", error, cls="td-note warn", role="status")
    if len(plans) < 2:
        return Html("")
    frames = before + sum(plan.request.num_frames for plan in plans) - (len(plans) - (0 if before else 1))
    fps = plans[0].request.fps
    whole = words(
        "storyboard.sum", n=len(plans), frames=words("unit.frames", n=frames), time=words.seconds(frames / fps),
        took=words.predicted(sum(plan.seconds for plan in plans)), peak=words.gib(max(p.peak_bytes for p in plans)),
    )  # fmt: skip
    each = []
    for plan in plans:
        long, model = words("unit.frames", n=plan.request.num_frames), plan.request.spec.display_name
        each.append(el("li", f"{long} · {words.predicted(plan.seconds)} · {model}"))
    return join(el("p", whole, cls="td-num", role="status"), el("ol", each, cls="td-quiet td-small"))
