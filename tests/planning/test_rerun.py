"""Which completions an update is measured on."""

import pytest
import torch

from capo_rl.planning.rerun import Sample


def masks(sizes: list[int], seed: int) -> list[torch.Tensor]:
    """Micro-batches of so many completions, about a third of them without a token."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(size, 1, generator=generator) > 0.3) & torch.ones(size, 3, dtype=torch.bool) for size in sizes]


def chosen(sample: Sample, batches: list[torch.Tensor], seed: int, least: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [sample.rows(mask, torch.randn(int(mask.sum()), generator=generator), least) for mask in batches]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 1 / 3, 0.9])
@pytest.mark.parametrize("sizes", [[16], [8, 8], [1] * 16, [2, 1, 5, 8], [3] * 10])
def test_a_sample_is_a_share_of_the_step_however_it_is_divided(share, sizes):
    for seed in range(5):
        batches, sample = masks(sizes, seed), Sample(share)
        rows = chosen(sample, batches, seed)
        there = sum(int(mask.any(dim=1).sum()) for mask in batches)
        # a small micro-batch may have less than is missing, and a later one makes up for it
        taken = sum(len(each) for each in rows)
        assert there * share - 1e-6 <= taken < there * share + 1
        for mask, each in zip(batches, rows, strict=True):
            assert mask[each].any(dim=1).all()  # none without a token
            assert torch.equal(each, each.unique())  # ascending, none twice


def test_the_first_completion_with_tokens_is_always_in_the_sample():
    sample = Sample(0.01)
    assert sample.rows(torch.zeros(2, 3, dtype=torch.bool), torch.zeros(0)).tolist() == []
    assert sample.rows(torch.tensor([[False], [True]]), torch.zeros(1)).tolist() == [1]
    assert sample.rows(torch.tensor([[True]]), torch.ones(1)).tolist() == []


def test_with_shards_one_takes_part_in_each_pass():
    batches = [*masks([1] * 8, 0), torch.zeros(3, 3, dtype=torch.bool)]
    assert [len(rows) for rows in chosen(Sample(0.25), batches, 0, least=1)] == [1] * 9


def test_of_a_micro_batch_those_with_the_largest_advantages_are_taken():
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, False]])
    advantages = torch.tensor([0.1, 0.1, -3.0, 0.2, 1.0, 0.5])
    assert Sample(0.5).rows(mask, advantages).tolist() == [1, 2]


def test_all_are_all():
    sample = Sample(1.0)
    assert sample.rows(torch.zeros(2, 3, dtype=torch.bool), torch.zeros(0)).tolist() == [0, 1]
