"""Makes reading or writing text without naming its encoding an error in the project's own code, not in the libraries'.

Python imports this at its start where the folder is on PYTHONPATH, and so do the processes that such a process starts.
`tests/conftest.py` puts it there and switches the warning on (PYTHONWARNDEFAULTENCODING).
"""

import sys
import warnings

OWN = r"(.*custom_nodes.icm-sr|icmsr_core|__mp_main__)(\.|$)|_(command_line|measurement|sd_networks)$"
"""Names of modules. Inside ComfyUI the pack's begin with its path; a script is __mp_main__ in the processes that it
starts."""

warnings.filterwarnings("ignore", category=EncodingWarning)
warnings.filterwarnings("error", category=EncodingWarning, module=OWN)
if not any("comfy_scripts" in argument for argument in sys.orig_argv):  # there, __main__ is ComfyUI's or a test's
    warnings.filterwarnings("error", category=EncodingWarning, module="__main__$")
