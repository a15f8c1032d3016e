from dataclasses import replace

from sparse_lth.experiments.chains import TICKET, Chain, Plan, grid
from sparse_lth.experiments.engine import run_one_by_one
from sparse_lth.experiments.progress import Watch

PLAN = Plan(10, every=5, test_every=10, rewind="2it", dataset="digits")
DENSE = Chain("dense", 0, (), model="lenet-15-5")
TICKETS = Chain(TICKET, 0, (3,), controls=("random reinit", "random mask"))


def test_a_chain_names_every_network_that_it_trains_once():
    assert [len(chain.networks) for chain in (DENSE, TICKETS)] == [1, 4]
    every = [network for chain in grid(Plan(), 3) for network in chain.networks]
    assert len({*every}) == len(every)


def test_the_watch_says_how_far_the_chains_are(tiny, tmp_path, capsys):
    for name in ("chains", "networks"):
        (tmp_path / name).mkdir()
    run_one_by_one(PLAN, DENSE, tiny, tmp_path)
    with Watch([DENSE, TICKETS], tmp_path) as watch:
        watch.update()
        assert capsys.readouterr().out == ""  # of what an earlier run has trained
        run_one_by_one(PLAN, TICKETS, tiny, tmp_path)
        watch.update()
        watch.update()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" of 5, 0:")[0] for line in lines] == ["2", "3", "4", "5"]
    assert " left: random mask, 300-100, 1x1, replicate 0, round 3 (51" in lines[-1]


def test_networks_of_an_earlier_run_that_this_one_does_not_want_are_not_counted(
    tiny, tmp_path, capsys
):
    for name in ("chains", "networks"):
        (tmp_path / name).mkdir()
    run_one_by_one(PLAN, TICKETS, tiny, tmp_path)
    fewer = replace(TICKETS, controls=("random mask",))
    with Watch([fewer, DENSE], tmp_path) as watch:
        run_one_by_one(PLAN, DENSE, tiny, tmp_path)
        watch.update()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("4 of 4, 0:")
