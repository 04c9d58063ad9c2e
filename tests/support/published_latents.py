"""Files of latents made as the published ones are described: folders, tars, compressed or in parts."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

GROUPS = ("from_16_to_16", "greater_than_16_resize", "greater_than_16_crop")
OPTIONS = {"images_per_shard": 6, "workers": 1, "progress": False}


def latent(name: str, h: int, w: int, of: int, **changes) -> bytes:
    """One published file. ``grid`` counts columns, then rows, as the released ``fit/model/rope.py`` reads it."""
    from safetensors.numpy import save

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


@pytest.fixture(scope="session")
def imported(tmp_path_factory):
    """The folder, and the dataset made of it."""
    from data_sharding.write.import_latents import import_dataset

    root = tmp_path_factory.mktemp("published")
    src = write_layout(root / "src", "folders")
    return src, root / "set", import_dataset(str(src), str(root / "set"), **OPTIONS)


def shards_of(root: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in root.glob("*.zst")}
