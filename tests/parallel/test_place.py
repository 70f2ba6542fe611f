import pytest

from mindgen.parallel.launch import join_ranks
from mindgen.parallel.place import COLLECTIVES, Place, read_collectives, read_meeting, read_place

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RUN_ID": "seven",
    "TORCHELASTIC_RESTART_COUNT": "0",
}


def test_torchrun_says_where_a_rank_stands_and_where_ranks_meet():
    assert read_place(TORCHRUN) == Place(5, 8, 1, 4)
    meeting = read_meeting(TORCHRUN)
    assert (meeting.host, meeting.port, meeting.launcher_store) == ("node0", 29500, True)
    assert "seven" in meeting.job
    assert not meeting.one_host and not meeting.own_ranks


def test_without_a_launcher_a_process_is_alone():
    assert read_place({}) == Place(0, 1, 0, 1)
    assert read_place({"RANK": "3"}) == Place(0, 1, 0, 1)


def test_ranks_started_by_hand_need_no_local_rank():
    assert read_place({"RANK": "1", "WORLD_SIZE": "2"}) == Place(1, 2, 1, 2)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RANK", "two", "RANK is 'two'; it must be a whole number from 0 to 7"),
        ("RANK", "8", "RANK is '8'"),
        ("RANK", "-1", "RANK is '-1'"),
        ("WORLD_SIZE", "0", "WORLD_SIZE is '0'; it must be a whole number at least 1"),
        ("WORLD_SIZE", "", "WORLD_SIZE is ''"),
        ("LOCAL_RANK", "4", "LOCAL_RANK is '4'; it must be a whole number from 0 to 3"),
    ],
)
def test_an_impossible_place_is_refused_with_the_value(name, value, words):
    with pytest.raises(ValueError, match=words):
        read_place({**TORCHRUN, name: value})


@pytest.mark.parametrize(("name", "value"), [("MASTER_PORT", "http"), ("MASTER_PORT", "65536"), ("MASTER_ADDR", "")])
def test_an_impossible_meeting_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        read_meeting({**TORCHRUN, name: value})


def test_other_sizes_than_the_launcher_started_are_refused_with_both():
    with pytest.raises(ValueError, match=r"4 ranks are asked for .* the launcher started 8"):
        join_ranks(TORCHRUN, world_size=4)


def test_ranks_share_memory_unless_gloo_is_asked_for():
    assert read_collectives({}) == "auto"
    assert read_collectives({COLLECTIVES: "gloo"}) == "gloo"
    with pytest.raises(ValueError, match="MINDGEN_COLLECTIVES is 'mpi'; it must be auto or gloo"):
        read_collectives({COLLECTIVES: "mpi"})
