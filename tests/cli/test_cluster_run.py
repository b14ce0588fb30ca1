"""`icmsr upscale --ray` on a cluster of two nodes, over an object store that is served here, with workers that die.

uv run --extra test --extra ray --with "moto[server]" pytest -m slow -s tests/cli/test_cluster_run.py
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest

from icmsr_core.cli.arguments import make_parser
from icmsr_core.cli.asked import for_workers
from icmsr_core.cli.cluster import connected
from icmsr_core.cli.job_list import Job, plan_jobs
from icmsr_core.cli.main import main, prepared_in_worker
from icmsr_core.cli.picture_jobs import UntilItFits, upscale_jobs
from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.files import Picture
from icmsr_core.pictures.storage import RemotePath, place_of
from icmsr_core.steps import Steps
from icmsr_core.upscale.settings import UpscaleSettings
from tests.support.pictures import write_random_picture
from tests.support.places import ROOT

ray = pytest.importorskip("ray", reason="no Ray: pip install 'icm-sr[ray]'")
cluster_utils = pytest.importorskip("ray.cluster_utils")
moto = pytest.importorskip("moto.server", reason='no object store: pip install "moto[server]"')
pytest.importorskip("s3fs", reason="no s3fs: pip install 'icm-sr[ray]'")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers' processes in /proc"),
]

PATIENCE = {
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_raylet_start_wait_time_s": "600",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_health_check_timeout_ms": "120000",
    "RAY_health_check_failure_threshold": "20",
    "RAY_gcs_server_request_timeout_seconds": "600",
}
"""Ray gives up early on a machine that is busy with other things."""
LIMIT = 1500.0
"""Seconds for a run of the command on such a machine."""
NUMBER = 6
COUNTED = 16


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    """What the nodes, and by them the workers, inherit: an object store, one thread, patience."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    store = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**PATIENCE, **store, "RAY_USAGE_STATS_ENABLED": "0"}.items():
            patch.setenv(name, value)
        patch.delenv("PYTHONWARNDEFAULTENCODING", raising=False)  # Ray's own files name no encoding
        yield
    server.stop()


@pytest.fixture(scope="module")
def address(environment: None) -> Iterator[str]:
    """A cluster of two nodes with a processor each."""
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=of_a_node())
    cluster.add_node(**of_a_node())
    yield cluster.address
    cluster.shutdown()


def of_a_node() -> dict[str, int]:
    """A processor, and ports that are known: a node waits 15 seconds at most for agents that choose their own."""
    agents = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    with ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in agents]
        ports = {agent: taken.getsockname()[1] for agent, taken in zip(agents, free)}
    without = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    return {"num_cpus": 1, **ports, **without}


@pytest.fixture(scope="module")
def bucket(environment: None) -> RemotePath:
    """An empty bucket."""
    place = place_of("s3://pictures")
    assert isinstance(place, RemotePath)
    place.system.mkdir("pictures")
    return place


def processes() -> dict[int, list[str]]:
    """This process and those below it: the fields of ``/proc/PID/stat`` after the name."""
    parents, fields = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            process = int(folder.name)
            fields[process] = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[process] = int(fields[process][1])

    def is_ours(process: int) -> bool:
        return process == os.getpid() or (process in parents and is_ours(parents[process]))

    return {process: fields[process] for process in fields if is_ours(process)}


def workers() -> list[int]:
    """The processes of Ray's actors below this one."""
    return [process for process in processes() if b"ray::MapWorker" in Path(f"/proc/{process}/cmdline").read_bytes()]


def spent() -> tuple[float, float]:
    """Seconds on the clock, and of the processors in this process and those below it."""
    ticks = sum(int(fields[11]) + int(fields[12]) for fields in processes().values())
    return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK")


