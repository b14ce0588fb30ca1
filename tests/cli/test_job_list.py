"""Which pictures are read and which files are written: settled before a model is loaded."""

import os
from pathlib import Path

import pytest
from PIL import Image

from icmsr_core.cli.job_list import Job, JobList, NamingRules, plan_jobs, shard_of, too_large_results, too_much_memory
from icmsr_core.cli.main import main
from icmsr_core.errors import IcmsrError
from icmsr_core.upscale.settings import UpscaleSettings
from tests.support.picture_files import png_file


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Pictures of many kinds, a sub-folder, and files that are not pictures."""
    folder = tmp_path / "in"
    for name in ("a.png", "b.GIF", "c.jfif", "d.bmp", "notes.txt", "raw", "clip.mov", "sub/e.png", "sub/deep/f.jpg"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def written(found: JobList, folder: Path) -> list[str]:
    return [job.target.relative_to(folder).as_posix() for job in found.jobs]


def test_a_folder_s_pictures_keep_their_names_where_their_format_can_be_written(mixed, tmp_path):
    found = plan_jobs([mixed], tmp_path / "out")
    assert written(found, tmp_path / "out") == ["a.png", "b.png", "c.jfif", "d.png"]
    assert [job.source.name for job in found.jobs] == ["a.png", "b.GIF", "c.jfif", "d.bmp"]
    assert found.passed_over() == (
        "skipped: 3 that are not pictures (no extension 1, .mov 1, .txt 1), 1 sub-folders (--recursive takes them)"
    )
    assert JobList([]).passed_over() == ""


def test_sub_folders_keep_their_structure_and_results_are_not_read_again(mixed):
    out = mixed / "sub" / "results"
    out.mkdir()
    (out / "old.png").touch()
    found = plan_jobs([mixed], out, NamingRules(recursive=True))
    assert written(found, out) == ["a.png", "b.png", "c.jfif", "d.png", "sub/e.png", "sub/deep/f.jpg"]
    assert (out / "sub" / "deep").is_dir()
    assert found.folders == 0
    assert found.others.total() == 3


def test_a_result_folder_inside_the_input_is_no_sub_folder_that_was_missed(mixed, tmp_path):
    (mixed / "results").mkdir()
    assert plan_jobs([mixed], tmp_path / "out").folders == 2
    assert plan_jobs([mixed], mixed / "results").folders == 1


def test_several_pictures_go_into_a_folder(mixed, tmp_path):
    found = plan_jobs([mixed / "a.png", mixed / "sub" / "e.png", mixed / "sub" / "deep"], f"{tmp_path}/new/")
    assert written(found, tmp_path / "new") == ["a.png", "e.png", "f.jpg"]
    with pytest.raises(IcmsrError, match=r"one\.png: is not a folder: several pictures need a folder"):
        plan_jobs([mixed / "a.png", mixed / "sub" / "e.png"], tmp_path / "one.png")


@pytest.mark.parametrize("ending", sorted({"/", os.sep}))
def test_an_output_that_ends_with_a_slash_is_a_folder(mixed, tmp_path, ending):
    assert written(plan_jobs([mixed / "a.png"], f"{tmp_path}{os.sep}newdir{ending}"), tmp_path) == ["newdir/a.png"]


def test_patterns_are_expanded_where_the_shell_left_them(mixed, tmp_path):
    found = plan_jobs([f"{mixed}/[ac].*"], tmp_path / "out")
    assert written(found, tmp_path / "out") == ["a.png", "c.jfif"]
    with pytest.raises(IcmsrError, match=r"\*\.nef: no file matches this pattern"):
        plan_jobs([f"{mixed}/*.nef"], tmp_path / "out")


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    (tmp_path / "a[1].png").touch()
    assert plan_jobs([tmp_path / "a[1].png"], tmp_path / "b.png").jobs == [
        Job(tmp_path / "a[1].png", tmp_path / "b.png")
    ]


def test_one_format_for_all_results(mixed, tmp_path):
    rules = NamingRules(extension=".webp")
    found = plan_jobs([mixed], tmp_path / "out", rules)
    assert written(found, tmp_path / "out") == [f"{name}.webp" for name in "abcd"]
    assert written(plan_jobs([mixed / "a.png"], tmp_path / "one", rules), tmp_path) == ["one.webp"]
    with pytest.raises(IcmsrError, match=r"one\.png: the output's extension is not that of --format webp"):
        plan_jobs([mixed / "a.png"], tmp_path / "one.png", rules)


def test_existing_results_are_left_out_when_asked_and_overwritten_otherwise(mixed, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "b.png").touch()
    assert len(plan_jobs([mixed], out).jobs) == 4
    found = plan_jobs([mixed], out, NamingRules(skip_existing=True))
    assert written(found, out) == ["a.png", "c.jfif", "d.png"]
    assert found.existing == 1
    assert found.passed_over().startswith("skipped: 1 whose result exists, 3 that are not pictures")


def test_two_sources_never_become_one_result(mixed, tmp_path):
    (mixed / "a.bmp").touch()
    with pytest.raises(IcmsrError, match=r"a\.bmp and a\.png would both be written to .*a\.png: rename one"):
        plan_jobs([mixed], tmp_path / "out")
    with pytest.raises(IcmsrError, match="would both be written"):
        plan_jobs([mixed / "a.png", mixed / "a.png"], tmp_path / "other")


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("none.png", "out.png", r"none\.png: no such file or folder"),
        ("sub/e.png", "out.gif", r"out\.gif: cannot write this kind of file: use one of \.png"),
        ("sub/e.png", "out", "cannot write this kind of file"),
        (".", ".", "would overwrite an input"),
        ("empty", "out", r"empty: no pictures in this folder$"),
        ("nested", "out", "no pictures in this folder, only sub-folders: use --recursive"),
    ],
)
def test_what_cannot_be_done_is_refused(mixed, source, target, words):
    (mixed / "empty").mkdir()
    (mixed / "nested" / "inner").mkdir(parents=True)
    with pytest.raises(IcmsrError, match=words):
        plan_jobs([mixed / source], mixed / target)


@pytest.mark.parametrize(
    ("size", "name", "settings", "refused"),
    [
        ((4100, 8), "a.webp", UpscaleSettings(), True),
        ((4000, 8), "a.webp", UpscaleSettings(), False),
        ((8, 4100), "a.webp", UpscaleSettings(), True),
        ((4100, 8), "a.webp", UpscaleSettings(scale=2), False),
        ((4100, 8), "a.png", UpscaleSettings(), False),
        ((8, 8), "a.jpg", UpscaleSettings(size=(65501, 8)), True),
    ],
)
def test_a_result_that_its_format_cannot_hold_is_known_from_the_header(tmp_path, size, name, settings, refused):
    Image.new("RGB", size).save(tmp_path / "in.png")
    job = Job(tmp_path / "in.png", tmp_path / name)
    found = too_large_results([job], settings)
    assert (job in found) == refused
    if refused:
        assert "in.png: the result has" in found[job]
        assert "use --format png or tif" in found[job]


def test_a_damaged_header_is_no_matter_of_size(tmp_path):
    (tmp_path / "in.png").write_text("not a picture")
    assert too_large_results([Job(tmp_path / "in.png", tmp_path / "a.webp")], UpscaleSettings()) == {}


def test_a_picture_that_no_memory_here_holds_is_refused_from_its_header(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png_file(20_000, 20_000, 8, 2, b""))
    jobs = plan_jobs([tmp_path / "large.png"], tmp_path / "out.png").jobs
    ((job, reason),) = too_much_memory(jobs, UpscaleSettings(), 8e9).items()
    assert job.source == tmp_path / "large.png"
    assert reason == (
        f"{job.source}: from 20000 x 20000 to 80000 x 80000 pixels takes at least 158.4 GB of memory, 8.0 GB are free: "
        "choose a smaller scale or size, cut the picture into parts, or close other programs"
    )
    assert too_much_memory(jobs, UpscaleSettings(), 200e9) == {}
    assert too_much_memory(jobs, UpscaleSettings(), None) == {}


def test_the_command_says_it_before_a_model_is_loaded(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "large.png").write_bytes(png_file(20_000, 20_000, 8, 2, b""))
    monkeypatch.setattr("icmsr_core.upscale.free_memory.free_system_memory", lambda: 8e9)
    monkeypatch.setattr("icmsr_core.cli.main.load_networks", lambda _: pytest.fail("a model was loaded"))
    assert main(["upscale", str(tmp_path / "large.png"), str(tmp_path / "out.png")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "large.png: from 20000 x 20000 to 80000 x 80000 pixels takes at least 158.4 GB of memory, 8.0 GB" in line


def test_shards_hold_every_picture_once_wherever_the_folder_is(tmp_path):
    names = {f"{folder}/{number}.png" for folder in ("a", "b/c") for number in range(40)}
    found = {}
    for place in ("here", "mounted/elsewhere"):
        for name in names:
            path = tmp_path / place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        for number in (1, 2, 3):
            rules = NamingRules(recursive=True, shard=(number, 3))
            listed = plan_jobs([tmp_path / place], tmp_path / "out", rules)
            found[place, number] = {job.inside for job in listed.jobs}
            assert listed.elsewhere == 80 - len(listed.jobs)
            assert listed.passed_over() == f"skipped: {listed.elsewhere} of other shards"
            assert len(listed.jobs) > 15, "about as many in each"
    shards = [found["here", number] for number in (1, 2, 3)]
    assert set().union(*shards) == names
    assert sum(map(len, shards)) == 80
    assert [found["mounted/elsewhere", number] for number in (1, 2, 3)] == shards


def test_a_picture_s_shard_never_changes():
    """Parts of one folder may be done by different versions."""
    assert [shard_of(name, 5) for name in ("a.png", "b/c.png", "\u00e4.png", "\udce4.png")] == [3, 1, 3, 2]


def test_a_shard_counts_its_own_existing_results_only(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for number in range(12):
        (source / f"{number}.png").touch()
        (out / f"{number}.png").touch()
    listed = plan_jobs([source], out, NamingRules(skip_existing=True, shard=(1, 2)))
    assert listed.jobs == []
    assert listed.existing + listed.elsewhere == 12
    assert listed.existing == sum(shard_of(f"{number}.png", 2) == 1 for number in range(12))


def test_pictures_of_different_shards_that_would_become_one_file_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    names = ("one.jpg", "one.png")
    assert {shard_of(name, 7) for name in names} != {shard_of(names[0], 7)}
    for name in names:
        (tmp_path / "in" / name).touch()
    for number in range(1, 8):
        with pytest.raises(IcmsrError, match="would both be written"):
            plan_jobs([tmp_path / "in"], tmp_path / "out", NamingRules(".png", shard=(number, 7)))
