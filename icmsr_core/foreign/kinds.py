"""Names of the foreign kinds of weights that become generators. Needs no torch."""

from __future__ import annotations

LORA_KIND = "lora"
"""A LoRA of a UNet of which nothing else is known."""
RELATIVES = ("osediff", "pisasr", "hypir", "omgsr")
"""The methods whose published files are recognised by what they hold."""
IMPORT_KINDS = (*RELATIVES, LORA_KIND)
"""What `import_checkpoint` reads."""
