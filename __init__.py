"""ComfyUI's entry into the pack: the extension with its nodes, and the folder with their help pages."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The pack's extension. Imported only here, so that collecting tests in this package needs no ComfyUI."""
    from .nodes.core_version import refuse_older_core

    refuse_older_core()
    from .nodes.extension import IcmsrExtension

    return IcmsrExtension()
