"""Which completions an update is measured on."""

import pytest
import torch

from capo_rl.planning.rerun import Sample, sizes


def micro_batches(lengths: list[int], seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Masks and advantages of so many completions each; about a third have no token, and many are as large."""
    generator = torch.Generator().manual_seed(seed)
    masks = [(torch.rand(n, 1, generator=generator) > 0.3) & torch.ones(n, 3, dtype=torch.bool) for n in lengths]
    return [(mask, torch.randint(-3, 4, mask.shape, generator=generator).float()) for mask in masks]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 1 / 3, 0.9])
@pytest.mark.parametrize("lengths", [[16], [8, 8], [1] * 16, [2, 1, 5, 8], [3] * 10])
def test_a_sample_is_a_share_of_the_step_however_it_is_divided(share, lengths, known):
    for seed in range(5):
        batches, sample = micro_batches(lengths, seed), Sample(share)
        every = torch.cat([sizes(mask, advantages) for mask, advantages in batches])
        if known:
            sample.expect(every)
        taken = []
        for mask, advantages in batches:
            rows = sample.rows(mask, advantages)
            assert mask[rows].any(dim=1).all()  # none without a token
            assert torch.equal(rows, rows.unique())  # ascending, none twice
            taken += sizes(mask, advantages)[rows].tolist()
        there = int((every >= 0).sum())
        assert there * share - 1e-6 <= len(taken) < there * share + 1
        if known:  # the largest of the step
            assert sorted(taken, reverse=True) == every.sort(descending=True).values[: len(taken)].tolist()


def test_the_first_completion_with_tokens_is_always_in_the_sample():
    sample, nothing = Sample(0.01), torch.zeros(2, 3, dtype=torch.bool)
    assert sample.rows(nothing, torch.ones(2, 3)).tolist() == []
    assert sample.rows(torch.tensor([[False], [True]]), torch.ones(2, 1)).tolist() == [1]
    assert sample.rows(torch.tensor([[True]]), torch.ones(1, 1)).tolist() == []


def test_of_a_micro_batch_those_with_the_largest_advantages_are_taken():
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, False]])
    advantages = torch.tensor([[0.1, 0.1], [-3.0, 9.0], [0.2, 1.0], [0.5, 9.0]])
    assert Sample(0.5).rows(mask, advantages).tolist() == [1, 2]


def test_an_advantage_that_is_no_number_is_the_largest():
    mask = torch.ones(3, 1, dtype=torch.bool)
    advantages = torch.tensor([[1.0], [torch.nan], [torch.inf]])
    assert sizes(mask, advantages).tolist() == [1, torch.inf, torch.inf]
    sample = Sample(0.5)
    sample.expect(sizes(mask, advantages))
    assert sample.rows(mask, advantages).tolist() == [1, 2]


def test_all_are_all():
    assert Sample(1.0).rows(torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3)).tolist() == [0, 1]
