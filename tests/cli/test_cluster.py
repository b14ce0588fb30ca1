"""`icmsr upscale --ray` without Ray: what is refused, how a cluster is used, and what one of its workers does."""

import importlib.util
import logging
import pickle
from functools import partial
from pathlib import Path

import pytest

from icmsr_core.cli.arguments import make_parser
from icmsr_core.cli.asked import for_workers, recipe_of
from icmsr_core.cli.cluster import Worker, Workers, workers_of
from icmsr_core.cli.job_list import NamingRules, plan_jobs
from icmsr_core.cli.main import main, prepared_in_worker
from icmsr_core.cli.picture_jobs import UntilItFits
from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.storage import RemotePath, place_of
from icmsr_core.upscale.settings import UpscaleSettings
from tests.support.pictures import write_random_picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures and a file that is none."""
    (tmp_path / "in").mkdir()
    for width in (20, 24):
        write_random_picture(tmp_path / "in" / f"{width}.png", width)
    (tmp_path / "in" / "bad.png").write_text("no picture")
    return tmp_path / "in"


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icmsr_core.cli.main.load_networks", lambda *_: pytest.fail("a model was loaded"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shard", "1/2", "--ray"], "--shard: --ray divides the pictures itself"),
        (["--mask", "mask.png", "--ray"], "--mask: a mask belongs to one picture"),
        (["--device", "cuda:1", "--ray"], "--device cuda:1: with --ray each worker gets its own device"),
        (["--ray", "ray://head:10001"], "expected HOST:PORT or local, got 'ray://head:10001'"),
        (["--ray", "head"], "expected HOST:PORT or local, got 'head'"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(folder, flags, words, capsys, nothing_loads) -> None:
    with pytest.raises(SystemExit) as left:
        main(["upscale", str(folder), str(folder.parent / "out"), *flags])
    assert left.value.code == 2
    assert words in capsys.readouterr().err
    assert not (folder.parent / "out").exists()


def test_one_picture_is_refused(folder, capsys, monkeypatch, nothing_loads) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(SystemExit) as left:
        main(["upscale", str(folder / "20.png"), str(folder / "out.png"), "--ray"])
    assert left.value.code == 2
    assert "20.png: is one picture, --ray is for many: name a folder, or leave out --ray" in capsys.readouterr().err


def test_without_ray_the_command_says_what_to_install(folder, capsys, monkeypatch, nothing_loads) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "ray" else real(name))
    assert main(["upscale", str(folder), str(folder.parent / "out"), "--ray"]) == 1
    assert capsys.readouterr().err == (
        "icmsr: error: --ray needs the package Ray, which is not installed: pip install 'icm-sr[ray]'\n"
    )


@pytest.mark.parametrize("address", ["local", "auto", "10.0.0.1:6379", "head.example:6379"])
def test_addresses(address: str) -> None:
    assert make_parser().parse_args(["upscale", "in", "out", "--ray", address]).ray == address
    assert make_parser().parse_args(["upscale", "in", "out", "--ray"]).ray == ""
    assert make_parser().parse_args(["upscale", "in", "out"]).ray is None


def test_the_workers_follow_the_machines() -> None:
    one_card = {"CPU": 16.0, "GPU": 1.0}
    assert workers_of([{"CPU": 8.0}, {"CPU": 5.0}, {"memory": 1.0}], "auto") == Workers(3, 0, 4)
    assert workers_of([{"CPU": 1.0}, {"CPU": 8.0}], "cpu") == Workers(9, 0, 1)
    assert workers_of([one_card, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0}], "auto") == Workers(5, 1, 1)
    assert workers_of([one_card], "cpu") == Workers(4, 0, 4)
    assert workers_of([one_card], "cuda").words() == "1 worker with a graphics card each"
    assert Workers(2, 0, 1).words() == "2 workers with 1 processor each"
    with pytest.raises(IcmsrError, match="--device cuda: no machine of the cluster has a graphics card"):
        workers_of([{"CPU": 8.0}], "cuda")
    with pytest.raises(IcmsrError, match="the cluster has no processors"):
        workers_of([{"CPU": 0.0}], "auto")


@pytest.mark.long
def test_a_worker_writes_what_a_folder_run_writes(folder, tmp_path, capsys) -> None:
    """With what is sent to it, pickled; pictures come from one storage and go to another."""
    stored = place_of("memory://bucket")
    assert isinstance(stored, RemotePath)
    stored.system.store.clear()
    for path in folder.iterdir():
        (stored / "in" / path.name).write_bytes(path.read_bytes())
    (stored / "in" / "wide.png").write_bytes(write_random_picture(tmp_path / "wide.png", 20, 1).read_bytes())
    assert main(["upscale", str(folder), str(tmp_path / "one")]) == 1
    options = make_parser().parse_args(["upscale", f"{stored}/in", f"{stored}/out", "--ray"])
    jobs = plan_jobs(options.inputs, options.output, NamingRules()).jobs
    sent = pickle.loads(pickle.dumps((jobs, partial(prepared_in_worker, for_workers(options)), UpscaleSettings(), 95)))
    worker = Worker(*sent)
    rows = worker({"item": [0, 2, 1]})
    assert [job.source.name for job in jobs] == ["20.png", "24.png", "bad.png", "wide.png"]
    assert rows["number"] == [0, 2, 1]
    assert rows["line"][::2] == ["", ""]
    assert rows["line"][1].startswith(f"{stored}/in/bad.png: not a picture in a known format")
    for name in ("20.png", "24.png"):
        assert (stored / "out" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    left = plan_jobs(options.inputs, options.output, NamingRules(skip_existing=True))
    assert ([job.source.name for job in left.jobs], left.existing) == (["bad.png", "wide.png"], 2)
    logging.getLogger("icmsr_core.cli").warning("%s is odd", "it")
    assert worker({"item": []}) == {"number": [-1], "line": ["it is odd"]}


def test_a_worker_refuses_a_result_that_is_too_large(folder, tmp_path, monkeypatch) -> None:
    jobs = plan_jobs([folder], tmp_path / "out").jobs
    monkeypatch.setattr("icmsr_core.cli.cluster.free_system_memory", lambda: 1e4)
    rows = Worker(jobs, lambda: UntilItFits(None, None), UpscaleSettings(), 95)({"item": [0]})
    assert "20.png: from 20 x 12 to 80 x 48 pixels takes at least" in rows["line"][0]


def test_workers_find_weights_by_absolute_paths(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "g.safetensors").touch()
    given = ["upscale", "in", "out", "--model", "g.safetensors", "--base", "some/hub-id"]
    recipe = recipe_of(for_workers(make_parser().parse_args(given)))
    assert (recipe.generator, recipe.base) == (tmp_path / "g.safetensors", "some/hub-id")


def test_a_storage_is_planned_as_a_folder_is(folder, tmp_path) -> None:
    stored = place_of("memory://bucket")
    assert isinstance(stored, RemotePath)
    stored.system.store.clear()
    for name in ("in/a.png", "in/b.gif", "in/notes.txt", "in/sub/c.png", "in/out/d.png"):
        (stored / name).write_bytes(b"x")
    flat = plan_jobs([f"{stored}/in"], tmp_path / "out")
    assert [job.target for job in flat.jobs] == [tmp_path / "out/a.png", tmp_path / "out/b.png"]
    assert flat.passed_over().startswith("skipped: 1 that are not pictures (.txt 1)")
    deep = plan_jobs([f"{stored}/in"], f"{stored}/in/out", NamingRules(recursive=True))
    assert [job.inside for job in deep.jobs] == ["a.png", "b.gif", "sub/c.png"]
    assert str(deep.jobs[2].target) == f"{stored}/in/out/sub/c.png"
    assert plan_jobs([f"{stored}/in"], tmp_path / "out", NamingRules(shard=(1, 1))).jobs == flat.jobs
    refused = {
        f"{stored}/in/none.png": "no such file or folder",
        f"{stored}/in": "would overwrite an input",
    }
    for source, words in refused.items():
        with pytest.raises(IcmsrError, match=words):
            plan_jobs([source], f"{stored}/in")
    (stored / "in/a.gif").write_bytes(b"x")
    with pytest.raises(IcmsrError, match="would both be written"):
        plan_jobs([f"{stored}/in"], f"{stored}/other")
