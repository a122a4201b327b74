import pytest
import torch

from falign.objectives import generalized_advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.7, 1.0)])
def test_generalized_advantages_are_the_recursion(gamma, lam):
    generator = torch.Generator().manual_seed(0)
    lengths, reward = [7, 1, 4, 6], torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    values = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    expected = torch.zeros_like(values)
    for row, length in enumerate(lengths):
        later = 0.0
        for t in reversed(range(length)):
            last = t == length - 1
            delta = (reward[row] if last else gamma * values[row, t + 1]) - values[row, t]
            later = delta + gamma * lam * later
            expected[row, t] = later
    hidden = values.masked_fill(~mask, torch.nan)  # what lies outside is never read
    torch.testing.assert_close(generalized_advantages(reward, hidden, mask, gamma, lam), expected)
