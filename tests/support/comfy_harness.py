"""A real ComfyUI for tests: finds it, prepares a Python environment for it, runs it as a server or as a script.

The environment holds what a user's ComfyUI has: its own requirements and those of `requirements.txt`, so no diffusers.
`benchmarks/node_overhead.py` reads this file by its path, so it imports nothing of the tests.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path.home() / ".cache" / "icm-sr"
SCRIPTS = Path(__file__).resolve().parent / "comfy_scripts"
PACK_NAME = "icm-sr"
# The newest set of three that exists together.
CONSTRAINTS = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
START_SECONDS = 600


def find_comfyui() -> Path | None:
    """$COMFYUI_PATH, the ComfyUI whose custom_nodes holds this checkout, or the one in the cache; None without any."""
    places = [os.environ.get("COMFYUI_PATH"), ROOT.parents[1] if len(ROOT.parents) > 1 else None, CACHE / "ComfyUI"]
    for place in places:
        if place and (Path(place) / "main.py").is_file() and (Path(place) / "comfy" / "sd.py").is_file():
            return Path(place).resolve()
    return None


def find_uv() -> list[str] | None:
    """The command line of uv: $UV, the one on the PATH, or the module; None without any."""
    program = os.environ.get("UV") or shutil.which("uv")
    if program:
        return [program]
    return [sys.executable, "-m", "uv"] if importlib.util.find_spec("uv") else None


def prepare_python(comfyui: Path) -> Path:
    """$ICMSR_COMFY_PYTHON, or the Python of an environment that is built once for each set of requirements."""
    given = os.environ.get("ICMSR_COMFY_PYTHON")
    if given:
        return Path(given)
    uv = find_uv()
    if uv is None:
        raise FileNotFoundError("uv is needed to build ComfyUI's environment: set $UV or $ICMSR_COMFY_PYTHON")
    from filelock import FileLock  # torch brings it

    own = (ROOT / "requirements.txt").read_text()
    core = (comfyui / "requirements.txt").read_text()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256("\n".join([version, core, own, *CONSTRAINTS]).encode()).hexdigest()[:12]
    folder = CACHE / f"comfy-env-{digest}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    complete = folder / "complete"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not complete.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
            (folder / "requirements.txt").write_text(core + "\n" + own)
            (folder / "constraints.txt").write_text("\n".join(CONSTRAINTS) + "\n")
            command = [*uv, "pip", "install", "--quiet", "--python", str(python)]
            files = ["-r", str(folder / "requirements.txt"), "-c", str(folder / "constraints.txt")]
            subprocess.run([*command, *files], check=True)
            complete.touch()
    return python


def make_base_directory(folder: Path, archive: Path | None = None) -> Path:
    """A base directory for ComfyUI with this checkout among its custom nodes; returns the pack's place in it.

    With `archive`, a zip, what it holds takes the checkout's place.
    """
    for name in ("custom_nodes", "input", "output", "temp", "user", "models/icmsr", "models/controlnet"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pack = folder / "custom_nodes" / PACK_NAME
    if archive is None:
        pack.symlink_to(ROOT, target_is_directory=True)
    else:
        shutil.unpack_archive(archive, pack)
    return pack


@cache
def _bytecode() -> tempfile.TemporaryDirectory[str]:
    """Where ComfyUI's processes keep compiled files: they leave none in the checkouts, and compile each file once."""
    return tempfile.TemporaryDirectory(prefix="icmsr-bytecode-", ignore_cleanup_errors=True)


def _environment() -> dict[str, str]:
    # One thread: with more, a machine that is busy otherwise spends its time in barriers. The encoding is that of a
    # console under Windows once its output goes to a file.
    own = {
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPYCACHEPREFIX": _bytecode().name,
        "PYTHONIOENCODING": "cp1252",
    }
    return {**os.environ, **own}


