"""What a click in the gallery does: choose, compare, star, tag, delete, bring back."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from turbodiff.spec.exports import make_export
from turbodiff.studio import tags_of
from webui.actions import Answer, UiState, number_of, object_of, wished_again
from webui.panels import gallery
from webui.proxies import ASKING
from webui.snapshot import no_such_clip
from webui.wording import Words

if TYPE_CHECKING:
    from webui.snapshot import StudioReader

MAX_PICKED = 10_000


def act(reader: StudioReader, name: str, argument: str, ui_state: UiState, words: Words) -> Answer | None:
    """What a button of the gallery does; None for one that is not of it.

    Raises:
        TurbodiffError: it cannot be done, in the person's words.
    """
    index, picked = reader.studio.clip_index, ui_state.get("picked", "").split()
    at, left = ui_state.get("at", ""), ui_state.get("left", "").split()
    if name in TURNS:  # what this browser looks at, nothing of the library
        return {**ui_state, **_turned(reader, name, argument, ui_state)}, ""
    targets = [argument] if argument else picked
    sentence = ""
    match name:
        case "versus" if len(picked) <= gallery.SEEDS_COMPARED:
            shown = [one.id for one in map(reader.clip_called, picked)] or [at]
            return {**ui_state, "left": " ".join(shown[:-1]), "at": shown[-1], "picked": ""}, ""
        case "seeds":
            same, missing = _compared_seeds(reader, argument)
            sentence = words("gallery.seeds_queued", n=missing) if missing else ""
            ui_state = {**ui_state, "at": argument, "left": " ".join(same)}
        case "export":
            asked = object_of(argument)
            clip = reader.clip_called(str(asked.pop("arg", "")))
            reader.studio.exports.start(clip.path, make_export(asked))
            sentence = words("export.begun")
        case "star":
            entry = index.entry(argument)
            if not index.edit(targets, starred=not (entry and entry.starred)):
                raise no_such_clip(argument)
        case "star_all":
            starred = [entry.starred for entry in map(index.entry, picked) if entry]
            sentence = words("gallery.changed", n=index.edit(picked, starred=not all(starred)))
        case "tags":  # "CLIP TAGS"
            clip_name, _, typed = argument.partition(" ")
            if not index.edit([clip_name], tags=tags_of(typed)):
                raise no_such_clip(clip_name)
            sentence = words("clip.saved")
        case "tag_all":
            found = [entry for entry in map(index.entry, picked) if entry]
            done = [index.edit([one.name], tags=tags_of(" ".join((*one.tags, argument)))) for one in found]
            sentence = words("gallery.changed", n=sum(done))
        case "trash" if targets:
            batch = index.delete(targets)
            deleted = words("gallery.deleted", n=len(targets)) if batch else words("gallery.nothing")
            kept = [one for one in left if one not in targets]
            ui_state = {**ui_state, "picked": "", "left": " ".join(kept), "at": "" if at in targets else at}
            sentence = gallery.draw_undo(deleted, batch, words) if batch else deleted
        case "undo_trash" | "restore":
            restored = index.restore(picked, argument if name == "undo_trash" else "")
            ui_state, sentence = {**ui_state, "picked": ""}, words("gallery.restored", n=restored)
        case "erase":
            sentence, ui_state = words("gallery.erased", n=index.erase(picked)), {**ui_state, "picked": ""}
        case _:
            return None
    reader.changed(clips=True)
    return ui_state, sentence


def _compared_seeds(reader: StudioReader, name: str) -> tuple[list[str], int]:
    """The clips that differ from one in the seed alone, three at most, and how many were missing and are now queued."""
    clip, found = reader.clip_called(name), reader.studio.clip_index.same_but_seed(name)
    missing = gallery.SEEDS_COMPARED - max(1, min(gallery.SEEDS_COMPARED, len(found)))
    if missing:
        request, seed = wished_again(reader, name), int(clip.request.seed or 0)
        used = {entry.seed for entry in found} | {seed}
        fresh = [seed + step for step in range(1, 2 * gallery.SEEDS_COMPARED) if seed + step not in used]
        many = [{**request, "seed": one, "nonce": secrets.token_hex(16)} for one in fresh[:missing]]
        reader.studio.submit_all(many, client=ASKING.get())
    return [entry.name for entry in found[1 : gallery.SEEDS_COMPARED]], missing


TURNS = {"pick", "pick_more", "pick_all", "pick_none", "page", "compare", "stop_compare", "wipe"}


def _turned(reader: StudioReader, name: str, argument: str, ui_state: UiState) -> dict[str, str]:
    """What changes of a browser's state when it only looks elsewhere."""
    picked = dict.fromkeys(ui_state.get("picked", "").split())
    match name:
        case "pick":
            kept = [one for one in picked if one != argument]
            return {"picked": " ".join(kept if argument in picked else [*picked, argument])}
        case "pick_more":  # a range of tiles: what is between two clicks
            return {"picked": " ".join(list({**picked, **dict.fromkeys(argument.split())})[:MAX_PICKED])}
        case "pick_all":
            find, only, order = (ui_state.get(key, "") for key in ("find", "only", "order"))
            found = reader.studio.clip_index.find(find, only, order, MAX_PICKED)
            return {"picked": " ".join(entry.name for entry in found.entries)}
        case "pick_none":
            return {"picked": ""}
        case "page":
            return {"page": str(number_of(argument))}
        case "wipe":
            return {"wipe": "1" if argument else ""}
        case "compare":
            return {"left": " ".join(argument.split()[: gallery.SEEDS_COMPARED - 1])}
    return {"left": "", "wipe": ""}
