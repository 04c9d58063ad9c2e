"""Writing: the same bytes every time, kills included; bad images and bad options end in one sentence."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from waiting import wait

from data_sharding import build, pool, shard_task, sources
from data_sharding.codec import get_codec
from data_sharding.errors import UserError
from data_sharding.extents import Extent
from data_sharding.frames import read_frame
from data_sharding.manifest import Manifest
from data_sharding.sources import Entry, open_folder, sample_id
from data_sharding.verify import verify
from data_sharding.write import write_dataset


def make_images(root: Path, count: int, side: int = 40) -> None:
    """``count`` small photographs' worth of noise and slopes, of varied shape, in three classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        h, w = rng.integers(side, 3 * side, 2)
        pixels = (np.linspace(0, 200, w)[None, :, None] + rng.integers(0, 56, (h, w, 3))).astype(np.uint8)
        folder = root / ("ant", "bee", "cow")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i:03d}.jpg")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    make_images(root, 60)
    return str(root)


def bytes_of(root) -> dict[str, bytes]:
    return {str(f.relative_to(root)): f.read_bytes() for f in Path(root).rglob("*") if f.is_file()}


def ids_of(url) -> list[int]:
    return Manifest.load(str(url)).sample_id.tolist()


OPTIONS = {"max_tokens": 16, "holdout": 0.1, "images_per_shard": 7, "progress": False}


@pytest.fixture(scope="module")
def written(images, tmp_path_factory):
    dst = tmp_path_factory.mktemp("undisturbed") / "set"
    return dst, write_dataset(images, str(dst), workers=1, **OPTIONS)


def test_every_image_is_there_once_with_its_label(images, written):
    dst, report = written
    entries = {entry.id: entry for entry in open_folder(images).entries}
    train, held = ids_of(dst), ids_of(dst / "holdout")
    assert sorted(train + held) == sorted(entries) and len(held) == 6 == report.held_out
    assert (report.images, report.skipped, report.shards, report.encoded) == (54, 0, 8 + 1, 60)
    assert train == sorted(train)
    for url in (dst, dst / "holdout"):
        assert verify(str(url)).problems == ()
        manifest = Manifest.load(str(url))
        assert manifest.classes == ("ant", "bee", "cow")
        assert manifest.label.tolist() == [entries[i].label for i in manifest.sample_id.tolist()]
    assert not list(dst.rglob("parts")) and not list(dst.rglob("*.tmp"))


def test_views_and_flips_are_those_of_the_pixels(images, written):
    from data_sharding.views import encode_views, load_rgb, views_of

    entries = {entry.id: entry for entry in open_folder(images).entries}
    manifest = Manifest.load(str(written[0]))
    crops = 0
    for sample in read_frame(manifest, 0):
        image = load_rgb(entries[sample.id].data.read())
        expected = encode_views({0: views_of(image, 16)}, get_codec("dct"))[0]
        assert sample.views.keys() == expected.keys()
        crops += "crop" in expected
        for view, array in expected.items():
            np.testing.assert_array_equal(sample.views[view], array)
    assert crops > 0


def test_two_processes_write_the_same_bytes_as_one(images, written, tmp_path):
    write_dataset(images, str(tmp_path / "set"), workers=2, **OPTIONS)
    assert bytes_of(tmp_path / "set") == bytes_of(written[0])


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill_when(seen: Callable[[], object], process: subprocess.Popen) -> list[int]:
    """Kills the process as soon as ``seen()``, while it runs; gives its workers, of which none is left."""
    wait("what is to be seen", lambda: seen() or process.poll() is not None)
    assert process.poll() is None
    workers = children(process.pid)
    process.kill()
    process.wait()
    wait("the workers to be gone", lambda: not any(running(pid) for pid in workers))
    return workers


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_killed_twice_and_started_again_it_writes_the_same_bytes(tmp_path):
    make_images(tmp_path / "images", 48, side=200)  # large enough that a shard takes a while
    src, dst = str(tmp_path / "images"), tmp_path / "set"
    options = {**OPTIONS, "images_per_shard": 3}
    write_dataset(src, str(tmp_path / "whole"), workers=1, **options)
    arguments = f"{src!r}, {str(dst)!r}, workers=2, **{options}"
    call = f"from data_sharding.write import write_dataset; write_dataset({arguments})"
    kept = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", call], cwd=Path(__file__).parents[1])
        workers = kill_when(lambda n=kept + 2: len(list(dst.rglob("shard-*.json"))) >= n, process)
        kept = len(list(dst.rglob("shard-*.json")))
        assert workers and not (dst / "manifest.json").exists()
    done_before = {file: file.stat().st_mtime_ns for file in dst.glob("*.tar.zst")}
    (dst / "shard-000000.tar.zst.0123.tmp").write_bytes(b"what a killed writer leaves")
    report = write_dataset(src, str(dst), workers=1, **options)
    assert report.encoded <= 48 - 3 * kept + 3
    recorded = sum(file.stat().st_mtime_ns == at for file, at in done_before.items())
    assert recorded >= kept - 2  # the holdout's shards lie elsewhere
    assert bytes_of(dst) == bytes_of(tmp_path / "whole")


