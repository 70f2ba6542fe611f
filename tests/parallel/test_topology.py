import pytest

from mindgen.parallel.topology import SINGLE, Topology, split_layers


def test_tensor_ranks_are_neighbours_as_in_megatron():
    topology = Topology(rank=5, tp=2, pp=4)
    assert (topology.tp_rank, topology.pp_rank) == (1, 2)
    assert topology.tp_ranks == (4, 5)
    assert topology.pp_ranks == (1, 3, 5, 7)
    assert topology.world_size == 8


def test_every_rank_is_in_the_groups_that_its_peers_name():
    places = [Topology(rank, tp=3, pp=2) for rank in range(6)]
    for place in places:
        assert place.tp_ranks[place.tp_rank] == place.pp_ranks[place.pp_rank] == place.rank
        assert all(places[peer].tp_ranks == place.tp_ranks for peer in place.tp_ranks)
        assert all(places[peer].pp_ranks == place.pp_ranks for peer in place.pp_ranks)


def test_stages_know_whether_they_are_first_or_last():
    stages = [Topology(rank, tp=1, pp=3) for rank in range(3)]
    assert [stage.is_first_stage for stage in stages] == [True, False, False]
    assert [stage.is_last_stage for stage in stages] == [False, False, True]
    assert SINGLE.is_first_stage and SINGLE.is_last_stage


@pytest.mark.parametrize(("place", "words"), [((4, 2, 2), "rank 4"), ((-1, 2, 2), "rank -1"), ((0, 0, 1), "tensor")])
def test_an_impossible_place_is_refused(place, words):
    with pytest.raises(ValueError, match=words):
        Topology(*place)


@pytest.mark.parametrize(
    ("num_layers", "pp", "counts"),
    [(8, 1, [8]), (8, 4, [2, 2, 2, 2]), (7, 2, [4, 3]), (6, 4, [1, 2, 2, 1]), (7, 4, [2, 2, 2, 1]), (4, 4, [1] * 4)],
)
def test_layers_left_over_go_to_the_middle_and_never_to_the_last_stage(num_layers, pp, counts):
    stages = split_layers(num_layers, pp)
    assert [len(stage) for stage in stages] == counts
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))


def test_a_layer_list_decides():
    assert split_layers(5, 2, [3, 2]) == (range(3), range(3, 5))


@pytest.mark.parametrize(
    ("num_layers", "pp", "layer_list", "words"),
    [
        (2, 3, None, "2 layers cannot fill 3"),
        (4, 0, None, "size is 0"),
        (4, 2, [4], "1 entries for 2"),
        (4, 2, [4, 0], "4,0 leaves a stage without"),
        (4, 2, [3, 2], "sums to 5, but the model has 4"),
    ],
)
def test_a_split_that_does_not_fit_is_refused_with_its_numbers(num_layers, pp, layer_list, words):
    with pytest.raises(ValueError, match=words):
        split_layers(num_layers, pp, layer_list)
