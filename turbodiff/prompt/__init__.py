"""WORDS: what a prompt says before any network sees it.

Contents: cleaning and weights, token counts, advice. Pure functions of text.
Never here: torch, embeddings, sentences shown to people (advice is keys; webui/wording says them).
Used by: `webui`, `turbodiff.studio`, `turbodiff.media`, `turbodiff.runtime`.
"""
