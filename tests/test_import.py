"""Importing the published latents, from files made to their description: every layout, every kind of damage."""

import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from test_write import bytes_of, kill_when

from data_sharding import unpack
from data_sharding.errors import UserError
from data_sharding.extents import exists
from data_sharding.frames import read_frame
from data_sharding.import_latents import import_dataset
from data_sharding.manifest import Manifest
from data_sharding.sources import sample_id
from data_sharding.verify import verify

GROUPS = ("from_16_to_16", "greater_than_16_resize", "greater_than_16_crop")
OPTIONS = {"images_per_shard": 6, "workers": 1, "progress": False}


def latent(name: str, h: int, w: int, of: int, **changes) -> bytes:
    """One published file. ``grid`` counts columns, then rows, as the released ``fit/model/rope.py`` reads it."""
    rng = np.random.default_rng(sum(name.encode()) + 1000 * h + w)
    columns, rows = np.meshgrid(np.arange(w), np.arange(h))
    tensors = {
        "feature": rng.standard_normal((2, h, w, 16)).astype(np.float32),
        "grid": np.stack([columns.ravel(), rows.ravel()]).astype(np.float32),
        "size": np.array([h, w], np.int32),
        "label": np.array(of, np.int64),
    } | changes
    return save({key: np.asarray(value, order="C") for key, value in tensors.items() if value is not None})


def published() -> dict[str, dict[str, bytes]]:
    """Group to file name to bytes: 20 small images, 20 large ones, of which 12 have a crop view; two in subfolders."""
    files = {group: {} for group in GROUPS}
    files[GROUPS[0]]["n1/same.safetensors"] = latent("a", 2, 2, 5)
    files[GROUPS[1]]["n2/same.safetensors"] = latent("b", 2, 6, 6)
    for i in range(20):
        files[GROUPS[0]][f"s{i}.safetensors"] = latent(f"s{i}", 1 + i % 4, 2 + i % 3, i % 7)
        files[GROUPS[1]][f"l{i}.safetensors"] = latent(f"l{i}", 3 + i % 2, 4, i % 7)
        if i % 5 < 3:
            files[GROUPS[2]][f"l{i}.safetensors"] = latent(f"c{i}", 4, 4, i % 7)
    return files


