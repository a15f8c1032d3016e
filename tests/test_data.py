import gzip
import hashlib
import http.server
import os
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
import torch
from torchvision.datasets import MNIST

from sparse_lth.program import data

TRAIN, TEST, VALIDATION = 60, 10, 5  # a small data set in MNIST's format


def idx(array):
    """array: uint8 -> an IDX file"""
    return struct.pack(f">BBBB{array.dim()}I", 0, 0, 8, array.dim(), *array.shape) + bytes(
        array.flatten().tolist()
    )


@pytest.fixture
def small(monkeypatch):
    """The files of a small MNIST by name, put in the place of the real one's table."""
    generator = torch.Generator().manual_seed(0)
    files = {}
    for part, n in (("train", TRAIN), ("t10k", TEST)):
        images = torch.randint(256, (n, 28, 28), dtype=torch.uint8, generator=generator)
        files[f"{part}-images-idx3-ubyte"] = idx(images)
        files[f"{part}-labels-idx1-ubyte"] = idx(torch.arange(n, dtype=torch.uint8) % 10)
    packed = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in files.items()}
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in (files | packed).items()}
    monkeypatch.setattr(data, "FILES", {n: (len(c), md5[n]) for n, c in files.items()})
    monkeypatch.setattr(data, "VALIDATION", VALIDATION)
    monkeypatch.setattr(MNIST, "resources", [(name, md5[name]) for name in packed])
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/", "http://localhost:9/"])
    return files


@pytest.fixture
def root(small, tmp_path):
    """A folder that holds the small MNIST."""
    write(tmp_path, small)
    return tmp_path


def write(root, files):
    (root / "MNIST" / "raw").mkdir(parents=True)
    for name, content in files.items():
        (root / "MNIST" / "raw" / name).write_bytes(content)


@pytest.fixture
def serve(small, monkeypatch):
    """serve(answer) makes a server that answers so the only mirror -> the paths it is asked for"""
    servers, over = [], threading.Event()

    def start(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path)
                answer(self, gzip.compress(small[self.path[1:-3]], mtime=0), over)

            def log_message(self, *_):
                pass

        requests = []
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        mirror = f"http://127.0.0.1:{servers[-1].server_port}/"
        monkeypatch.setattr(MNIST, "mirrors", [mirror])
        return requests

    yield start
    over.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def whole(handler, body, over):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def half(handler, body, over):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])


def other(handler, body, over):
    whole(handler, b"<html>please log in</html>", over)


def hang(handler, body, over):
    over.wait(10)


def hang_midway(handler, body, over):
    half(handler, body, over)
    handler.wfile.flush()
    over.wait(10)


def trickle(handler, body, over):
    handler.send_response(200)
    handler.end_headers()
    for byte in body:
        if over.wait(0.02):
            return
        try:
            handler.wfile.write(bytes([byte]))
        except OSError:  # the client has had enough
            return


