// The gallery's keys, ranges and the wipe. The server holds which clips are chosen; here is only where the focus is.
(() => {
  const grid = () => document.getElementById("gallery-grid");
  const tiles = () => [...(grid()?.querySelectorAll(".td-tile") || [])];
  const tileOf = (element) => element?.closest?.("#gallery-grid .td-tile");
  let last = null, focused = null, undo = null; // the last tile that was chosen, the one with the focus, the last deletion

  // Shift and a click on a box: all tiles up to the one chosen before
  document.addEventListener("click", (event) => {
    const tile = event.target.closest?.(".td-check") && tileOf(event.target);
    const batch = event.target.closest?.("#undo");
    if (batch) undo = null;
    if (!tile) return;
    const names = tiles().map((one) => one.dataset.clip);
    const from = names.indexOf(last), to = names.indexOf(tile.dataset.clip);
    last = tile.dataset.clip;
    if (!event.shiftKey || from < 0) return;
    event.stopPropagation();
    event.preventDefault();
    window.tdAct?.("pick_more", names.slice(Math.min(from, to), Math.max(from, to) + 1).join(" "));
  }, true);

  document.addEventListener("focusin", (event) => { const tile = tileOf(event.target); if (tile) focused = tile.dataset.clip; });

  // a drawing anew takes the focus away: give it back to the same clip, or to the one that took its place
  let place = 0;
  new MutationObserver(() => {
    const found = document.getElementById("undo");
    undo = found ? found.dataset.arg : undo;
    if (!focused || document.activeElement !== document.body || !grid()?.offsetParent) return;
    const all = tiles();
    (all.find((tile) => tile.dataset.clip === focused) || all[Math.min(place, all.length - 1)])?.querySelector(".pic").focus({ preventScroll: true });
  }).observe(document.documentElement, { childList: true, subtree: true });

  document.addEventListener("keydown", (event) => {
    const open = grid()?.offsetParent;
    if (!open || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return;
    const all = tiles(), tile = tileOf(event.target), control = event.ctrlKey || event.metaKey;
    const act = (name, argument) => { event.preventDefault(); window.tdAct?.(name, argument); };
    if (control && event.key === "z" && undo) { act("undo_trash", undo); undo = null; return; }
    if (control && event.key === "a" && all.length) return act("pick_more", all.map((one) => one.dataset.clip).join(" "));
    if (control || event.altKey) return;
    const turn = { PageDown: "page-after", PageUp: "page-before" }[event.key];
    if (turn && document.getElementById(turn)) { event.preventDefault(); document.getElementById(turn).click(); return; }
    if (!tile) return;
    const name = tile.dataset.clip;
    place = all.indexOf(tile);
    const columns = Math.max(1, all.filter((one) => one.offsetTop === all[0].offsetTop).length);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -place, End: all.length - 1 - place }[event.key];
    if (step !== undefined) {
      event.preventDefault();
      all[Math.max(0, Math.min(all.length - 1, place + step))].querySelector(".pic").focus();
    } else if (event.key === "x") { last = name; act("pick", name); }
    else if (event.key === "s") act("star", name);
    else if (event.key === "Delete" || event.key === "Backspace") act("trash", grid().querySelector(".td-tile.picked") ? "" : name);
    else if (/^[1-5]$/.test(event.key)) act("rate", `${name} ${event.key}`);
  });

  // the panels draw another clip into the same fields: what was typed for the one before is not said of this one
  new MutationObserver((changes) => changes.forEach(({ target }) => target.querySelectorAll("input, textarea, select").forEach((field) => {
    if (field.options) [...field.options].forEach((option) => { option.selected = option.defaultSelected; });
    else field.value = field.defaultValue;
  }))).observe(document.documentElement, { subtree: true, attributeFilter: ["data-clip"] });

  // the two handles of a trim: the one pushes the other, and the player shows the frame
  document.addEventListener("input", (event) => {
    if (!event.target.matches?.("[data-handle]")) return;
    const [from, to] = event.target.parentElement.querySelectorAll("[data-handle]"), step = +from.step;
    if (+to.value - +from.value < step) event.target === from ? (from.value = +to.value - step) : (to.value = +from.value + step);
    from.parentElement.nextElementSibling.textContent = `${(+from.value).toFixed(2)} – ${(+to.value).toFixed(2)} s`;
    const video = document.querySelector("#side .td-player video");
    if (video) { video.pause(); video.currentTime = event.target === from ? +from.value : Math.max(0, +to.value - step); }
  });

  // the edge between two clips
  document.addEventListener("input", (event) => {
    if (event.target.matches?.(".td-wipe .edge")) event.target.parentElement.style.setProperty("--edge", `${event.target.value}%`);
  });
})();
