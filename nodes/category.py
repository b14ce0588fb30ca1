"""Where the nodes stand in ComfyUI's menu."""

CATEGORY = "image/upscaling/ICM-SR"
