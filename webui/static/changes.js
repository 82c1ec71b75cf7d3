// The server says when there is something else to draw (webui/changes.py); the page asks for it then, while it is seen.
// A browser opens six connections to a host (HTTP/1.1), so one window of a browser listens and tells the others.
(() => {
  const base = document.querySelector("meta[name=turbodiff-root]")?.content ?? "";
  const WHOLE_MS = 9000; // what the clip of the form would take is a dear question
  const SILENT_MS = 40000, LOST_MS = 3000, AGAIN_MS = 5000, GONE_MS = 3500, GREET_MS = 250;
  const own = `${Date.now()} ${Math.random()}`; // not crypto.randomUUID: a page over plain HTTP has none
  const windows = new BroadcastChannel(`turbodiff.changes ${base}`);
  let source = null, opened = 0, heard = 0, lost = 0, asked = 0, whole = Date.now(), later = 0;
  let other = -Infinity; // when the window that listens was last heard of

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
  const told = (data) => { if (data === "look") draw(); else if (data === "whole") ask(data); };
  const fine = () => { lost = 0; document.getElementById("offline")?.setAttribute("hidden", ""); };
  // an answer that was on its way while the form changed may tell of the form as it was
  for (const name of ["click", "input"]) addEventListener(name, () => { if (!document.hidden) later ||= setTimeout(ask, WHOLE_MS, "whole"); });
  const tell = (data) => windows.postMessage({ own, data, lost });
  const close = () => { source?.close(); source = null; };
  const leave = () => { if (source) { close(); tell("bye"); } clearTimeout(later); later = lost = 0; };
  const open = () => {
    close();
    opened = heard = Date.now();
    source = new EventSource(`${base}/changes`);
    tell("here");
    source.onopen = () => { fine(); tell("open"); };
    source.onmessage = ({ data }) => { heard = Date.now(); tell(data); told(data); };
    source.onerror = () => { lost ||= Date.now(); };
  };
  windows.onmessage = ({ data: { own: from, data, lost: since } }) => {
    if (data === "who") return void (source && tell("here"));
    if (data === "bye") { other = -Infinity; return check(); }
    if (source && from > own) return tell("here"); // two listen: the older one goes on
    close();
    other = Date.now();
    if (document.hidden) return;
    if (since) lost ||= since; else fine();
    told(data);
  };
  // a lost server is said, and that it comes back; who has to log in again is told by the login page
  const say = async () => {
    const note = document.getElementById("offline");
    asked = Date.now();
    if (note) try { note.hidden = (await fetch(`${base}/healthz`, { cache: "no-store" })).ok; } catch { note.hidden = !lost; }
  };
  const check = () => {
    const now = Date.now();
    if (document.hidden) return leave();
    if (lost && now - lost > LOST_MS && now - asked > AGAIN_MS) say();
    if (!source) return void (now - other > GONE_MS && open());
    tell("here");
    const dead = source.readyState === EventSource.CLOSED || now - heard > SILENT_MS;
    if (dead && now - opened > AGAIN_MS) open();
  };
  // the others are asked first; none answers where this window is the only one
  const begin = () => { other = Date.now() - GONE_MS + GREET_MS; windows.postMessage({ own, data: "who" }); setTimeout(check, GREET_MS + 10); };
  addEventListener("load", begin);
  addEventListener("online", () => { if (source) open(); });
  addEventListener("pagehide", leave);
  addEventListener("pageshow", ({ persisted }) => { if (persisted) { begin(); draw(); } });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) return leave();
    begin();
    draw(); // what was told meanwhile
  });
  setInterval(check, 1000);
})();
