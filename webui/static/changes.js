// The server says when there is something else to draw (webui/changes.py); the page asks for it then, while it is seen.
(() => {
  const base = document.querySelector("meta[name=turbodiff-root]")?.content ?? "";
  const WHOLE_MS = 9000; // what the clip of the form would take is a dear question
  const SILENT_MS = 40000, LOST_MS = 3000, AGAIN_MS = 5000;
  let source = null, opened = 0, heard = 0, lost = 0, asked = 0, whole = Date.now(), later = 0;

  const ask = (what) => {
    if (!window.tdLook) return void setTimeout(ask, 200, what); // the page is being built
    if (what === "whole") { clearTimeout(later); later = 0; whole = Date.now(); }
    window.tdLook(what);
  };
  const draw = () => {
    dispatchEvent(new Event("turbodiff.changed"));
    const wait = whole + WHOLE_MS - Date.now();
    if (wait <= 0) return ask("whole");
    ask("look");
    later ||= setTimeout(ask, wait, "whole");
  };
  // an answer that was on its way while the form changed may tell of the form as it was
  for (const name of ["click", "input"]) addEventListener(name, () => { if (source) later ||= setTimeout(ask, WHOLE_MS, "whole"); });
  const close = () => { source?.close(); source = null; clearTimeout(later); later = lost = 0; };
  const open = () => {
    source?.close();
    opened = heard = Date.now();
    source = new EventSource(`${base}/changes`);
    source.onopen = () => { lost = 0; document.getElementById("offline")?.setAttribute("hidden", ""); };
    source.onmessage = ({ data }) => { heard = Date.now(); if (data === "look") draw(); else if (data === "whole") ask(data); };
    source.onerror = () => { lost ||= Date.now(); };
  };
  // a lost server is said, and that it comes back; who has to log in again is told by the login page
  const say = async () => {
    const note = document.getElementById("offline");
    asked = Date.now();
    if (note) try { note.hidden = (await fetch(`${base}/healthz`, { cache: "no-store" })).ok; } catch { note.hidden = !lost; }
  };
  const check = () => {
    const now = Date.now();
    if (document.hidden) return close();
    if (!source) return open();
    if (lost && now - lost > LOST_MS && now - asked > AGAIN_MS) say();
    const dead = source.readyState === EventSource.CLOSED || now - heard > SILENT_MS;
    if (dead && now - opened > AGAIN_MS) open();
  };
  for (const name of ["load", "online"]) addEventListener(name, open);
  document.addEventListener("visibilitychange", check);
  setInterval(check, 1000);
})();