def write_folder(root: Path, group: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = root / group / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def tar_of(group: str, files: dict[str, bytes], prefix: str) -> bytes:
    """In another order than the folder's: nobody has promised one."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        folder = tarfile.TarInfo(f"{prefix}{group}")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in sorted(files, key=lambda name: name[::-1]):
            info = tarfile.TarInfo(f"{prefix}{group}/{name}")
            info.size = len(files[name])
            tar.addfile(info, io.BytesIO(files[name]))
    return buffer.getvalue()


def write_layout(root: Path, layout: str, files=None) -> Path:
    root.mkdir(parents=True)
    (root / "README.md").write_text("left aside")
    write_folder(root, "less_than_16", {"tiny.safetensors": b"never read"})
    for group, members in (files or published()).items():
        if layout == "folders":
            write_folder(root, group, members)
            continue
        data = tar_of(group, members, "./" if layout == "tar" else "datasets/x/" if layout == "parts" else "")
        if layout != "tar":
            half = len(data) // 2  # gzip members one after the other are one file too
            data = gzip.compress(data[:half], 1) + gzip.compress(data[half:], 1)
        if layout == "parts" and group == GROUPS[0]:
            third = len(data) // 3 + 1
            for i, name in enumerate(("aa", "ab", "ac")):
                (root / f"{group}.tar.gz.part_{name}").write_bytes(data[i * third : (i + 1) * third])
        else:
            (root / f"{group}.{'tar' if layout == 'tar' else 'tar.gz'}").write_bytes(data)
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder, and the dataset made of it."""
    root = tmp_path_factory.mktemp("published")
    src = write_layout(root / "src", "folders")
    return src, root / "set", import_dataset(str(src), str(root / "set"), **OPTIONS)


def shards_of(root: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in root.glob("*.zst")}


def test_every_image_is_there_with_both_views_and_both_flips(whole):
    _, dst, report = whole
    files = published()
    assert (report.images, report.skipped, report.encoded, report.shards) == (42, 0, 42, 7)
    manifest = Manifest.load(str(dst))
    assert verify(str(dst)).problems == ()
    assert manifest.header.codec["name"] == "sd-vae" and manifest.header.codec["scale"] == 0.18215
    assert "published" in manifest.header.codec["digest"]
    assert manifest.header.max_tokens == 16 and manifest.header.dtype == "float16" and len(manifest.classes) == 1000
    samples = {s.id: s for f in range(len(manifest.frame_shard)) for s in read_frame(manifest, f)}
    assert samples.keys() == {sample_id(name) for group in GROUPS[:2] for name in files[group]}
    from safetensors.numpy import load

    crops = 0
    for view, group in (("resize", GROUPS[0]), ("resize", GROUPS[1]), ("crop", GROUPS[2])):
        for name, data in files[group].items():
            sample, tensors = samples[sample_id(name)], load(data)
            np.testing.assert_array_equal(sample.views[view], tensors["feature"].astype(np.float16))
            assert sample.label == tensors["label"]
            crops += view == "crop"
    assert sum("crop" in s.views for s in samples.values()) == crops == 12


@pytest.mark.parametrize("layout", ["tar", "gz", "parts"])
def test_packed_or_not_it_is_the_same_dataset(whole, tmp_path, layout):
    src = write_layout(tmp_path / "src", layout)
    report = import_dataset(str(src), str(tmp_path / "set"), **{**OPTIONS, "workers": 2})
    assert report.skipped == 0
    assert shards_of(tmp_path / "set") == shards_of(whole[1])
    assert not list((tmp_path / "set").rglob("parts"))  # the unpacked tars are gone
    again = import_dataset(str(src), str(tmp_path / "set"), **OPTIONS)  # and are not made again
    assert (again.encoded, again.images) == (0, 42)


def test_two_processes_write_the_same_bytes_as_one(whole, tmp_path):
    import_dataset(str(whole[0]), str(tmp_path / "set"), **{**OPTIONS, "workers": 2})
    assert bytes_of(tmp_path / "set") == bytes_of(whole[1])


def test_holdout(whole, tmp_path):
    report = import_dataset(str(whole[0]), str(tmp_path / "set"), **OPTIONS, holdout=0.1)
    assert (report.images, report.held_out) == (38, 4)
    assert verify(str(tmp_path / "set/holdout")).problems == ()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_killed_while_unpacking_and_while_writing_it_writes_the_same_bytes(tmp_path):
    files = published()
    for i in range(300):
        files[GROUPS[1]][f"m{i}.safetensors"] = latent(f"m{i}", 4, 4, 1)
    src, dst = write_layout(tmp_path / "src", "parts", files), tmp_path / "set"
    options = {**OPTIONS, "images_per_shard": 2, "workers": 2}
    import_dataset(str(src), str(tmp_path / "whole"), **options)
    # Slow enough to be killed in the middle: in the first process only, so the second one is as shipped.
    call = (
        "import time\nfrom data_sharding import unpack\n"
        "class Slow(unpack._Joined):\n"
        "    def read(self, *a): time.sleep(0.2); return super().read(*a)\n"
        "unpack._BLOCK = 1 << 12\nunpack._Joined = Slow\n"
        "from data_sharding.import_latents import import_dataset\n"
        f"import_dataset({str(src)!r}, {str(dst)!r}, **{options | {'workers': 1}})"
    )
    kill_when(lambda: list(dst.rglob("*.tmp")), start(call))
    assert list(dst.rglob("*.tmp")) and not (dst / "manifest.json").exists()
    call = (
        "from data_sharding.import_latents import import_dataset\n"
        f"import_dataset({str(src)!r}, {str(dst)!r}, **{options})"
    )
    kill_when(lambda: len(list(dst.rglob("shard-*.json"))) > 3, start(call))
    unpacked = {file: file.stat().st_mtime_ns for file in (dst / "parts").rglob("*.tar")}
    assert len(unpacked) == 3 and not (dst / "manifest.json").exists()
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(unpack, "run_tasks", lambda *_: pytest.fail("it unpacks again"))
        report = import_dataset(str(src), str(dst), **OPTIONS | {"images_per_shard": 2})
    assert 0 < report.encoded < 342
    assert bytes_of(dst) == bytes_of(tmp_path / "whole")


def start(call: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", call], cwd=Path(__file__).parents[1])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"feature": None}, "it holds no 'feature'"),
        ({"label": None}, "it holds no 'label'"),
        ({"feature": np.zeros((3, 4, 16), np.float32)}, r"feature is float32\[3, 4, 16\], not float32\[2, h, w, 16\]"),
        ({"feature": np.zeros((2, 3, 4, 16), np.int32)}, "feature is int32"),
        ({"feature": np.full((2, 3, 4, 16), np.nan, np.float32)}, "not finite in float16"),
        ({"feature": np.full((2, 3, 4, 16), 7e4, np.float32)}, "not finite in float16"),
        ({"size": np.array([4, 3])}, r"size \[4, 3\] is not that of the feature, \[3, 4\]"),
        ({"grid": np.zeros((2, 12))}, "grid does not count"),
        ({"grid": np.mgrid[:3, :4].reshape(2, -1)}, "grid does not count"),  # rows first
        ({"grid": np.zeros((2, 11))}, "grid does not count"),
        ({"label": np.array(1000)}, r"label \[1000\] is not one of 0 \.\. 999"),
        ({"label": np.array(0.5)}, r"label \[0\.5\]"),
    ],
)
def test_a_file_that_is_not_as_described_is_named_and_left_out(tmp_path, changes, reason):
    files = {group: {} for group in GROUPS} | {GROUPS[0]: {"good.safetensors": latent("good", 3, 4, 0)}}
    files[GROUPS[1]] = {"bad.safetensors": latent("bad", 3, 4, 0, **changes)}
    files[GROUPS[2]] = {"bad.safetensors": latent("bad", 4, 4, 0)}
    check_skipped(tmp_path, files, reason)


