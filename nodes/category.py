"""The place of the nodes in ComfyUI's menu."""

CATEGORY = "image/upscaling/ICM-SR"
