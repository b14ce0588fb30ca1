"""The languages of the nodes' texts and help pages."""

LOCALES = ("zh", "zh-TW", "ja", "ko", "ru", "fr", "es", "ar", "tr", "pt-BR", "fa", "he")
"""What ComfyUI's frontend offers beside English, by its names: folders of `locales/`, files in `web/docs/NODE/`."""
