"""What torch.compile needs on a machine. A compiler that is tried is in test_preflight."""

import sysconfig

import pytest

from data_sharding.errors import UserError
from fitv2_scale.config.layout import LayoutConfig
from launchers.compiler_check import check_compiler


@pytest.mark.parametrize("folder", ["include", "none"])
def test_a_python_without_its_header_is_told_before_anything_is_compiled(folder, tmp_path, monkeypatch):
    (tmp_path / "include").mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / folder))
    monkeypatch.setenv("CXX", "/no/compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="Python.h is missing, which torch.compile needs: install python3-dev, or set"):
        check_compiler(LayoutConfig(compile=True), on_cuda=False)
