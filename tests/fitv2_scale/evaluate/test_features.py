"""Files of arrays: what is read of them, and what is refused."""

import pickle
import zipfile

import numpy as np
import pytest

from data_sharding.errors import UserError
from fitv2_scale.evaluate.features import npz_bytes, read_npz


def test_arrays_are_read_as_they_were_written(tmp_path):
    arrays = {"pool": np.arange(6.0).reshape(2, 3), "network": np.array("ab")}
    np.savez(tmp_path / "a.npz", **arrays)
    for source in (str(tmp_path / "a.npz"), npz_bytes(arrays)):
        found = read_npz(source)
        assert found.keys() == arrays.keys() and all((found[name] == arrays[name]).all() for name in arrays)
        assert read_npz(source, ("pool", "mu")).keys() == {"pool"}


def test_a_file_that_is_not_there_or_no_npz_is_named(tmp_path):
    file = tmp_path / "a.npz"
    with pytest.raises(UserError) as said:
        read_npz(str(file))
    assert str(said.value) == f"there is no file {file}"
    np.savez(file, pool=np.array([{}]))  # pickled
    bad = [file.read_bytes(), b"", b"text", pickle.dumps(np.ones(2)), npz_bytes({"pool": np.ones(9)})[:-30]]
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("pool", b"text")
    for data in [*bad, (tmp_path / "b.npz").read_bytes()]:
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.npz is not an intact \.npz of plain arrays \(.*\): get it again"):
            read_npz(str(file))
