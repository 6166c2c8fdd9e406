"""Files out of packages: the right one or an error, and pickles that cannot run code."""

import hashlib
import io
import os
import pickle
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from entprog import packaged
from entprog.packaged import PackagedFileError, packaged_file, packaged_files, read_numpy_pickle, read_numpy_tensors

CONTENT = b"weights"
GOOD = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENTPROG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def source_archive(folder: Path) -> Path:
    with tarfile.open(folder / "thing-1.0.tar.gz", "w:gz") as archive:
        for name in ("thing-1.0/README", "thing-1.0/thing/a.bin"):
            info = tarfile.TarInfo(name)
            info.size = len(CONTENT)
            archive.addfile(info, io.BytesIO(CONTENT))
    return folder / "thing-1.0.tar.gz"


def wheel(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "thing-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("thing/a.bin", CONTENT)
    return folder / "thing-1.0-py3-none-any.whl"


@pytest.mark.parametrize("make", [source_archive, wheel])
def test_a_file_is_fetched_once_and_checked(make: Any, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    fetched = []

    def download(package: str, version: str, folder: Path) -> Path:
        fetched.append((package, version))
        return make(folder)

    monkeypatch.setattr(packaged, "_download", download)
    for _ in range(2):
        path = packaged_file("thing", "1.0", "thing/a.bin", GOOD)
        assert path.read_bytes() == CONTENT and path.is_relative_to(own_cache)
    assert fetched == [("thing", "1.0")]
    path.write_bytes(b"damaged")  # is noticed and fetched again
    assert packaged_file("thing", "1.0", "thing/a.bin", GOOD).read_bytes() == CONTENT and len(fetched) == 2
    with pytest.raises(PackagedFileError, match="another file"):
        packaged_file("thing", "1.0", "thing/a.bin", "0" * 64)
    with pytest.raises(PackagedFileError, match="no file 'thing/b.bin'"):
        packaged_files("thing", "1.0", {"thing/b.bin": GOOD})
    assert [p.name for p in (own_cache / "packages/thing-1.0/thing").iterdir()] == ["a.bin"]  # no partial files


def test_an_installed_distribution_is_used_without_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "_download", lambda *_: pytest.fail("downloaded"))
    file = Path(np.__file__)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert packaged_file("numpy", np.__version__, "numpy/__init__.py", digest).samefile(file)


def test_a_package_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def no_index(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", no_index)
    with pytest.raises(
        PackagedFileError, match=r"thing 1\.0 .*\n.*pip install --no-deps thing==1\.0\n(.*\n)*.*No match"
    ):
        packaged_file("thing", "1.0", "thing/a.bin", GOOD)
    assert all("--no-deps" in call for call in calls) and "--only-binary=:all:" in calls[-1]


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_in_nested_dicts_are_read(tmp_path: Path, protocol: int) -> None:
    saved = {"params": {"a/b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "step": np.float64(2)}
    (tmp_path / "w.ckpt").write_bytes(pickle.dumps(saved, protocol=protocol))
    read = read_numpy_pickle(tmp_path / "w.ckpt")
    assert np.array_equal(read["params"]["a/b"], saved["params"]["a/b"]) and read["step"] == 2
    for _ in range(2):  # the second time from the cache
        tensors = read_numpy_tensors(tmp_path / "w.ckpt")
        assert set(tensors) == {"params/a/b", "step"}
        assert torch.equal(tensors["params/a/b"], torch.arange(6.0).reshape(2, 3))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    "content",
    [{"a": Evil()}, {"a": np.array([Evil()], dtype=object)}, {"a": "text"}, {"a": [1, "b"]}, {1: np.zeros(2)}, [1.0]],
)
def test_pickles_of_anything_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.ckpt").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"w\.ckpt"):
        read_numpy_pickle(tmp_path / "w.ckpt")
    assert not (tmp_path / "evil").exists()


def test_damaged_pickles_are_refused(tmp_path: Path) -> None:
    whole = pickle.dumps({"a": np.zeros(9)})
    for damaged in (b"", whole[:-20], b"cos\nsystem\n(S'true'\ntR."):
        (tmp_path / "w.ckpt").write_bytes(damaged)
        with pytest.raises(ValueError, match="pickle of numpy arrays"):
            read_numpy_pickle(tmp_path / "w.ckpt")