def check_skipped(tmp_path, files, reason):
    report = import_dataset(str(write_layout(tmp_path / "src", "tar", files)), str(tmp_path / "set"), **OPTIONS)
    assert (report.images, report.skipped) == (1, 1)
    (entry,) = json.loads((tmp_path / "set/skipped.json").read_bytes())
    assert entry["source"] == "bad.safetensors"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(entry["reason"])
    assert verify(str(tmp_path / "set")).problems == ()


@pytest.mark.parametrize(
    ("resize", "crop", "reason"),
    [
        (latent("r", 3, 4, 0)[:-7], None, "no whole .safetensors"),
        (b"", None, "no whole .safetensors"),
        (latent("r", 3, 4, 1), latent("c", 4, 4, 2), "different labels"),
        (None, latent("c", 4, 4, 2), "a crop view, but no resize view"),
        (latent("r", 4, 5, 1), None, "4x5 are more than 16 tokens"),
    ],
)
def test_damaged_or_contradicting_files_are_named_and_left_out(tmp_path, resize, crop, reason):
    files = {GROUPS[0]: {"good.safetensors": latent("good", 3, 4, 0)}}
    files[GROUPS[1]] = {"bad.safetensors": resize} if resize is not None else {}
    files[GROUPS[2]] = {"bad.safetensors": crop} if crop is not None else {}
    check_skipped(tmp_path, files, reason)


def test_sources_that_lack_something_are_one_sentence_each(tmp_path):
    dst = str(tmp_path / "set")

    def refused(name: str, layout: str, match: str, change) -> None:
        src = write_layout(tmp_path / name, layout)
        change(src)
        with pytest.raises(UserError, match=match):
            import_dataset(str(src), dst, **OPTIONS)
        assert not Path(dst, "manifest.json").exists()
        shutil.rmtree(dst, ignore_errors=True)

    first = "from_16_to_16.tar.gz.part_"
    refused("group", "folders", "lacks greater_than_16_crop", lambda src: shutil.rmtree(src / GROUPS[2]))
    refused("none", "parts", "of from_16_to_16 the part before ac", lambda src: (src / f"{first}ab").unlink())
    refused("first", "parts", "the part before ab", lambda src: (src / f"{first}aa").unlink())
    refused("last", "parts", "from_16_to_16 ends too early: its last part", lambda src: (src / f"{first}ac").unlink())
    both = GROUPS[1] + ".tar"
    refused("both", "folders", "both as a folder and packed", lambda src: (src / both).write_bytes(b""))

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    refused("flip", "gz", f"{GROUPS[1]} is damaged", lambda src: flip(src / f"{GROUPS[1]}.tar.gz"))
    cut = GROUPS[2] + ".tar"
    refused("cut", "tar", "greater_than_16_crop.tar is cut short|no whole tar", lambda src: shorten(src / cut, 10240))
    refused("cut2", "tar", "no whole tar", lambda src: shorten(src / cut, 15000))
    refused("not", "tar", "no whole tar", lambda src: (src / cut).write_bytes(b"x" * 2000))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no latents as published"):
        import_dataset(str(tmp_path / "empty"), dst)
    with pytest.raises(UserError, match="is not a folder"):
        import_dataset(str(tmp_path / "nowhere"), dst)