def test_a_finished_dataset_is_left_alone(images, written):
    dst, first = written
    before = {file: file.stat().st_mtime_ns for file in dst.rglob("*")}
    again = write_dataset(images, str(dst), **OPTIONS)
    assert {file: file.stat().st_mtime_ns for file in dst.rglob("*")} == before
    assert again.encoded == 0
    assert (again.images, again.held_out, again.shards, again.bytes) == (
        first.images, first.held_out, first.shards, first.bytes,
    )  # fmt: skip


@pytest.mark.parametrize("change", [{"max_tokens": 25}, {"holdout": 0.2}, {"images_per_shard": 8}])
def test_other_options_are_refused_finished_or_not(images, written, tmp_path, monkeypatch, change):
    name = next(iter(change))
    with pytest.raises(UserError, match=f"was begun with another {name} .*or another folder"):
        write_dataset(images, str(written[0]), **{**OPTIONS, **change})
    monkeypatch.setattr(build, "run_tasks", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit):
        write_dataset(images, str(tmp_path), workers=1, **OPTIONS)
    with pytest.raises(UserError, match=f"was begun with another {name} "):
        write_dataset(images, str(tmp_path), **{**OPTIONS, **change})


def test_another_source_is_refused(images, written, tmp_path):
    make_images(tmp_path / "fewer", 59)
    with pytest.raises(UserError, match="was begun with another source"):
        write_dataset(str(tmp_path / "fewer"), str(written[0]), **OPTIONS)


def test_holdout_is_exact_and_independent_of_sharding(images, written, tmp_path):
    write_dataset(images, str(tmp_path / "other"), workers=1, **{**OPTIONS, "images_per_shard": 50})
    assert ids_of(tmp_path / "other/holdout") == ids_of(written[0] / "holdout")
    assert ids_of(tmp_path / "other") == ids_of(written[0])
    assert Manifest.load(str(tmp_path / "other")).digest != Manifest.load(str(written[0])).digest