def relative(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def everything(dataset):
    return torch.cat([split.images for split in (dataset.train, dataset.validation)])


@pytest.fixture(scope="module")
def mnist():
    root = os.environ.get("SPARSE_LTH_DATA")
    if not root or not (Path(root) / "MNIST" / "raw").is_dir():
        pytest.skip("SPARSE_LTH_DATA names no folder with MNIST/raw")
    return data.load("mnist", root, "cpu")


def test_mnist_has_the_published_sizes_and_label_counts(mnist):
    assert mnist.name == "mnist"
    assert len(mnist.train.labels) == data.SOURCES["mnist"].train_images
    for split, n in ((mnist.train, 55000), (mnist.validation, 5000), (mnist.test, 10000)):
        assert split.images.shape == (n, 1, 28, 28)
        assert split.images.dtype == torch.float32
        assert split.labels.shape == (n,)
        assert split.labels.dtype == torch.int64
    seen = torch.cat([mnist.train.labels, mnist.validation.labels]).bincount()
    assert seen.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.test.labels[:5].tolist() == [7, 2, 1, 0, 4]


def test_mnist_is_normalised_by_its_own_mean_and_deviation(mnist):
    pixels = everything(mnist).double()
    assert abs(pixels.mean()) < 1e-3
    assert abs(pixels.std() - 1) < 1e-3


def test_mnist_agrees_with_torchvision(mnist):
    expected = MNIST(os.environ["SPARSE_LTH_DATA"], train=False)
    pixels = mnist.test.images.squeeze(1).mul(data.STD).add(data.MEAN).mul(255).round()
    assert torch.equal(pixels.to(torch.uint8), expected.data)
    assert torch.equal(mnist.test.labels, expected.targets)


def test_train_and_validation_are_disjoint_and_the_same_each_time(root):
    first, second = (data.load("auto", root, "cpu") for _ in range(2))
    assert first.name == "mnist"
    assert torch.equal(everything(first), everything(second))
    assert len(first.train.labels) == TRAIN - VALIDATION
    assert len(first.validation.labels) == VALIDATION
    assert len(everything(first).flatten(1).unique(dim=0)) == TRAIN


def test_an_image_keeps_its_label(root, small):
    source = torch.tensor(list(small["train-images-idx3-ubyte"][16:])).view(TRAIN, -1)
    train = data.load("mnist", root, "cpu").train
    pixels = train.images.flatten(1).mul(data.STD).add(data.MEAN).mul(255).round()
    rows = (pixels[:, None] == source).all(2).nonzero()[:, 1]  # each train image in the file
    assert torch.equal(train.labels, rows % 10)


@pytest.mark.parametrize("name", ["auto", "mnist"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_a_damaged_file_is_refused(root, small, name, damage):
    path = root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    content = small[path.name]
    altered = content[:500] + bytes([content[500] ^ 1]) + content[501:]
    path.write_bytes({"truncated": content[:1000], "altered": altered, "empty": b""}[damage])
    before = relative(root)
    with pytest.raises(data.DataError, match=r"train-images-idx3-ubyte is damaged: expected") as e:
        data.load(name, root, "cpu", notify=pytest.fail)
    size, md5 = data.FILES[path.name]
    got = "others" if damage == "altered" else f"{path.stat().st_size} bytes"
    assert f"expected {size} bytes with md5 {md5}, got {got};" in str(e.value)
    assert "delete it" in str(e.value)
    assert relative(root) == before


@pytest.mark.parametrize("name", ["auto", "mnist"])
def test_a_huge_file_is_refused_unread(root, name):
    with open(root / "MNIST" / "raw" / "t10k-images-idx3-ubyte", "wb") as file:
        file.truncate(30 << 30)
    with pytest.raises(data.DataError, match=r"is damaged: .* got 32212254720 bytes; delete it"):
        data.load(name, root, "cpu", notify=pytest.fail)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_never_blocks(root, make):
    path = root / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    path.unlink()
    make(path)
    with pytest.raises(data.DataError, match="train-labels-idx1-ubyte: expected a file, got"):
        data.load("auto", root, "cpu", notify=pytest.fail)


def test_a_home_of_nobody_is_refused():
    with pytest.raises(data.DataError, match="cannot find ~nosuchuser"):
        data.load("auto", "~nosuchuser", "cpu", notify=pytest.fail)


def test_an_unchecked_processed_file_is_not_read(root):
    (root / "MNIST" / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(1, 28, 28), torch.zeros(1)), root / "MNIST" / "processed" / name)
    assert len(data.load("mnist", root, "cpu").test.labels) == TEST


def test_a_root_that_is_a_file_is_refused(small, tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(data.DataError, match=r"cannot read .*: Not a directory"):
        data.load("auto", tmp_path / "data", "cpu")


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(data.DataError, match="expected dataset auto, mnist or digits, got cifar"):
        data.load("cifar", tmp_path, "cpu")


def test_mnist_is_downloaded_whole(small, tmp_path, serve, capfd):
    serve(whole)
    lines = []
    assert data.load("auto", tmp_path, "cpu", notify=lines.append).name == "mnist"
    assert relative(tmp_path) == sorted(f"MNIST/raw/{name}" for name in small)
    assert lines == [f"downloading MNIST to {tmp_path / 'MNIST' / 'raw'}"]
    assert capfd.readouterr() == ("", "")


def test_only_a_missing_file_is_downloaded(root, serve):
    requests = serve(whole)
    (root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    data.load("mnist", root, "cpu")
    assert requests == ["/t10k-labels-idx1-ubyte.gz"]


def test_the_second_mirror_is_asked_where_the_first_fails(tmp_path, serve, monkeypatch):
    serve(other)
    broken = MNIST.mirrors
    serve(whole)
    monkeypatch.setattr(MNIST, "mirrors", broken + MNIST.mirrors)
    assert data.load("mnist", tmp_path, "cpu").name == "mnist"


def test_mnist_never_falls_back(small, tmp_path):
    with pytest.raises(data.DataError, match="--dataset digits") as e:
        data.load("mnist", tmp_path, "cpu", notify=pytest.fail)
    for part in ("127.0.0.1:9: ", "localhost:9: ", "Connection refused", *small):
        assert part in str(e.value)
    assert relative(tmp_path) == []


def test_auto_goes_on_with_digits_and_says_why_in_one_line(small, tmp_path):
    lines = []
    assert data.load("auto", tmp_path, "cpu", notify=lines.append).name == "digits"
    (line,) = lines
    assert "\n" not in line
    assert "Connection refused" in line
    assert line.endswith("going on with scikit-learn's digits")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (half, "train-images-idx3-ubyte.gz"),
        (other, "train-images-idx3-ubyte.gz came broken, 26 bytes of it"),
        (hang, "timed out|nothing came for 0.3 s"),
        (hang_midway, "timed out|nothing came for 0.3 s"),
        (trickle, "too slow"),
    ],
)
def test_a_broken_download_ends_soon_and_leaves_nothing(
    small, tmp_path, serve, monkeypatch, answer, reason
):
    serve(answer)
    monkeypatch.setitem(data.PATIENCE, "mnist", (0.3, 0.6))
    start = time.monotonic()
    with pytest.raises(data.DataError, match=reason) as e:
        data.load("mnist", tmp_path, "cpu")
    assert time.monotonic() - start < 3
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_a_name_lookup_that_hangs_ends_soon(small, tmp_path, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(10) and [])
    monkeypatch.setitem(data.PATIENCE, "auto", (0.2, 1.0))
    lines = []
    assert data.load("auto", tmp_path, "cpu", notify=lines.append).name == "digits"
    over.set()
    assert "nothing came for 0.2 s" in lines[0]


def test_a_full_disk_leaves_nothing_half_written(small, tmp_path, serve, monkeypatch):
    serve(whole)
    real, written = Path.write_bytes, []

    def write_bytes(path, content):
        written.append(path)
        if len(written) == 3:
            real(path, content[:100])
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(data.DataError, match="cannot write there: No space left on device"):
        data.load("mnist", tmp_path, "cpu")
    assert relative(tmp_path) == []


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return data.load("digits", tmp_path_factory.mktemp("none"), "cpu", notify=pytest.fail)


def test_digits_have_the_shape_of_mnist(digits):
    assert digits.name == "digits"
    assert len(digits.train.labels) == data.SOURCES["digits"].train_images
    for split, n in ((digits.train, 1350), (digits.validation, 150), (digits.test, 297)):
        assert split.images.shape == (n, 1, 28, 28)
        assert split.images.dtype == torch.float32
        assert split.labels.shape == (n,)
        assert split.labels.dtype == torch.int64
        share = split.labels.bincount(minlength=10) / n
        assert (share - 0.1).abs().max() < 0.02


def test_digits_are_normalised_like_mnist(digits):
    pixels = everything(digits).mul(data.STD).add(data.MEAN)
    assert abs(pixels.min()) < 1e-6
    assert abs(pixels.max() - 1) < 1e-6


def test_digits_splits_are_disjoint_and_the_same_each_time(digits):
    again = data.load("digits", "", "cpu")
    splits = [digits.train, digits.validation, digits.test]
    for split, other_split in zip(splits, [again.train, again.validation, again.test], strict=True):
        assert torch.equal(split.images, other_split.images)
        assert torch.equal(split.labels, other_split.labels)
    assert len(torch.cat([s.images for s in splits]).flatten(1).unique(dim=0)) == 1797


def numbered(n):
    return data.Split(torch.arange(n).float().view(n, 1, 1, 1), torch.arange(n))


@pytest.mark.parametrize(("n", "sizes"), [(10, [4, 4, 2]), (8, [4, 4]), (3, [3])])
def test_an_epoch_covers_every_sample_once(n, sizes):
    got = data.batches(numbered(n), 4, torch.Generator().manual_seed(0))
    assert [len(chosen) for chosen in got] == sizes
    assert torch.cat(got).sort().values.tolist() == list(range(n))


def test_a_restored_generator_gives_the_same_order_and_a_new_epoch_another():
    generator = torch.Generator().manual_seed(3)

    def epoch():
        return torch.cat(data.batches(numbered(50), 8, generator))

    state = generator.get_state()
    first, second = epoch(), epoch()
    generator.set_state(state)
    assert torch.equal(epoch(), first)
    assert torch.equal(epoch(), second)
    assert not torch.equal(first, second)
