"""What is read by chunks is what lies in the files, however the spans lie to the chunks and to each other."""

import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_sharding.storage.local_store import LocalStore
from fitv2_scale.checkpoint import checksums
from fitv2_scale.checkpoint.checksums import ChunkDigests, ChunkReader, Damaged, FileSpan

SMALL = 8  # bytes of a chunk here


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "CHUNK", SMALL)
        yield


def write(folder: Path, contents: dict[str, bytes]) -> ChunkReader:
    files = {}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
        digests = ChunkDigests()
        digests.update(data)
        files[name] = {"bytes": len(data), "xxh3_128": digests.hexdigests()}
    return ChunkReader(LocalStore(str(folder)), ".", files)


def read(reader: ChunkReader, wanted: list[FileSpan]) -> list[bytes]:
    memory = [bytearray(span.end - span.begin) for span in wanted]
    assert list(reader.fill(wanted, lambda place: memoryview(memory[place]))) == list(range(len(wanted)))
    return list(map(bytes, memory))


@st.composite
def files_and_spans(draw) -> tuple[dict[str, bytes], list[FileSpan]]:
    # Lengths are drawn, not bytes: these would be few, and there must be more chunks than are fetched ahead.
    sizes = {name: draw(st.integers(1, 12 * SMALL)) for name in ("a", "b")}
    contents = {name: random.Random(name).randbytes(size) for name, size in sizes.items()}
    wanted = []
    for name in draw(st.lists(st.sampled_from(["a", "b"]), max_size=20)):
        begin = draw(st.integers(0, len(contents[name]) - 1))
        wanted.append(FileSpan(name, begin, draw(st.integers(begin + 1, len(contents[name])))))
    return contents, sorted(wanted, key=lambda s: (s.file, s.begin)) if draw(st.booleans()) else wanted


@given(files_and_spans())
def test_spans_hold_what_the_files_hold(drawn):
    contents, wanted = drawn
    with TemporaryDirectory() as folder:
        found = read(write(Path(folder), contents), wanted)
    assert found == [contents[span.file][span.begin : span.end] for span in wanted]


@pytest.mark.parametrize("at", [0, SMALL, 5 * SMALL - 1])
def test_a_flipped_bit_is_found_before_its_chunk_is_used(tmp_path, at):
    data = bytes(range(5 * SMALL))
    reader = write(tmp_path, {"a": data})
    (tmp_path / "a").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    memory = bytearray(len(data))
    with pytest.raises(Damaged, match="a does not match its digest"):
        list(reader.fill([FileSpan("a", 0, len(data))], lambda _: memoryview(memory)))
    sound = at // SMALL * SMALL
    assert memory[:sound] == data[:sound] and not any(memory[sound:])
