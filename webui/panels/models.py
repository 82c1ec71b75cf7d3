"""The models of the System tab: their variants and downloads, the room they take, where they come from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from turbodiff.spec.models import ModelSpec, display_name_of
from turbodiff.spec.numbers import gb
from webui.markup import Html, action, el, join, void
from webui.wording import Words

if TYPE_CHECKING:
    from turbodiff.studio import StoredFile
    from webui.snapshot import Snapshot

MARK_LOOKS = {"fits": "good", "changes": "warn", "no": "bad"}


@dataclass(frozen=True)
class Choice:
    """One variant of a model's files, with what a plan says of it before it is downloaded."""

    name: str  # as a button carries it
    label: str  # "480p int8"
    size: str  # of its networks
    mark: str  # fits, changes or no
    words: str
    suited: bool
    here: bool
    download: str = ""  # "26.4 GB"
    offer: str = ""  # "26.4 GB to checkpoints/, 80 GB free there"; "" where nothing is to be fetched
    enough_room: bool = True
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A model, what is missing of it, and the variants of its files."""

    name: str
    about: str
    here: bool
    missing: tuple[str, ...]
    takes: tuple[str, ...] = ()  # of the networks that are here: which, how they would run, their schedule
    id: str = ""
    choices: tuple[Choice, ...] = ()
    state: str = "absent"  # of its download: absent | running | paused | failed | done
    share: float = 0.0  # of its bytes that are here
    words: str = ""  # how far its download is, or why it failed
    notice: str = ""  # what else there is to say of it
    by_hand: tuple[str, ...] = ()  # of a download that failed: addresses and places
    usage: tuple[str, ...] = ()  # the room it takes: of its own, shared, elsewhere
    delete_ask: str = ""  # the question before its files are deleted; "" where there are none
    moving: bool = False
    move_words: str = ""  # how far its move to another disk is, or was when it stopped
    move_failed: str = ""  # why it failed

    @property
    def best(self) -> Choice | None:
        """What suits this machine and is not here."""
        return next((choice for choice in self.choices if choice.suited and not choice.here), None)


def model_card(spec: ModelSpec, missing: tuple[str, ...], snapshot: Snapshot, words: Words) -> Model:
    """A model as its card shows it."""
    about = words.model(spec)
    found, choices = snapshot.downloads.get(spec.name), list[Choice]()
    for offer in snapshot.offers.get(spec.name, ()):
        precision = words("value.quant_linear_on" if offer.variant.quant else "value.quant_linear_off")
        size, free = gb(offer.nbytes), gb(offer.free_bytes)
        choices.append(
            Choice(
                name=offer.variant.name,
                label=f"{offer.variant.resolution} {precision}".strip(),
                size=gb(offer.network_bytes),
                mark=offer.fit.mark,
                words=words.fit(offer.fit),
                suited=offer.fit.suited,
                here=not offer.files,
                download=size,
                offer=words("system.offer", size=size, folder=offer.folder, free=free, host=offer.host),
                enough_room=offer.free_bytes > offer.nbytes,
                files=tuple(f"{name}  {gb(nbytes)}  {repo}" for name, repo, nbytes in offer.files),
            )
        )
    takes: tuple[str, ...] = ()
    if on_disk := snapshot.installed.get(spec.name):
        takes = (words.takes(on_disk.files, on_disk.fit), *map(words.say, on_disk.reasons))
    model = Model(spec.display_name, about, not missing, missing, takes, spec.name, tuple(choices))
    shown = _with_usage(model, snapshot, words)
    if found is None or found.state in ("absent", "done"):
        return shown
    progress = found.progress
    done, total = gb(progress.done_bytes), gb(progress.total_bytes)
    told = {
        "running": words.download(progress),
        "paused": words("download.paused", done=done, total=total),
        "failed": words.error(found.error),
    }
    return replace(
        shown,
        state=found.state,
        share=progress.done_bytes / progress.total_bytes if progress.total_bytes else 0.0,
        words=told[found.state],
        notice=words.download_notice(progress),
        by_hand=tuple(filter(None, found.error.get("expected", "").split("; "))) if found.state == "failed" else (),
    )


def _with_usage(model: Model, snapshot: Snapshot, words: Words) -> Model:
    """The room that a model's files take, and what deleting them would remove."""
    files, move = snapshot.stored.get(model.id, ()), snapshot.moves.get(model.id)
    if not files:
        return model

    def told(key: str, rows: list[StoredFile], **more: str) -> str:
        names = ", ".join(file.path.name for file in rows)
        return words(f"system.usage_{key}", size=gb(sum(file.nbytes for file in rows)), names=names, **more)

    own = [file for file in files if not file.keep]
    size = gb(sum(file.nbytes for file in own if file.moved or not file.link_to))  # of another's link the link alone
    alone = [file.nbytes for file in own if not file.shared_with and (file.moved or not file.link_to)]
    lines = [words("system.usage", own=gb(sum(alone)))]
    shared = [file for file in files if file.shared_with and file.keep != "outside"]
    users = sorted({display_name_of(name) for file in shared for name in file.shared_with})
    lines += [told("shared", shared, models=", ".join(users))] if shared else []
    outside = [file for file in files if file.keep == "outside"]
    lines += [told("outside", outside)] if outside else []
    places = dict.fromkeys(str(file.link_to.parent) for file in files if file.link_to)
    lines += [words("system.usage_links", places=", ".join(places))] if places else []
    names = ", ".join(str(file.link_to) if file.moved else file.path.name for file in own)
    ask = words("system.delete_ask", size=size, model=model.name, names=names) if own else ""
    shown = replace(model, usage=tuple(lines), delete_ask=ask, moving=bool(move and move.running))
    if move is None or (not move.error and move.done_bytes == move.total_bytes):
        return shown
    if move.error:
        return replace(shown, move_failed=words.error(move.error))
    done, total = gb(move.done_bytes), gb(move.total_bytes)
    key = "system.moving_at" if move.running else "system.move_stopped"
    return replace(shown, move_words=words(key, done=done, total=total, name=move.name))