def test_results_are_those_of_one_process_also_when_a_worker_is_killed(address, bucket, tmp_path, capsys) -> None:
    """From an object store into it, past a bad file and what exists already."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for index in range(NUMBER):
        write_random_picture(tmp_path / "in" / ("sub" if index % 2 else ".") / f"{index:02d} #ü.png", 40 + index, 30)
    (tmp_path / "in" / "bad.png").write_text("no picture")
    assert main(["upscale", str(tmp_path / "in"), str(tmp_path / "one"), "--recursive"]) == 1
    bucket.system.put(str(tmp_path / "in"), "pictures/in", recursive=True)
    # As the consoles of object stores make a folder.
    bucket.system.call_s3("put_object", Bucket="pictures", Key="in/sub/", Body=b"")
    (bucket / "out" / "00 #ü.png").write_bytes(b"from before")

    command = [sys.executable, "-m", "icmsr_core", "upscale", f"{bucket}/in", f"{bucket}/out"]
    flags = ["--recursive", "--skip-existing", "--ray", address]
    with subprocess.Popen(
        [*command, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as run:
        killed: list[int] = []

        def kill_one() -> None:
            until = time.monotonic() + LIMIT
            while run.poll() is None and time.monotonic() < until:
                if len((bucket / "out").entries(recursive=True)[0]) >= 2:
                    killed.extend(workers()[:1])
                    os.kill(killed[0], signal.SIGKILL)
                    return
                time.sleep(2)

        killer = threading.Thread(target=kill_one)
        killer.start()
        said, errors = run.communicate(timeout=LIMIT)
        killer.join()
    print(said, errors)
    left = NUMBER - 1
    assert len(killed) == 1
    assert run.returncode == 1
    assert said.splitlines()[0] == f"{left + 1} pictures; 2 workers with 1 processor each, 2 machines"
    assert re.fullmatch(rf"{left} of {left + 1} written to s3://pictures/out in [0-9.]+ s", said.splitlines()[-1])
    (line,) = [line for line in errors.splitlines() if line.startswith("icmsr")]
    assert line.startswith("icmsr: error: s3://pictures/in/bad.png: not a picture in a known format")
    assert "skipped: 1 whose result exists" in errors
    expected = {path.relative_to(tmp_path / "one"): path for path in (tmp_path / "one").rglob("*.png")}
    assert set((bucket / "out").entries(recursive=True)[0]) == set(expected)
    for name, path in expected.items():
        content = b"from before" if name.name.startswith("00") else path.read_bytes()
        assert (bucket / "out" / name).read_bytes() == content


class Fatal(UntilItFits):
    """Gives pictures back as they are; one of them ends the process, as a lack of memory does."""

    def __init__(self) -> None: ...

    def upscale(self, name: str, picture: Picture, steps: Steps | None = None) -> Picture:
        if name == "fatal.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return picture


def broken() -> UntilItFits:
    raise IcmsrError("generator.safetensors: no such file")


def test_a_picture_that_kills_its_worker_is_named_and_the_others_are_done(address, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("icmsr_core.cli.cluster.TRIES", 1)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    names = [f"{index:02d}.png" for index in range(30)] + ["fatal.png"]
    jobs = [Job(write_random_picture(tmp_path / name), tmp_path / f"x{name}") for name in names]
    with connected(address, "auto") as cluster:
        found = list(cluster.upscale(jobs, Fatal, UpscaleSettings(), 95))
    lines = {job.source.name: line for job, line in found if job is not None}
    assert sorted(lines) == sorted(names)
    assert {name for name, line in lines.items() if line} == {"fatal.png"}
    assert lines["fatal.png"].startswith(f"{tmp_path}/fatal.png: its worker died each time")
    assert len(list(tmp_path.glob("x*.png"))) == 30


def test_workers_that_cannot_begin_say_why(address, tmp_path) -> None:
    job = Job(write_random_picture(tmp_path / "a.png"), tmp_path / "b.png")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with (
        pytest.raises(IcmsrError, match=r"a worker of the cluster cannot begin: .*generator\.safetensors: no such"),
        connected(address, "auto") as cluster,
    ):
        list(cluster.upscale([job], broken, UpscaleSettings(), 95))


def test_the_cost_of_a_picture(address, tmp_path) -> None:
    """Prints the table of docs/many_pictures.md: seconds for each of the later half of the pictures, when all work."""
    (tmp_path / "in").mkdir()
    for index in range(COUNTED):
        write_random_picture(tmp_path / "in" / f"{index:02d}.png", 40 + index, 30)
    options = make_parser().parse_args(["upscale", str(tmp_path / "in"), str(tmp_path / "out"), "--ray", address])
    jobs = plan_jobs(options.inputs, options.output).jobs
    rows = {}
    started, marks = spent(), []
    fitting = prepared_in_worker(options)
    assert upscale_jobs(fitting, jobs, report=print, done=lambda _: marks.append(spent())) == 0
    rows["one process"] = started, marks
    started, marks = spent(), []
    with connected(address, "auto") as cluster:
        for job, line in cluster.upscale(
            jobs, partial(prepared_in_worker, for_workers(options)), UpscaleSettings(), 95
        ):
            assert job is not None, line
            marks.append(spent())
        words = cluster.workers.words()
    rows[f"Ray, {words}"] = started, marks
    print("\n| | first result after s | s a picture | processor s a picture |\n|---|---|---|---|")
    costs = []
    for name, (started, marks) in rows.items():
        clock, processors = (
            (marks[-1][kind] - marks[COUNTED // 2 - 1][kind]) / (COUNTED - COUNTED // 2) for kind in (0, 1)
        )
        costs.append(processors)
        print(f"| {name} | {marks[0][0] - started[0]:.1f} | {clock:.2f} | {processors:.2f} |")
    assert costs[1] < 2 * costs[0]


def test_where_no_cluster_is_the_command_says_so(tmp_path) -> None:
    write_random_picture(tmp_path / "in.png")
    run = subprocess.run(
        [sys.executable, "-m", "icmsr_core", "upscale", tmp_path, tmp_path / "out", "--ray", "127.0.0.1:1"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in PATIENCE},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=LIMIT,
    )
    assert run.returncode == 1
    assert "icmsr: error: --ray 127.0.0.1:1: no cluster there" in run.stderr
