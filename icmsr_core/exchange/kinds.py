"""Names of the foreign formats that can be imported and exported. Needs no torch."""

from __future__ import annotations

LORA_KIND = "lora"
IMPORT_KINDS = ("osediff", "pisasr", LORA_KIND)
"""What `import_checkpoint` reads."""
EXPORT_FORMATS = ("diffusers", "comfyui")
"""What `export_generator` writes."""