def draw_model(model: Model, main: bool, words: Words) -> Html:
    """A model with its variants, a button for each that is not here; what is missing of it by name."""
    state, cls = ("system.here", "td-pill good") if model.here else ("system.missing", "td-pill")
    pill = el("span", words(state), cls=cls)
    rows = []
    for choice in model.choices:
        what = el("span", el("b", choice.label), f" · {choice.size}", cls="td-num")
        if choice.suited and choice.mark != "no":
            what = join([what, el("span", words("fit.suited"), cls="td-pill accent")])
        fit = el("span", choice.words, cls=f"td-pill {MARK_LOOKS[choice.mark]}", data_mark=choice.mark)
        get: Html | None = el("span", words("fit.here"), cls="td-pill good")
        if not choice.here:
            label = words("system.download_size", size=choice.download)
            get = _download(model, choice, label, main and choice is model.best and choice.mark != "no", words)
        rows.append(
            el("div", el("div", what, cls="what"), fit, get, cls="td-line td-variant", data_variant=choice.name)
        )
    files = dict.fromkeys(line for choice in model.choices for line in choice.files)
    offer = el("span", model.best.offer, cls="td-quiet") if model.best and model.best.mark != "no" else None
    return el(
        "div",
        el("div", el("h3", model.name), pill, cls="td-line"),
        el("p", model.about, cls="td-quiet", style="margin:0"),
        [el("div", line, cls="td-quiet td-small td-takes") for line in model.takes] or None,
        el("div", rows) if rows else None,
        offer,
        _progress(model, words),
        _stored(model, words),
        _files(words("system.missing_list"), tuple(files) or model.missing),
        cls="td-card",
        data_model=model.name,
    )


def draw_best(best: Model | None, words: Words) -> Html | None:
    """One button for what this card runs best."""
    choice = best.best if best is not None else None
    if best is None or choice is None or choice.mark == "no":
        return None
    name = f"{best.name} {choice.label}"
    told = (choice.words, choice.offer, words("system.best_more"))
    lines = [el("div", line, cls="td-quiet") for line in told]
    what = el("div", el("h3", words("system.best", model=name)), lines)
    get = _download(best, choice, words("system.download_best"), True, words)
    progress, by_hand = _progress(best, words), _files(words("system.manual"), choice.files)
    return el("div", el("div", what, get, cls="td-line"), progress, by_hand, cls="td-card", id="best-download")