def test_what_was_unpacked_from_a_bad_download_is_not_kept(whole, tmp_path):
    """The second download has the name and size of the first, and a cut tar has no checksum as gzip has."""
    src = write_layout(tmp_path / "src", "tar")
    data = bytearray((src / f"{GROUPS[0]}.tar").read_bytes())
    (src / f"{GROUPS[0]}.tar").unlink()
    first, second = src / f"{GROUPS[0]}.tar.part_aa", src / f"{GROUPS[0]}.tar.part_ab"
    second.write_bytes(data[5000:])
    data[100] ^= 1
    first.write_bytes(data[:5000])
    with pytest.raises(UserError, match="no whole tar"):
        import_dataset(str(src), str(tmp_path / "set"), **OPTIONS)
    data[100] ^= 1
    first.write_bytes(data[:5000])
    import_dataset(str(src), str(tmp_path / "set"), **OPTIONS)
    assert shards_of(tmp_path / "set") == shards_of(whole[1])


def shorten(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def test_which_set_must_be_said_where_there_are_two(tmp_path, whole):
    src = write_layout(tmp_path / "src", "folders")
    for group in GROUPS:
        (src / group.replace("16", "25").replace("from_25", "from_16")).mkdir()
    with pytest.raises(UserError, match="at most 16, 25 tokens: choose with --max-tokens"):
        import_dataset(str(src), str(tmp_path / "set"), **OPTIONS)
    import_dataset(str(src), str(tmp_path / "set"), max_tokens=16, **OPTIONS)
    assert shards_of(tmp_path / "set") == shards_of(whole[1])
    with pytest.raises(UserError, match="choose"):
        import_dataset(str(src), str(tmp_path / "other"), max_tokens=36, **OPTIONS)


def test_an_image_in_two_groups_is_refused(tmp_path):
    files = published()
    files[GROUPS[0]]["l3.safetensors"] = files[GROUPS[1]]["l3.safetensors"]
    with pytest.raises(UserError, match="the resize view of l3.safetensors occurs twice"):
        import_dataset(str(write_layout(tmp_path / "src", "folders", files)), str(tmp_path / "set"), **OPTIONS)


def test_another_source_or_option_is_refused(whole, tmp_path):
    files = published()
    del files[GROUPS[0]]["s3.safetensors"]
    src = write_layout(tmp_path / "src", "folders", files)
    with pytest.raises(UserError, match="was begun with another source"):
        import_dataset(str(src), str(whole[1]), **OPTIONS)
    with pytest.raises(UserError, match="was begun with another images_per_shard"):
        import_dataset(str(whole[0]), str(whole[1]), **OPTIONS | {"images_per_shard": 7})


def test_slurm_tasks_share_the_unpacking_and_take_over_what_one_leaves(whole, tmp_path, monkeypatch):
    """Task 1 of 2 unpacks its own archive; the others' it waits for, until they show no sign of life."""
    src, dst = write_layout(tmp_path / "src", "gz"), str(tmp_path / "set")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setattr(unpack, "_PATIENCE", 0.5)
    waited = []
    honest = unpack._others_work
    monkeypatch.setattr(unpack, "_others_work", lambda archive: waited.append(archive.name) or honest(archive))
    import_dataset(str(src), dst, **OPTIONS)
    assert waited == [GROUPS[0], GROUPS[2]]
    assert shards_of(tmp_path / "set") == shards_of(whole[1])


def test_waiting_for_an_archive_ends_when_it_is_there(tmp_path):
    archive = unpack.Archive("x", (("x", 1),), str(tmp_path / "x.tar"), mine=False)
    (tmp_path / "x.tar").write_bytes(b"unpacked by another")
    unpack._unpack(archive, lambda *_: None)
    assert (tmp_path / "x.tar").read_bytes() == b"unpacked by another"


def test_the_command(tmp_path, capsys):
    from fitv2_scale.cli import main

    files = published()
    files[GROUPS[0]]["bad.safetensors"] = b"\x00"
    src = write_layout(tmp_path / "src", "gz", files)
    assert main(["shard", "import", str(src), str(tmp_path / "set"), "--workers", "1", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["images"] == 42 and "1 of the images could not be read" in err
    assert exists(str(tmp_path / "set/skipped.json"))
