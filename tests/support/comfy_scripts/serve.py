"""ComfyUI's main.py, ended when standard input closes: the server never outlives the tests that started it."""

import os
import runpy
import sys
import threading


def end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


threading.Thread(target=end_with_parent, daemon=True).start()
comfyui = sys.argv[1]
sys.path[0] = comfyui
sys.argv = [os.path.join(comfyui, "main.py"), *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