def _download(model: Model, choice: Choice, label: str, main: bool, words: Words) -> Html:
    """The button that fetches a variant, or why it cannot."""
    if not choice.enough_room:
        return el("span", words("system.no_room"), cls="td-pill bad")
    return action(
        "download",
        f"{model.id} {choice.name}",
        label,
        cls="main" if main else "",
        disabled=model.state in ("running", "paused"),
    )


def _progress(model: Model, words: Words) -> Html | None:
    """How far the download of a model is, or why it failed, with the buttons that pause, resume and give it up."""
    if model.state not in ("running", "paused", "failed"):
        return None
    resume = action("download", model.id, words("system.resume"), cls="main")
    pause = action("pause_download", model.id, words("system.pause"))
    ask = words("system.cancel_ask", model=model.name)
    cancel = action("cancel_download", model.id, words("system.cancel"), cls="plain", data_ask=ask)
    percent = f"{model.share:.0%}"
    bar = el("progress", percent, value=f"{model.share:.4f}", max=1, aria_label=model.name)
    if model.state == "failed":
        told = el("div", model.words, cls="td-note warn", role="alert")
    else:
        told = el("span", model.words, cls="td-quiet")
    notice = el("div", model.notice, cls="td-note calm") if model.notice else None
    buttons = el("span", pause if model.state == "running" else resume, cancel, cls="td-acts")
    line = el("div", bar, el("b", percent), buttons, cls="td-line")
    by_hand = _files(words("system.manual"), model.by_hand)
    return el("div", line, told, notice, by_hand, cls="td-download", data_state=model.state)


def _stored(model: Model, words: Words) -> Html | None:
    """The room that a model takes, with the buttons that delete and move its files."""
    if not model.usage:
        return None
    delete = action(
        "delete_model", model.id, words("system.delete"), cls="plain", data_ask=model.delete_ask, disabled=model.moving
    )
    label = words("system.moving" if model.moving else "system.move")
    move = action("move", model.id, label, cls="plain", data_from="move-folder", disabled=model.moving)
    lines = [el("div", line) for line in model.usage]
    buttons = el("span", move, delete, cls="td-acts") if model.delete_ask else None
    last = el("div", model.move_words, cls="td-quiet", role="status") if model.move_words else None
    if model.move_failed:
        last = el("div", model.move_failed, cls="td-note warn", role="alert")
    return join(el("div", el("div", lines, cls="td-quiet"), buttons, cls="td-line"), last)


def draw_source(mirror: str, words: Words) -> Html:
    """The field for a mirror: apart from the rest, which is drawn anew while a download runs and a person types."""
    field_id, label = "mirror", words("system.mirror")
    hint = words("system.mirror_hint")
    box = void("input", type="url", id=field_id, value=mirror, placeholder=hint, aria_label=label, cls="td-input")
    save = action("mirror", "", words("system.mirror_save"), data_from=field_id)
    about = el("p", words("system.mirror_text"), cls="td-quiet")
    source = section(label, (el("div", box, save, cls="td-line"), about))
    label, hint = words("system.move_to"), words("system.move_hint")
    folder = void("input", type="text", id="move-folder", placeholder=hint, aria_label=label, cls="td-input")
    about = el("p", words("system.move_text"), cls="td-quiet")
    return el("div", source, section(label, (el("div", folder, cls="td-line"), about)), cls="td-html td-narrow")


def _files(summary: str, lines: tuple[str, ...]) -> Html | None:
    listed = [el("li", el("code", line)) for line in lines]
    return el("details", el("summary", summary), el("ul", listed)) if listed else None


def section(head: str, body: object, acts: object = "") -> Html:
    """A part of the tab below its head; `acts` are buttons beside it."""
    return el("section", el("div", head, el("span", acts, cls="td-acts"), cls="td-sec"), body)