class _ForkServer:
    """A process of ComfyUI's Python that runs scripts in forks of itself, without a start of seconds for each."""

    def __init__(self, python: Path, comfyui: Path) -> None:
        self._process = subprocess.Popen(
            [str(python), str(SCRIPTS / "fork_server.py")],
            cwd=comfyui,
            env=_environment(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, arguments: list[str], log: Path, timeout: float) -> int:
        """Exit code of a script; its output is in `log`. After `timeout` seconds it is killed: -9."""
        self._process.stdin.write(json.dumps({"arguments": arguments, "log": str(log)}) + "\n")
        self._process.stdin.flush()
        fork = int(self._process.stdout.readline())
        killer = threading.Timer(timeout, os.kill, (fork, signal.SIGKILL))
        killer.start()
        try:
            return int(self._process.stdout.readline())
        finally:
            killer.cancel()


_fork_server = cache(_ForkServer)


def run_script(python: Path, comfyui: Path, name: str, job: Path, timeout: float = 300) -> None:
    """Runs the script `name` of comfy_scripts inside a ComfyUI process with `job` as base directory."""
    pack = make_base_directory(job)
    command = [str(SCRIPTS / name), "--comfyui", str(comfyui), "--pack", str(pack), "--job", str(job)]
    code = _fork_server(python, comfyui).run(command, job / f"{name}.log", timeout)
    assert code == 0, f"{name} ended with {code}:\n{(job / f'{name}.log').read_text(errors='replace')[-6000:]}"


class Server:
    """A ComfyUI server on a free port. It ends with the test process, however that ends."""

    def __init__(
        self, python: Path, comfyui: Path, base: Path, archive: Path | None = None, options: Sequence[str] = ()
    ) -> None:
        """`options` are more of ComfyUI's own; `archive` as in `make_base_directory`."""
        self.base = base
        make_base_directory(base, archive)
        # Not the first start, which lays the gallery of templates over the page.
        settings = base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}), encoding="utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = base / "server.log"
        command = [str(python), str(SCRIPTS / "serve.py"), str(comfyui), "--cpu", "--listen", "127.0.0.1"]
        command += ["--port", str(self.port), "--base-directory", str(base), "--disable-api-nodes"]
        command += ["--database-url", "sqlite:///:memory:", *options]
        # A second place for weights, as users have it in extra_model_paths.yaml.
        self.elsewhere = base / "elsewhere" / "generators"
        self.elsewhere.mkdir(parents=True)
        paths = base / "extra_model_paths.yaml"
        paths.write_text(f"elsewhere:\n    base_path: {base / 'elsewhere'}\n    icmsr: generators\n")
        command += ["--extra-model-paths-config", str(paths)]
        with self.log_path.open("w") as log:
            # serve.py ends when this pipe closes.
            self._process = subprocess.Popen(
                command, cwd=comfyui, env=_environment(), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )
        print(f"ComfyUI at {self.url}, Python {python}, log {self.log_path}")

    def wait_until_ready(self) -> None:
        """Returns when the server answers; raises with the end of its log when it does not."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        self.stop()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log()[-6000:]}")

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Ends the server."""
        self._process.stdin.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def log(self) -> str:
        """Everything that the server has written so far."""
        return self.log_path.read_text(errors="replace")

    def get(self, path: str) -> Any:
        """The JSON answer to a GET."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any) -> Any:
        """The JSON answer to a POST; of a refusal too, as {"status": ..., ...}."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
        except urllib.error.HTTPError as refusal:
            return {"status": refusal.code, **json.load(refusal)}
        return json.loads(text) if text else {}

    def upload(self, picture, name: str) -> str:
        """Uploads a PIL picture as PNG; returns the name that Load Image knows it by."""
        buffer = BytesIO()
        picture.save(buffer, "PNG")
        border = uuid.uuid4().hex
        head = f'--{border}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        body = f"{head}Content-Type: image/png\r\n\r\n".encode() + buffer.getvalue() + f"\r\n--{border}--\r\n".encode()
        request = urllib.request.Request(
            self.url + "/upload/image", body, {"Content-Type": f"multipart/form-data; boundary={border}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["name"]

    def picture(self, entry: dict[str, Any]):
        """The saved picture of a history entry (its first) as a PIL image."""
        from PIL import Image

        saved = next(output["images"][0] for output in entry["outputs"].values() if output.get("images"))
        with urllib.request.urlopen(f"{self.url}/view?{urllib.parse.urlencode(saved)}", timeout=30) as answer:
            return Image.open(BytesIO(answer.read())).convert("RGB")

    def free(self) -> None:
        """Unloads the models and forgets all results, and returns when that is done.

        Core's worker does it after its next prompt or between two of them, whichever it sees first: hence a small one.
        """
        self.post("/free", {"unload_models": True, "free_memory": True})
        empty = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}
        self.run({"free": empty, "seen": {"class_type": "PreviewImage", "inputs": {"images": ["free", 0]}}})

    def run(self, prompt: dict[str, Any], on_progress: Callable[[dict], None] | None = None, timeout: float = 120):
        """Runs `prompt` (API form) to its end; returns (the last message's type, its data, the history entry)."""
        return asyncio.run(asyncio.wait_for(self._run(prompt, on_progress), timeout))

    async def _run(self, prompt, on_progress):
        import aiohttp

        client = uuid.uuid4().hex
        last = ("execution_success", "execution_error", "execution_interrupted")
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as socket_,
        ):
            queued = await asyncio.to_thread(self.post, "/prompt", {"prompt": prompt, "client_id": client})
            if "prompt_id" not in queued:
                raise AssertionError(f"the prompt was refused: {json.dumps(queued)}")
            async for message in socket_:
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                kind, data = event["type"], event["data"]
                if data.get("prompt_id") not in (None, queued["prompt_id"]):
                    continue
                if kind == "progress" and on_progress is not None:
                    await asyncio.to_thread(on_progress, data)
                if kind in last:
                    break
            else:
                raise AssertionError("the server closed the connection")
        for _ in range(50):  # the history is written just after the last message
            history = await asyncio.to_thread(self.get, f"/history/{queued['prompt_id']}")
            if queued["prompt_id"] in history:
                return kind, data, history[queued["prompt_id"]]
            await asyncio.sleep(0.1)
        raise AssertionError("the prompt is not in the history")


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """A workflow as saved by the frontend in the form that POST /prompt takes; notes are left out."""
    source = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] not in object_info:
            assert node["type"] in ("Note", "MarkdownNote"), f"unknown node {node['type']}"
            continue
        known = {**object_info[node["type"]]["input"].get("required", {})}
        known |= object_info[node["type"]]["input"].get("optional", {})
        # By name where names are saved: some widgets, such as "control after generate" of a seed, are no inputs.
        named, values = node.get("widgets_values_named"), iter(node.get("widgets_values", []))
        inputs = {}
        for entry in node["inputs"]:
            value = None
            if "widget" in entry:
                value = next(values, None) if named is None else named.get(entry["name"])
            if entry.get("link") is not None:
                inputs[entry["name"]] = source[entry["link"]]
            elif "widget" in entry and entry["name"].split(".")[0] in known and value is not None:
                inputs[entry["name"]] = value
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
