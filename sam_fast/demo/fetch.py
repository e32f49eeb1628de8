"""Finding the four Fashion-MNIST files: on this machine, in Debian's archive, or on the data set's own site.

The sources are tried in order of cost. Each is bounded in time and verified by checksum; when none works, the error
tells what was tried and what to do.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from .errors import DemoError
from .idx import read_idx

PACKAGE = "dataset-fashion-mnist"
PACKAGE_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package installs its files
SITES = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    "https://fashion-mnist.s3.eu-central-1.amazonaws.com/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)
APT_SECONDS = 120.0
DOWNLOAD_SECONDS = 600.0
CONNECT_SECONDS = 15.0
MAX_DOWNLOAD = 64 * 1024 * 1024  # bytes a file; the largest of the four has 26 MB
_CHUNK = 256 * 1024

Log = Callable[[str], None]


@dataclass(frozen=True)
class SetFile:
    """A file of the data set, with the SHA-256 of its contents uncompressed: gzip headers differ between the sources,
    the contents do not.
    """

    name: str
    sha256: str


@dataclass(frozen=True)
class RawSet:
    """The four arrays: uint8 images (n, height, width), uint8 labels (n,); and a line that says where they are from."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    source: str


TRAIN_IMAGES = SetFile("train-images-idx3-ubyte.gz", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888")
TRAIN_LABELS = SetFile("train-labels-idx1-ubyte.gz", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9")
TEST_IMAGES = SetFile("t10k-images-idx3-ubyte.gz", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b")
TEST_LABELS = SetFile("t10k-labels-idx1-ubyte.gz", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34")
FILES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)


def load_fashion_mnist(folder: Path | None, log: Log) -> RawSet:
    """The data set from ``folder``, or else from the first source that works.

    Args:
        folder: a folder with the four IDX files, gzipped or not. Their format is checked, their contents may be any
            data set of that form.
        log: takes one line of text for each source that is tried.

    Raises:
        DemoError: a file of ``folder`` is missing or wrong; or, without a folder, no source works.
    """
    if folder is not None:
        return read_folder(folder, verify=False, source=str(folder))
    tried: list[str] = []
    for title, obtain in (
        (f"Debian package {PACKAGE}, installed", _installed),
        ("files kept from an earlier run", _cached),
        (f"Debian package {PACKAGE}, without installing it", _from_debian),
        ("download from the data set's site", _from_sites),
    ):
        try:
            return read_folder(obtain(log), verify=True, source=title)
        except DemoError as error:
            tried.append(f"  - {title}: {error}")
        except OSError as error:
            tried.append(f"  - {title}: {error.strerror or error}")
    raise DemoError(
        "Fashion-MNIST could not be had. Tried:\n" + "\n".join(tried) + "\nWhat helps: install the Debian package "
        f"(apt-get install {PACKAGE}); or put the four files {', '.join(file.name for file in FILES)} in a folder and "
        "give it with --data FOLDER; "
        "or use --dataset digits, which needs no download."
    )


def read_folder(folder: Path, *, verify: bool, source: str) -> RawSet:
    """Read and check the four files of ``folder`` (with or without ``.gz``); ``verify`` compares their contents with
    the known checksums.

    Raises:
        DemoError: a file is missing, damaged or not what its name says; the message names it.
    """
    if not folder.is_dir():
        raise DemoError(f"{folder}: no such folder")
    missing = [file.name for file in FILES if _locate(folder, file) is None]
    if missing:
        raise DemoError(f"{folder}: missing {', '.join(missing)}")
    arrays = [read_idx(_locate(folder, file) or folder, sha256=file.sha256 if verify else None) for file in FILES]
    for file, images, labels in ((TRAIN_IMAGES, arrays[0], arrays[1]), (TEST_IMAGES, arrays[2], arrays[3])):
        where = _locate(folder, file)
        if images.dim() != 3:
            raise DemoError(f"{where}: holds {images.dim()} dimensions, images have 3 (number, height, width)")
        if labels.dim() != 1 or len(labels) != len(images):
            raise DemoError(
                f"{where}: {len(images)} images, but the file of labels next to it has the shape {tuple(labels.shape)}"
            )
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise DemoError(
            f"{folder}: training images of {tuple(arrays[0].shape[1:])} pixels, test images of "
            f"{tuple(arrays[2].shape[1:])}"
        )
    return RawSet(arrays[0], arrays[1], arrays[2], arrays[3], source)


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/sam_fast/fashion-mnist``, by default below ``~/.cache``. It may not exist yet.

    Raises:
        DemoError: there is neither an absolute ``XDG_CACHE_HOME`` nor a home folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():
        return base / "sam_fast" / "fashion-mnist"
    try:
        return Path.home() / ".cache" / "sam_fast" / "fashion-mnist"
    except RuntimeError as error:
        raise DemoError("no home folder to keep the files in; set XDG_CACHE_HOME") from error


def _locate(folder: Path, file: SetFile) -> Path | None:
    for name in (file.name, file.name.removesuffix(".gz")):
        if (folder / name).is_file():
            return folder / name
    return None


def _installed(log: Log) -> Path:
    if not PACKAGE_FOLDER.is_dir():
        raise DemoError("not installed")
    return PACKAGE_FOLDER


def _cached(log: Log) -> Path:
    folder = cache_folder()
    if not folder.is_dir():
        raise DemoError(f"none in {folder}")
    return folder


def _keep(folder: Path) -> Path:
    """Verify the files of a temporary folder and move them into the cache, each in one atomic step."""
    read_folder(folder, verify=True, source="")
    cache = cache_folder()
    for file in FILES:
        (folder / file.name).replace(cache / file.name)
    return cache


@contextlib.contextmanager
def _workspace() -> Iterator[Path]:
    """A temporary folder on the cache's file system."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as name:
        yield Path(name)


def _from_debian(log: Log) -> Path:
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise DemoError(f"no {tool} here")
    end = time.monotonic() + APT_SECONDS
    log(f"Fetching the Debian package {PACKAGE} (31 MB, not installed, no root needed)")
    with _workspace() as work:
        try:
            _run(["apt-get", "download", PACKAGE], work, end)
        except DemoError:
            # No package lists, or old ones: fetch lists of our own, which needs no root either.
            private = [f"-oDir::State::lists={work}/lists", f"-oDir::Cache={work}/cache"]
            if hasattr(os, "geteuid") and os.geteuid() == 0:
                private.append("-oAPT::Sandbox::User=root")  # apt's own user could not write into this folder
            (work / "lists" / "partial").mkdir(parents=True)
            (work / "cache" / "archives" / "partial").mkdir(parents=True)
            _run(["apt-get", *private, "update"], work, end)
            _run(["apt-get", *private, "download", PACKAGE], work, end)
        packages = sorted(work.glob(f"{PACKAGE}_*.deb"))
        if not packages:
            raise DemoError("apt-get download left no package")
        _run(["dpkg", "-x", packages[0].name, "unpacked"], work, end)
        return _keep(work / "unpacked" / PACKAGE_FOLDER.relative_to("/"))


def _run(command: Sequence[str], folder: Path, end: float) -> None:
    """Run a command in ``folder`` until it ends or ``end`` (of ``time.monotonic``) comes; then it and its children are
    killed.
    """
    left = end - time.monotonic()
    if left <= 0:
        raise DemoError(f"gave up after {APT_SECONDS:.0f} s")
    environment = {**os.environ, "LC_ALL": "C"}
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            _, complaint = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            _kill(process)
            raise DemoError(f"{command[0]} did not finish within {APT_SECONDS:.0f} s") from None
        except BaseException:
            _kill(process)
            raise
    if process.returncode != 0:
        lines = [line for line in complaint.splitlines() if line.strip()]
        raise DemoError(f"{command[0]} failed: {lines[-1] if lines else f'exit code {process.returncode}'}")


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _from_sites(log: Log) -> Path:
    end = time.monotonic() + DOWNLOAD_SECONDS
    failures: list[str] = []
    for site in SITES:
        log(f"Downloading from {site}")
        try:
            with _workspace() as work:
                for file in FILES:
                    _download(site + file.name, work / file.name, end)
                return _keep(work)
        except DemoError as error:
            failures.append(str(error))
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"{site}: {error}")
    raise DemoError("; ".join(failures))


def _download(url: str, target: Path, end: float) -> None:
    """Download one file with a progress bar, up to ``MAX_DOWNLOAD`` bytes and until ``end`` (``time.monotonic``)."""
    request = urllib.request.Request(url, headers={"User-Agent": "sam_fast-demo"})
    with urllib.request.urlopen(request, timeout=CONNECT_SECONDS) as response, target.open("wb") as output:
        announced = response.headers.get("Content-Length", "")
        total = int(announced) if announced.isdecimal() else None
        received = 0
        with tqdm(total=total, desc=target.name, unit="B", unit_scale=True, leave=False) as bar:
            while chunk := response.read(_CHUNK):
                received += len(chunk)
                if received > MAX_DOWNLOAD:
                    raise DemoError(f"{url}: longer than {MAX_DOWNLOAD:,} bytes")
                if time.monotonic() > end:
                    raise DemoError(f"{url}: not finished within {DOWNLOAD_SECONDS:.0f} s")
                output.write(chunk)
                bar.update(len(chunk))
        if total is not None and received != total:
            raise DemoError(f"{url}: {received:,} of {total:,} bytes arrived")
