// Knowing when it is done: the tab's title with percent, and for who asked for it a sound and a notification.
// While the page is seen the title follows the progress that it shows; hidden, a small file tells, while something runs.
(() => {
  const base = document.querySelector("meta[name=turbodiff-root]")?.content ?? "", plain = "turbodiff";
  const word = (name) => (document.getElementById("words") || { dataset: {} }).dataset[name] || "";
  const wants = (what) => localStorage.getItem(`turbodiff.${what}`) === "1";
  let watching = false, due = false, known = null, turn = 0;

  const ring = () => {
    const context = new AudioContext(), at = context.currentTime;
    [660, 880].forEach((hertz, number) => {
      const tone = new OscillatorNode(context, { frequency: hertz }), volume = new GainNode(context, { gain: 0.12 });
      volume.gain.setTargetAtTime(0, at + 0.14 * number + 0.08, 0.05);
      tone.connect(volume).connect(context.destination);
      tone.start(at + 0.14 * number); tone.stop(at + 0.14 * number + 0.4);
    });
    setTimeout(() => context.close(), 1500);
  };
  const announce = (job, state) => {
    document.title = `${state === "done" ? "✓" : "✕"} ${plain}`;
    if (wants("sound")) ring();
    if (wants("notify") && document.hidden && window.Notification?.permission === "granted") {
      const said = new Notification(plain, { body: word(state === "done" ? "done" : "failed").replace("0", job), tag: `job${job}` });
      said.onclick = () => { focus(); said.close(); };
    }
  };
  const look = async () => {
    let now;
    due = false;
    try { now = await (await fetch(`${base}/progress.json`, { cache: "no-store" })).json(); } catch { due = true; return; }
    const before = known;
    known = now.ended;
    watching = now.active !== null || now.waiting > 0;
    if (now.active !== null) document.title = `${now.percent} % · ${plain}`;
    const fresh = before ? Object.keys(now.ended).filter((job) => !(job in before)) : [];
    fresh.filter((job) => now.ended[job] !== "cancelled").slice(-1).forEach((job) => announce(job, now.ended[job]));
    if (!watching && !fresh.length && /%/.test(document.title)) document.title = plain;
  };
  setInterval(() => {
    turn += 1;
    document.querySelectorAll("[data-wish]").forEach((button) => {
      button.classList.toggle("on", wants(button.dataset.wish));
      button.setAttribute("aria-pressed", wants(button.dataset.wish));
    });
    if (document.hidden) { if (watching && turn % 5 === 0) look(); return; }
    const bar = document.querySelector("#progress [role=progressbar]");
    if (bar) {
      document.title = `${bar.getAttribute("aria-valuenow")} % · ${plain}`;
      if (!watching) { watching = true; look(); }
      due = true; // once it is gone
    } else if (watching && due) look();
  }, 1000);
  addEventListener("turbodiff.changed", () => { due = true; });
  addEventListener("focus", () => { if (/^[✓✕]/.test(document.title)) document.title = plain; });

  window.tdWish = async (what) => {
    const on = !wants(what);
    if (on && what === "notify" && (await window.Notification?.requestPermission()) !== "granted") return alert(word("refused"));
    localStorage.setItem(`turbodiff.${what}`, on ? "1" : "0");
    if (on && what === "sound") ring();
  };
})();
