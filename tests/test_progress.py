import io
import sys
import threading

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter

from sparse_lth import Ticket
from sparse_lth.program.config import RunConfig
from sparse_lth.program.folder import ticket_path
from sparse_lth.program.lottery import Lottery
from sparse_lth.program.progress import Console, watch

CONFIG = RunConfig(model="lenet-15-5", dataset="digits", epochs=2, bs=100, prune_rounds=1)


def _watch(tiny, folder, states=None):
    """The lines that a run prints."""
    out = io.StringIO()
    lottery, console = Lottery(CONFIG, tiny), Console(file=out, width=300)
    start = lottery.start()
    watch(states or lottery.states(start), lottery, start, folder, console)
    return out.getvalue().splitlines()


def _read(folder, round):
    path = str(folder / "tensorboard" / f"round_{round}")
    return EventAccumulator(path, {"histograms": 0}).Reload()


def test_tensorboard_has_a_run_for_each_round(tiny, tmp_path):
    assert len(_watch(tiny, tmp_path)) == 4
    for n in range(2):
        curves = _read(tmp_path, n)
        assert [event.step for event in curves.Scalars("train_loss")] == [1, 2]
        assert [event.step for event in curves.Scalars("test_accuracy")] == [2]
        assert [event.step for event in curves.Images("mask/fc1")] == [2]
        weights = curves.Histograms("weights/fc1")
        assert [event.step for event in weights] == [1, 2]
        mask = Ticket.load(ticket_path(tmp_path, n)).masks["fc1"]
        assert weights[-1].histogram_value.num == mask.sum()
        hparams = curves.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        settings = HParamsPluginData.FromString(hparams).session_start_info.hparams
        assert settings["round"].number_value == n
        assert settings["blocksize"].string_value == "1x1"


def test_a_run_that_goes_on_replaces_what_a_killed_one_had_beyond_its_state(tiny, tmp_path):
    states = Lottery(CONFIG, tiny).states()
    _watch(tiny, tmp_path, [next(states), next(states), next(states)])
    _watch(tiny, tmp_path)
    for n in range(2):
        losses = _read(tmp_path, n).Scalars("train_loss")
        assert [event.step for event in losses] == [1, 2]


@pytest.mark.parametrize("writes", [0, 1, 3, 9])
def test_a_full_disk_ends_the_curves_and_not_the_run(tiny, tmp_path, monkeypatch, writes):
    real, count = RecordWriter.write, 0

    def write(self, content):
        nonlocal count
        count += 1
        if count > writes:
            raise OSError(28, "No space left on device")
        real(self, content)

    monkeypatch.setattr(RecordWriter, "write", write)
    threads = threading.active_count()
    lines = _watch(tiny, tmp_path)
    said = [line for line in lines if "TensorBoard" in line]
    assert said == ["no TensorBoard curves: [Errno 28] No space left on device"]
    assert len(lines) == 5
    assert threading.active_count() == threads


def test_a_tensorboard_that_is_no_folder_is_said_in_one_line(tiny, tmp_path):
    (tmp_path / "tensorboard").write_text("")
    lines = _watch(tiny, tmp_path)
    assert lines[0].startswith("no TensorBoard curves: [Errno 20] Not a directory")
    assert len(lines) == 5
    assert (tmp_path / "state.safetensors").exists()


def test_without_tensorboard_one_line_says_how_to_have_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    assert _watch(tiny, tmp_path)[0].endswith("pip install tensorboard to have them")


def test_a_console_says_that_nobody_reads(tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Console(file=Closed()).print("x")
