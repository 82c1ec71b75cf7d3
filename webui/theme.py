"""The look as Gradio variables: one accent, no boxes around boxes, system fonts (nothing is fetched from elsewhere)."""

import gradio as gr

FONT = ["system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
MONO = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "Noto Sans Mono CJK SC", "monospace"]

LOOK = {
    "body_background_fill": "var(--paper)",
    "body_text_color": "var(--ink)",
    "body_text_color_subdued": "var(--ink-soft)",
    "background_fill_primary": "var(--card)",
    "background_fill_secondary": "var(--paper)",
    "border_color_primary": "var(--line)",
    "border_color_accent": "var(--accent)",
    "color_accent": "var(--accent)",
    "color_accent_soft": "var(--accent-wash)",
    "link_text_color": "var(--accent)",
    "block_background_fill": "transparent",
    "block_border_width": "0px",
    "block_shadow": "none",
    "block_padding": "0px",
    "block_label_background_fill": "transparent",
    "block_label_text_color": "var(--ink-soft)",
    "block_label_border_width": "0px",
    "block_title_text_color": "var(--ink)",
    "block_title_text_weight": "550",
    "block_title_text_size": "13px",
    "block_info_text_color": "var(--ink-soft)",
    "panel_background_fill": "transparent",
    "panel_border_width": "0px",
    "input_background_fill": "var(--field)",
    "input_border_color": "var(--line-strong)",
    "input_border_color_focus": "var(--accent)",
    "input_border_width": "1px",
    "input_shadow": "none",
    "input_shadow_focus": "0 0 0 3px var(--accent-wash)",
    "input_radius": "9px",
    "input_placeholder_color": "var(--ink-faint)",
    "checkbox_background_color": "var(--field)",
    "checkbox_border_color": "var(--line-strong)",
    "checkbox_background_color_selected": "var(--accent)",
    "checkbox_border_color_selected": "var(--accent)",
    "checkbox_label_background_fill": "var(--field)",
    "checkbox_label_background_fill_selected": "var(--accent-wash)",
    "checkbox_label_background_fill_hover": "var(--hover)",
    "checkbox_label_border_color": "var(--line-strong)",
    "checkbox_label_border_color_selected": "var(--accent)",
    "checkbox_label_text_color": "var(--ink)",
    "checkbox_label_text_color_selected": "var(--ink)",
    "checkbox_label_border_width": "1px",
    "checkbox_label_shadow": "none",
    "slider_color": "var(--accent)",
    "button_primary_background_fill": "var(--accent)",
    "button_primary_background_fill_hover": "var(--accent-deep)",
    "button_primary_text_color": "var(--on-accent)",
    "button_primary_border_color": "transparent",
    "button_primary_shadow": "none",
    "button_secondary_background_fill": "var(--card)",
    "button_secondary_background_fill_hover": "var(--hover)",
    "button_secondary_text_color": "var(--ink)",
    "button_secondary_border_color": "var(--line-strong)",
    "button_secondary_shadow": "none",
    "button_border_width": "1px",
    "button_large_radius": "10px",
    "button_large_text_weight": "600",
    "layout_gap": "18px",
    "form_gap_width": "14px",
    "table_border_color": "var(--line)",
    "table_even_background_fill": "transparent",
    "table_odd_background_fill": "transparent",
}


def theme() -> gr.themes.Base:
    """Gradio's base theme with the colours of static/page.css, so that both change together in the dark."""
    base = gr.themes.Base(font=FONT, font_mono=MONO, radius_size=gr.themes.sizes.radius_md)
    dark = {f"{name}_dark": value for name, value in LOOK.items() if _has_dark(base, name)}
    return base.set(**LOOK, **dark)


def _has_dark(base: gr.themes.Base, name: str) -> bool:
    return f"{name}_dark" in gr.themes.Base.set.__code__.co_varnames
