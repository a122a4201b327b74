import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conformance.test_references import KINDS
from tests.equivalence.data_parallel import SHARES, loss_sum, policy_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Gradients of two ranks, one file for each kind and layout."""
    path = tmp_path_factory.mktemp("ranks")
    launch = "-m torch.distributed.run --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:0"
    command = [sys.executable, *launch.split(), "-m", "tests.equivalence.data_parallel", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return path


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_give_the_gradient_of_one_process(folder, kind, layout):
    policy = policy_model()
    sum(loss_sum(policy, policy, trees, layout) for trees in SHARES.values()).backward()
    expected = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    found = torch.load(folder / f"{kind}-{layout}.pt", weights_only=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())


@pytest.mark.parametrize("name", KINDS)
def test_a_reference_scores_a_policy_in_shards_as_a_whole_one_or_says_that_it_cannot(folder, name):
    found = torch.load(folder / "references.pt", weights_only=True)[name]
    assert (found is None) == KINDS[name].moves
    if found is not None:
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)