def test_unreadable_images_are_listed_and_the_rest_is_written(tmp_path):
    make_images(tmp_path / "images", 12)
    good = tmp_path / "images/ant/000.jpg"
    truncated, text = tmp_path / "images/bee/001.jpg", tmp_path / "images/cow/002.jpg"
    data = truncated.read_bytes()
    truncated.write_bytes(data[: len(data) // 2])
    text.write_text("this is no image")
    (tmp_path / "images/ant/notes.txt").write_text("not named like an image, so left aside")
    options = {"max_tokens": 16, "images_per_shard": 1, "progress": False}  # two shards have no image left
    report = write_dataset(str(tmp_path / "images"), str(tmp_path / "set"), workers=1, **options)
    assert (report.images, report.skipped, report.shards) == (10, 2, 10)
    skipped = json.loads((tmp_path / "set/skipped.json").read_bytes())
    assert [entry["source"] for entry in skipped] == ["bee/001.jpg", "cow/002.jpg"]
    assert "truncated" in skipped[0]["reason"] and skipped[1]["reason"] == "not an image of a known format"
    assert sample_id("ant/000.jpg") in ids_of(tmp_path / "set") and good.exists()
    assert verify(str(tmp_path / "set")).problems == ()
    again = write_dataset(str(tmp_path / "images"), str(tmp_path / "set"), **options)
    assert (again.skipped, again.encoded) == (2, 0)  # still reported, so the command still fails


def test_no_readable_image_at_all_is_an_error(tmp_path):
    (tmp_path / "images/ant").mkdir(parents=True)
    (tmp_path / "images/ant/a.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"none of the 1 images of .* could be read, such as ant/a\.jpg \(not an image"):
        write_dataset(str(tmp_path / "images"), str(tmp_path / "set"), workers=1, progress=False)
    assert not (tmp_path / "set/manifest.json").exists()


def test_bad_sources_are_one_sentence_each(tmp_path):
    for make, message in (
        (lambda: None, "is not a folder"),
        (lambda: (tmp_path / "src").mkdir(), "is empty"),
        (lambda: (tmp_path / "src/a.jpg").write_bytes(b""), "holds no class folders"),
        (lambda: (tmp_path / "src/.git").mkdir(), "holds no class folders"),
        (lambda: (tmp_path / "src/ant").mkdir(), "hold no images"),
    ):
        make()
        with pytest.raises(UserError, match=message):
            write_dataset(str(tmp_path / "src"), str(tmp_path / "dst"))
        assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 200}, "must be a square number"),
        ({"max_tokens": 0}, "must be a square number"),
        ({"holdout": 1.0}, "at least 0 and below 1"),
        ({"holdout": 0.001}, "sets aside 0 of 60 images"),
        ({"images_per_shard": 0}, "at least 1"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"codec": "jpeg"}, "there is no codec 'jpeg': use 'dct' or 'sd-vae'"),
    ],
)
def test_bad_options_are_one_sentence_each(images, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        write_dataset(images, str(tmp_path / "dst"), progress=False, **options)


def test_a_destination_inside_the_source_is_refused(images):
    with pytest.raises(UserError, match="lies inside the source"):
        write_dataset(images, f"{images}/dst")
    assert not (Path(images) / "dst").exists()


def test_labels_follow_all_class_folders_and_ids_only_the_key(tmp_path):
    make_images(tmp_path / "a", 6)
    make_images(tmp_path / "elsewhere/b", 3)
    (tmp_path / "a/bat").mkdir()  # a class without images keeps its label
    here, there = open_folder(str(tmp_path / "a")), open_folder(str(tmp_path / "elsewhere/b"))
    assert here.classes == ("ant", "bat", "bee", "cow")
    assert {e.key: e.label for e in here.entries}["bee/001.jpg"] == 2
    assert {e.key: e.id for e in there.entries}.items() <= {e.key: e.id for e in here.entries}.items()
    assert all(0 <= e.id < 1 << 63 for e in here.entries)
    assert sample_id("bee/001.jpg") == 4103319333615632164  # frozen: ids name images in checkpoints and ledgers


def test_colliding_ids_are_an_error(images, monkeypatch):
    monkeypatch.setattr(sources, "sample_id", lambda key: 1)
    with pytest.raises(UserError, match=r"ant/000\.jpg and ant/003\.jpg have the same id by chance"):
        open_folder(images)


def test_a_worker_that_is_killed_is_reported_and_nothing_hangs(tmp_path):
    make_images(tmp_path / "images", 24, side=200)
    src, dst = str(tmp_path / "images"), str(tmp_path / "set")
    call = (
        "from data_sharding.errors import UserError\nfrom data_sharding.write import write_dataset\n"
        f"try: write_dataset({src!r}, {dst!r}, workers=2, images_per_shard=12, progress=False)\n"
        "except UserError as error: print(error)"
    )
    root = Path(__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.PIPE, text=True, cwd=root)
    # Two workers and multiprocessing's resource tracker.
    wait("workers", lambda: process.poll() is not None or len(children(process.pid)) >= 3)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    assert "a process was killed" in process.communicate()[0]


def test_an_error_in_a_worker_keeps_its_traceback(images, tmp_path):
    """A file that vanishes while writing is no bad image: it is an error, with the place where it happened."""
    class_folder = tmp_path / "images/ant"
    class_folder.mkdir(parents=True)
    for i in range(2):
        (class_folder / f"{i}.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(FileNotFoundError) as error:
        write_dataset(str(tmp_path / "images"), str(tmp_path / "set"), workers=2, images_per_shard=1, progress=False)
    assert "write_shard" in "".join(error.value.__notes__)


# several Slurm tasks


def start_task(call: str, place: int, count: int) -> subprocess.Popen:
    env = os.environ | {"SLURM_PROCID": str(place), "SLURM_NTASKS": str(count)}
    return subprocess.Popen([sys.executable, "-c", call], cwd=Path(__file__).parents[1], env=env)


def slurm_call(src, dst, **options) -> str:
    arguments = f"{str(src)!r}, {str(dst)!r}, **{options}"
    return f"from data_sharding.write import write_dataset; write_dataset({arguments})"


def test_each_task_begins_with_its_own_and_ends_with_the_others_from_behind(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "3")
    turns = []
    for place in range(3):
        monkeypatch.setenv("SLURM_PROCID", str(place))
        turns.append(pool.in_turn(list(range(8))))
    assert turns == [[0, 3, 6, 7, 4, 1, 5, 2], [1, 4, 7, 5, 2, 6, 3, 0], [2, 5, 6, 3, 0, 7, 4, 1]]
    monkeypatch.delenv("SLURM_PROCID")
    monkeypatch.delenv("SLURM_NTASKS")
    assert pool.in_turn(list(range(8))) == list(range(8))


def test_a_task_that_dies_leaves_its_shards_to_the_others(tmp_path):
    """Three tasks, one killed in the middle: the others finish, and the bytes are those of one process."""
    make_images(tmp_path / "images", 45, side=200)
    options = {**OPTIONS, "images_per_shard": 3, "workers": 1}
    write_dataset(str(tmp_path / "images"), str(tmp_path / "whole"), **options)
    dst = tmp_path / "set"
    tasks = [start_task(slurm_call(tmp_path / "images", dst, **options), place, 3) for place in range(3)]
    wait("a shard", lambda: list(dst.rglob("shard-*.json")))
    assert tasks[1].poll() is None
    tasks[1].kill()
    assert [task.wait() for task in tasks] == [0, -signal.SIGKILL, 0]
    assert_same_dataset(dst, tmp_path / "whole")


def assert_same_dataset(dst: Path, whole: Path) -> None:
    """A task that was beaten to the end by a hair may leave a record behind; the next call removes it."""
    found = {name: data for name, data in bytes_of(dst).items() if not name.startswith(("parts/", "holdout/parts/"))}
    assert found == bytes_of(whole)


def test_a_number_of_tasks_that_is_not_true_costs_nothing(images, written, tmp_path):
    """SLURM_NTASKS is set in a batch script too, where one process runs alone."""
    task = start_task(slurm_call(images, tmp_path / "set", workers=1, **OPTIONS), 3, 4)
    assert task.wait() == 0
    assert bytes_of(tmp_path / "set") == bytes_of(written[0])


def test_work_on_a_shard_ends_when_another_task_has_it(images, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_task, "_CHUNK", 2)
    entries = open_folder(images).entries[:6]
    seen, reported = [], []

    def make(items):
        seen.extend(items)
        if len(seen) == 4:
            shard_task.put(task.part, b"{}")
        return [shard_task.Skipped(item.key, "for the test") for item in items]

    task = shard_task.ShardTask(str(tmp_path), str(tmp_path), "shard-000000.tar.zst", entries, ("ant",), make)
    shard_task.write_shard(task, lambda count, fresh: reported.append((count, fresh)))
    assert len(seen) == 4 and reported == [(2, True), (2, True), (2, False)]
    assert Path(task.part).read_bytes() == b"{}"


def test_a_task_that_comes_last_to_commit_finds_it_done(images, written, tmp_path, monkeypatch):
    """Another one has committed and cleaned up between its last shard and its own commit."""
    honest = build._commit

    def beaten(src, datasets, *rest):
        honest(src, datasets, *rest)
        for url in datasets:
            build._clean(url)
        honest(src, datasets, *rest)

    monkeypatch.setattr(build, "_commit", beaten)
    report = write_dataset(images, str(tmp_path / "set"), workers=1, **OPTIONS)
    assert (report.images, report.held_out) == (54, 6)
    assert bytes_of(tmp_path / "set") == bytes_of(written[0])


def test_a_shard_finished_after_the_commit_leaves_no_record(tmp_path):
    def make(items):
        shard_task.put(f"{tmp_path}/manifest.json", b"{}")  # another task commits meanwhile
        return [shard_task.Skipped(item.key, "for the test") for item in items]

    item = Entry(1, "ant/1.jpg", 0, Extent("", None, 0))
    task = shard_task.ShardTask(str(tmp_path), str(tmp_path), "shard-000000.tar.zst", (item,), (), make)
    shard_task.write_shard(task, lambda *_: None)
    assert list(tmp_path.iterdir()) == [tmp_path / "manifest.json"]
