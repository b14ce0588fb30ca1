"""Names of the foreign formats that a generator can be exported to. Needs no torch."""

from __future__ import annotations

EXPORT_FORMATS = ("diffusers", "comfyui")
"""What `export_generator` writes."""
