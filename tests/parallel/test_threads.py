import torch

from mindgen.parallel.threads import available_cores, limit_threads, threads_per_rank


def test_ranks_of_a_host_share_its_cores():
    assert threads_per_rank(1) == available_cores() >= 1
    assert threads_per_rank(10_000) == 1


def test_a_rank_takes_its_share_unless_the_user_has_decided(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert limit_threads(10_000) == before
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert limit_threads(10_000) == 1
    finally:
        torch.set_num_threads(before)
