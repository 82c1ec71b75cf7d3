// Before Gradio builds the page: what it shows first is in the page already (GuardedBlocks.first), and no answer is waited
// for. The form's part of that is of a form that nobody has changed: where a draft is kept, the answer to `load` tells it.
(() => {
  const { components, dependencies, page, first } = window.gradio_config ?? {};
  if (!first) return;
  let draft = null;
  try { draft = localStorage.getItem("turbodiff.draft"); } catch { /* a browser that keeps nothing */ }
  const known = { ...first.panels, ...(draft ? {} : first.form) };
  for (const part of components) Object.assign(part.props, known[part.id]);
  // Svelte watches each plain object that it is given, property by property (6.31: 60,000 reads while the tree is built);
  // nothing of this description changes, and what is made by another than Object it leaves as it is
  for (const part of [...components, ...dependencies, ...Object.values(page).map(({ layout }) => layout)]) Object.setPrototypeOf(part, Object.create(Object.prototype));
})();
