"""ComfyUI's entry into the pack: the extension with its nodes, and the folder with their help pages."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The pack's extension; imported here so that a test collector that meets this package needs no ComfyUI."""
    from .nodes.extension import IcmsrExtension

    return IcmsrExtension()
