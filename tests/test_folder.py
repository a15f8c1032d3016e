import multiprocessing
import shlex
from pathlib import Path

import pytest

from sparse_lth.files import write
from sparse_lth.program.config import RunConfig, SettingError
from sparse_lth.program.folder import (
    FolderError,
    load_config,
    new_folder,
    owned,
    resume_command,
    save_config,
)

PART = ".config.json.0123456789abcdef0123456789abcdef.part"


@pytest.fixture
def other_run():
    """other_run(folder) has another process own it -> that process"""
    context = multiprocessing.get_context("fork")
    processes = []

    def start(folder):
        ready, done = context.Pipe()

        def hold():
            with owned(folder, new=False):
                done.send(None)
                done.recv()

        processes.append(context.Process(target=hold, daemon=True))
        processes[-1].start()
        ready.recv()
        processes[-1].end = lambda: ready.send(None)
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


@pytest.mark.parametrize("new", [True, False])
def test_one_run_at_a_time_owns_a_folder(tmp_path, other_run, new):
    other = other_run(tmp_path)
    with pytest.raises(FolderError, match=f"no other run works in, got {tmp_path}: wait until"):
        owned(tmp_path, new).__enter__()
    other.end()
    other.join()
    with owned(tmp_path, new):
        pass


def test_a_death_gives_the_folder_free(tmp_path, other_run):
    other = other_run(tmp_path)
    other.kill()
    other.join()
    with owned(tmp_path, new=False):
        pass


def test_what_a_killed_run_was_writing_is_swept_but_never_under_a_live_one(tmp_path, other_run):
    (tmp_path / PART).write_text('{"mo')
    (tmp_path / "mine.part").write_text("")
    with owned(tmp_path, new=False):
        assert {p.name for p in tmp_path.iterdir()} == {".lock", "mine.part"}
    other_run(tmp_path)
    (tmp_path / PART).write_text("being written")
    with pytest.raises(FolderError):
        owned(tmp_path, new=False).__enter__()
    assert (tmp_path / PART).exists()


def test_a_run_killed_before_it_had_settings_leaves_a_folder_as_good_as_new(tmp_path):
    for name in (".lock", PART):
        (tmp_path / name).write_text("")
    assert new_folder(tmp_path) == tmp_path
    with owned(tmp_path, new=True):
        save_config(tmp_path, RunConfig(seed=3))
    assert load_config(tmp_path) == RunConfig(seed=3)


def test_a_folder_that_filled_while_the_data_were_loaded_is_refused(tmp_path):
    folder = new_folder(tmp_path)
    (tmp_path / "precious").write_text("x")
    with pytest.raises(SettingError, match="expected a new or empty folder"):
        owned(folder, new=True).__enter__()
    assert (tmp_path / "precious").read_text() == "x"


def test_only_a_run_that_can_go_on_is_said_to(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(SettingError) as error:
        new_folder(tmp_path)
    assert "--resume" not in str(error.value)
    save_config(tmp_path, RunConfig())
    with pytest.raises(SettingError, match="to go on with the run in it: python"):
        new_folder(tmp_path)


@pytest.mark.parametrize("name", ["a b", "it's", "-x", "$HOME", "caf\u00e9", "plain"])
def test_the_command_to_go_on_survives_a_shell(name):
    *command, folder = shlex.split(resume_command(Path(name)))
    assert command == ["python", "main.py", "--resume"]
    assert Path(folder) == Path(name)
    assert not folder.startswith("-")


@pytest.mark.parametrize("name", ["a" * 300, "a\udcffb", "a\0b", "file"])
def test_a_folder_that_cannot_be_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="--out_dir: expected a"):
        new_folder(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("text", ["", "[]", '{"seed": 1.5}', "[" * 9999, '{"a": 1}'])
def test_settings_that_nobody_wrote_are_refused(tmp_path, text):
    write(tmp_path / "config.json", text)
    with pytest.raises(SettingError, match="--resume: expected the folder of a run, got"):
        load_config(tmp_path)


def test_a_folder_that_cannot_be_made_is_named():
    expected = "can be written, got /dev/null/run: Not a directory"
    with pytest.raises(FolderError, match=expected), owned(Path("/dev/null/run"), new=True):
        pass
