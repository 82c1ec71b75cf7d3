// Keys, the theme, and the buttons that the panels draw themselves: [data-act] acts on the studio, [data-form] on the form.
(() => {
  const root = document.documentElement;
  const base = document.querySelector("meta[name=turbodiff-root]")?.content ?? ""; // a reverse proxy's prefix
  const night = () => localStorage.getItem("turbodiff.theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const paint = () => document.body && document.body.classList.toggle("dark", night() === "dark");
  document.addEventListener("DOMContentLoaded", paint);
  window.addEventListener("load", () => {
    document.body.classList.toggle("gotit", localStorage.getItem("turbodiff.gotit") === "1"); paint(); setTimeout(paint, 300); });
  const REFILLS = ["example", "preset", "reuse", "edit", "animate", "continue", "use_seed"]; // another prompt: it is shown
  const COMPARES = ["compare", "versus", "seeds"]; // what they open is above the clips
  const STARTS = ["knob", "neighbour", "retry", "retry_smaller"]; // what they start is shown on the first tab
  const word = (name) => (document.getElementById("words") || {dataset: {}}).dataset[name] || "";

  // focus goes into what opens, and back to where it was when that closes
  let before = null;
  const turn = (open, inside, opener) => {
    if (open) { before = document.activeElement; document.querySelector(inside)?.focus(); return; }
    (before?.isConnected && before !== document.body ? before : document.querySelector(opener))?.focus();
  };
  const isNarrow = () => innerWidth <= 1000; // page.css puts the stage below the form there
  const soon = (selector, act, left = 30) => {
    const found = document.querySelector(selector);
    if (found) act(found); else if (left) setTimeout(() => soon(selector, act, left - 1), 100);
  };

  // the storyboard's rows, as the form's hidden field has them
  const keepSegments = () => {
    const rows = [...document.querySelectorAll("#segments .td-segment")], kept = document.querySelector("#storyboard textarea, #storyboard input");
    rows.forEach((row, place) => { row.querySelector("b").textContent = place + 2; });
    kept.value = JSON.stringify(rows.map((row) => [...row.querySelectorAll(".td-input")].map((field) => field.value)));
    kept.dispatchEvent(new Event("input", { bubbles: true }));
  };
  document.addEventListener("input", (event) => { if (event.target.closest?.("#segments")) keepSegments(); });

  const actions = {
    theme() { localStorage.setItem("turbodiff.theme", night() === "dark" ? "light" : "dark"); paint(); },
    lang(code) { document.cookie = `turbodiff_lang=${code};path=/;max-age=31536000;samesite=lax`; location.href = base + (code === "zh" ? "/zh/" : "/") + location.search; },
    copy(text, button) { navigator.clipboard?.writeText(text); button.dataset.was ??= button.textContent; button.textContent = word("copied"); setTimeout(() => button.textContent = button.dataset.was, 1200); },
    copylog(_, button) { actions.copy([...document.querySelectorAll("#log .td-log > div")].filter(e => e.offsetParent).map(e => e.textContent).join("\n"), button); },
    tab(number) { document.querySelectorAll("#tabs [role=tab], #tabs .overflow-dropdown button")[+number]?.click(); scrollTo({top: 0}); },
    gotit() { localStorage.setItem("turbodiff.gotit", "1"); document.body.classList.add("gotit"); },
    level(name, button) {
      document.getElementById("log").classList.remove("warnings", "errors");
      if (name !== "all") document.getElementById("log").classList.add(name);
      button.parentElement.querySelectorAll("[data-do=level]").forEach((b) => b.classList.toggle("on", b === button));
    },
    aid() {
      const open = document.getElementById("aid").classList.toggle("open");
      if (open) scrollTo({top: 0});
      turn(open, "#aid [data-do=aid]", "#bar [data-do=aid]");
    },
    prompt() { document.querySelector("#prompt textarea")?.focus(); },
    press(id) { document.getElementById(id)?.click(); },
    help() {
      const box = document.getElementById("help");
      box.hidden = !box.hidden;
      turn(!box.hidden, "#help button", "#bar [data-do=help]");
    },
    wish(what) { window.tdWish?.(what); },
    pause() { players().forEach((video) => video.pause()); },
    addsegment() {
      const last = [...document.querySelectorAll("#segments .td-segment")].pop(), next = last.cloneNode(true);
      next.querySelectorAll(".td-input").forEach((field) => { field.value = ""; });
      last.after(next);
      keepSegments();
      next.querySelector("textarea").focus();
    },
    dropsegment(_, button) {
      const row = button.closest(".td-segment");
      if (row.parentElement.querySelectorAll(".td-segment").length > 1) row.remove();
      else row.querySelectorAll(".td-input").forEach((field) => { field.value = ""; });
      keepSegments();
    },
    play() { players().forEach((video) => { place(video, 0); run(video); }); },
  };

  // the player that shows the clip of a card: beside it in the gallery, above it on the first tab
  const clipVideo = (button) => (button.closest("#side") || document).querySelector(".td-player video:not(.sync)");

  // clips in sync: what is done to one player is done to all. While they play nobody runs away from the slowest; a short
  // clip waits at its end for the longest, and then all begin again. What an event tells may be past when it comes
  const APART_S = 0.12, EVEN_MS = 1000;
  const players = () => [...document.querySelectorAll("video.sync")];
  const over = (video) => video.currentTime >= video.duration;
  const placed = new WeakMap(); // player -> where it was put from here, which is no wish of the person
  let evened = 0;
  const place = (video, time, apart = 0.001) => {
    const goal = Math.min(time, video.duration || time);
    if (Math.abs(video.currentTime - goal) > apart) { placed.set(video, goal); video.currentTime = goal; }
  };
  const run = (video) => { if (video.paused && !over(video)) video.play().catch(() => {}); }; // or it was paused meanwhile
  const together = {
    play(video, all) { if (!video.paused) all.forEach((one) => { place(one, video.currentTime, APART_S); run(one); }); },
    pause(video, all) { if (video.paused && !over(video)) all.forEach((one) => { one.pause(); place(one, video.currentTime); }); },
    seeked(video, all) {
      const goal = placed.get(video), playing = all.some((one) => !one.paused);
      placed.delete(video);
      if (Math.abs(video.currentTime - goal) > APART_S || goal === undefined) all.forEach((one) => place(one, video.currentTime));
      if (playing) all.forEach(run);
    },
    ended(_, all) { if (all.every(over)) all.forEach((one) => { place(one, 0); run(one); }); },
    timeupdate(_, all) {
      const playing = all.filter((one) => !one.paused && !one.seeking), slowest = Math.min(...playing.map((one) => one.currentTime));
      if (Date.now() - evened < EVEN_MS) return;
      evened = Date.now();
      playing.forEach((one) => place(one, slowest, APART_S));
    },
  };
  for (const [name, act] of Object.entries(together)) document.addEventListener(name, ({ target }) => {
    if (target.matches?.("video.sync")) act(target, players());
  }, true);

  // what went well is said for five to ten seconds
  setInterval(() => document.querySelectorAll("#note .td-note.good").forEach((old) => { if (old.dataset.read) old.hidden = true; old.dataset.read = "1"; }), 5000);

  document.addEventListener("mouseover", (event) => {
    const box = event.target.closest?.("#seed");
    if (box && !box.title) box.title = word("seed");
  });

  // fields that the panels draw themselves
  document.addEventListener("change", (event) => {
    const { change, name, key } = event.target.dataset ?? {};
    if (!change) return;
    const value = event.target.type === "checkbox" ? event.target.checked : ["number", "range"].includes(event.target.type) ? +event.target.value : event.target.value;
    window.tdForm?.(change, JSON.stringify({ name, [key]: value }));
  });

  const BUTTONS = "[data-do],[data-act],[data-form]";
  const same = (one, other) => ["do", "act", "form", "arg"].every((name) => one.dataset[name] === other.dataset[name]);
  const STILL = 10; // pixels that a hand moves while it presses
  const press = (button) => {
    const { do: local, act, form, arg, ask } = button.dataset;
    if (local) return actions[local](arg, button);
    if (ask && !confirm(ask)) return;
    let value = arg ?? "";
    if (button.hasAttribute("data-time")) value += " " + (clipVideo(button)?.currentTime ?? "");
    if (button.dataset.gather) { // the fields of a box, by their names
      const fields = [...document.getElementById(button.dataset.gather).querySelectorAll("[name]")];
      value = JSON.stringify(Object.fromEntries([["arg", arg], ...fields.map((field) => [field.name, /range|select/.test(field.type) && !isNaN(field.value) ? +field.value : field.value])]));
    }
    if (button.dataset.from) value += " " + (document.getElementById(button.dataset.from)?.value ?? "");
    (act ? window.tdAct : window.tdForm)?.(act || form, value);
    if (button.dataset.tab) actions.tab(button.dataset.tab);
    if ((form || STARTS.includes(act)) && !button.closest("#create")) actions.tab(0);
    if (REFILLS.includes(form) && !button.closest(".td-examples") || form && button.closest("#card")) {
      scrollTo({ top: 0 });
      // after the tab has changed; on a phone its keyboard would cover what was filled in
      if (!isNarrow()) setTimeout(() => document.querySelector("#prompt textarea")?.focus({ preventScroll: true }), 200);
    }
    if (COMPARES.includes(act)) scrollTo({ top: 0 });
  };

  document.addEventListener("click", (event) => {
    if (event.target.closest("#go, #anyway")) {
      // once more when what it shows has come and made the page long enough
      if (isNarrow()) [0, 1200].forEach((ms) => setTimeout(() => document.getElementById("stage").scrollIntoView({ block: "start" }), ms));
      soon("#ask button", (first) => first.focus());
    }
    if (event.target.closest("#tabs [role=tab]")) document.querySelectorAll("#note .td-note").forEach((old) => { old.hidden = true; });
    if (event.target.closest("#gallery-grid .pic")) {
      document.getElementById("gallery").classList.add("opened");
      if (isNarrow()) document.getElementById("gallery-side").scrollIntoView({ block: "start" });
    }
    const button = event.target.closest(BUTTONS);
    if (button) press(button); else if (event.target.id === "help") actions.help();
  });

  // a list that is redrawn while a button of it is held down: the browser then reports no click at all, neither on the
  // button that is gone nor on the one that lies there now. What was pressed counts, if it is still offered
  let held = null;
  document.addEventListener("pointerdown", (event) => {
    const button = event.button ? null : event.target.closest?.(BUTTONS);
    held = button && { button, x: event.clientX, y: event.clientY };
  }, true);
  document.addEventListener("pointerup", (event) => {
    const was = held;
    held = null;
    if (!was || was.button.isConnected || Math.hypot(event.clientX - was.x, event.clientY - was.y) > STILL) return;
    const again = [...document.querySelectorAll(BUTTONS)].find((one) => same(one, was.button) && !one.disabled);
    if (again) press(again);
  }, true);

  // on a narrow page the opened clip is above the others: who searches or filters then sees what is found
  document.addEventListener("focusin", (event) => { if (event.target.closest?.("#shelf")) document.getElementById("gallery").classList.remove("opened"); });

  // what a note objects to may be gone with the next change of the form
  document.addEventListener("input", (event) => {
    if (event.target.closest?.("#form")) document.querySelectorAll("#note .td-note.warn").forEach((old) => { old.hidden = true; });
  });

  // a list that Escape has closed opens again at a click: Gradio's opens on focus, which it still has
  document.addEventListener("mousedown", (event) => {
    if (event.target.matches?.("#model input") && event.target === document.activeElement && !document.querySelector("ul[role=listbox]")) event.target.blur();
  });

  // one stop of the Tab key for each group of choices, arrow keys inside it
  const members = (target) => {
    const group = target.closest?.("#form fieldset, .td-examples");
    return group ? [...group.querySelectorAll("input[type=radio], .td-btn")].filter((part) => part.closest("label, .td-btn").offsetParent) : [];
  };
  const oneStop = () => document.querySelectorAll("#form fieldset").forEach((group) => {
    const radios = [...group.querySelectorAll("input[type=radio]")];
    const stop = radios.find((radio) => radio.checked) || radios[0];
    radios.forEach((radio) => { radio.tabIndex = radio === stop ? 0 : -1; });
  });
  document.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Tab") oneStop();
    if (event.key === "Tab" && document.getElementById("help")?.hidden === false) { event.preventDefault(); document.querySelector("#help button").focus(); }
    const group = step && (event.target.type === "radio" || event.target.closest?.(".td-examples")) ? members(event.target) : [];
    if (group.length < 2) return;
    event.preventDefault();
    const next = group[(group.indexOf(event.target) + step + group.length) % group.length];
    group.forEach((part) => { part.tabIndex = part === next ? 0 : -1; });
    next.focus();
    if (next.type === "radio") next.click();
  });

  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
    const save = event.key === "Enter" && !event.isComposing && event.target.matches?.("input.td-input[id]") && event.target.parentElement.querySelector(`:scope > button[data-from="${event.target.id}"]`);
    if (save) { event.preventDefault(); save.click(); }
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); document.getElementById("go")?.click(); }
    else if (event.key === "?" && !typing) actions.help();
    else if (event.key === "Escape" && document.getElementById("help")?.hidden === false) actions.help();
    else if (event.key === "/" && !typing) { event.preventDefault(); document.querySelector("#prompt textarea")?.focus(); }
  });
})();
