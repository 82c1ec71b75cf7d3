// The queue's rows: a job is dragged to another place, and the focus stays on its button when the list is drawn anew.
(() => {
  const list = () => document.getElementById("queue-list");
  const rowOf = (target) => target.closest?.("#queue-list [data-state=queued]");
  let dragged = null, held = null; // the job that is dragged; the button that has the focus: job, action

  // by the pointer, not as the browser's own drag: that ends, or never begins, where the list is drawn anew under it
  const DRAGS_PX = 5; // from where it was pressed
  const unmark = () => document.querySelectorAll("#queue-list .over").forEach((row) => row.classList.remove("over"));
  document.addEventListener("pointerdown", (event) => {
    const row = !event.button && event.pointerType !== "touch" && !event.target.closest?.("button, a") && rowOf(event.target);
    dragged = row ? { job: row.dataset.job, x: event.clientX, y: event.clientY } : null;
  });
  const isDragged = (event) => dragged && Math.hypot(event.clientX - dragged.x, event.clientY - dragged.y) > DRAGS_PX;
  document.addEventListener("pointermove", (event) => {
    if (!isDragged(event)) return;
    unmark();
    rowOf(event.target)?.classList.add("over");
  });
  document.addEventListener("pointerup", (event) => {
    const row = isDragged(event) && rowOf(event.target), job = dragged?.job;
    dragged = null;
    unmark();
    if (!row || row.dataset.job === job) return;
    const rows = [...document.querySelectorAll("#queue-list [data-state=queued]")].map((one) => one.dataset.job);
    // downwards it takes the place of the one it is dropped on, as upwards: before the one after that
    const down = rows.indexOf(job) < rows.indexOf(row.dataset.job);
    const before = down ? rows[rows.indexOf(row.dataset.job) + 1] ?? "" : row.dataset.job;
    window.tdAct?.("place", `${job} ${before}`.trim());
  });
  document.addEventListener("pointercancel", () => { dragged = null; unmark(); });

  document.addEventListener("focusin", (event) => {
    const button = event.target.closest?.("#queue-list [data-act]");
    held = button ? { job: button.closest("[data-job]")?.dataset.job, act: button.dataset.act } : null;
  });
  document.addEventListener("pointerdown", () => { held = null; }, true);
  // Gradio patches the old list into the new one: the same element may be the button of another job now
  const nameOf = (button) => button.closest("[data-job]")?.dataset.job + button.dataset.act;
  new MutationObserver(() => {
    const active = document.activeElement, here = list();
    if (!held || !here || !(active === document.body || here.contains(active) && nameOf(active) !== held.job + held.act)) return;
    const { job, act } = held, row = job ? here.querySelector(`[data-job="${job}"]`) : here;
    const again = row?.querySelector(`[data-act="${act}"]`) ?? row?.querySelector("[data-act]") ?? here.querySelector("[data-act]");
    again?.focus({ preventScroll: true });
    held = { job, act }; // where "up" is gone at the top it may come back
  }).observe(document, { childList: true, subtree: true, attributeFilter: ["data-arg", "data-act", "data-job"] });
})();
