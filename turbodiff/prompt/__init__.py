"""WORDS: what a prompt says before any network sees it.

Lives here: cleaning, weights, token counts, advice. Pure functions of text.
Never here: torch, embeddings, sentences shown to people (advice is keys; webui/wording says them).
Who may knock: `webui`, `turbodiff.studio`, `turbodiff.plan`, `turbodiff.runtime`.
"""
