import json
import os
import struct
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_lth.files import (
    FormatError,
    file_size,
    leftovers,
    load_tensors,
    parse_json,
    read_json,
    save_tensors,
    write,
)


def _ticket_with(path, about):
    """A file of tensors whose metadata is this text."""
    header = {"__metadata__": {"sparse_lth.ticket": about}}
    header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


BOMBS = {
    "deep lists": '{"a": ' + "[" * 100_000,
    "deep objects": '{"a": ' * 500 + "1" + "}" * 500,
    "a list": "[]",
    "a number": "1",
    "a huge number": '{"a": 1' + "0" * 400 + "}",
    "a huger number": '{"a": 1' + "0" * 5000 + "}",
    "half a surrogate pair": '{"a": ["\\ud800"]}',
    "half a surrogate pair as a name": '{"\\ud800": 1}',
    "nothing": "",
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_json_that_nobody_wrote_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match=r"expected|Expecting|surrogates"):
        parse_json(text)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FormatError, match=r"config\.json: expected a JSON object"):
        read_json(tmp_path / "config.json")
    with pytest.raises(FormatError, match="expected a sparse_lth ticket, got"):
        load_tensors(_ticket_with(tmp_path / "t", text), "ticket")


JSON = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.text() | st.floats(-9, 9)
for _ in range(4):
    JSON = JSON | st.lists(JSON, max_size=3) | st.dictionaries(st.text(), JSON, max_size=3)


@given(st.dictionaries(st.text(), JSON, max_size=3))
def test_json_comes_back_as_it_was(value):
    assert parse_json(json.dumps(value)) == value


def test_metadata_that_is_no_text_is_refused(tmp_path):
    header = json.dumps({"__metadata__": {"sparse_lth.ticket": {"a": 1}}}).encode()
    (tmp_path / "t").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(FormatError, match="expected a sparse_lth ticket"):
        load_tensors(tmp_path / "t", "ticket")


@pytest.mark.parametrize("load", [read_json, lambda path: load_tensors(path, "ticket"), file_size])
def test_what_is_no_file_never_blocks(load, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(FormatError, match="expected a file, got a folder, a pipe or a device"):
            load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent")


def test_a_huge_file_is_refused_unread(tmp_path):
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(30 << 30)
    with pytest.raises(
        FormatError, match="expected at most 1048576 bytes of JSON, got 32212254720"
    ):
        read_json(tmp_path / "huge")
    with pytest.raises(FormatError, match="expected a sparse_lth ticket"):
        load_tensors(tmp_path / "huge", "ticket")


def test_a_file_that_cannot_be_written_is_named_and_not_its_clean_up(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write: Not a directory") as error:
        write(tmp_path / "file" / "t", "x")
    assert error.value.filename == str(tmp_path / "file" / "t")


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tmp_path / "t", "ticket", {"x": torch.ones(1)}, {})
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_what_write_leaves_when_killed_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "film.part").write_text("")
    (tmp_path / ".film.part").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda old, new: sys.exit())
        patch.setattr("pathlib.Path.unlink", lambda path: None)
        with pytest.raises(SystemExit):
            write(tmp_path / "t", "x")
    (path,) = leftovers(tmp_path)
    assert path.read_text() == "x"
