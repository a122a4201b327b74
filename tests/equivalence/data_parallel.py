"""One rank's share of a batch under DDP and FSDP2; run by torchrun, writes whole gradients and scores from rank 0."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from falign import FDPO, CompletionBatch
from falign.models.sharding import shard
from falign.references import AdapterOff
from falign.scoring import LAYOUTS, completion_scores
from tests.conformance.test_references import BATCH, KINDS, SERVERS, policy_of, served_model
from tests.scoring.models import TREES, tiny_model, with_lora

SHARES = {0: TREES[:1], 1: TREES[1:]}  # one pair; a list of three and a pair: ragged


def loss_sum(model, policy, trees, layout):
    batch = LAYOUTS[layout](trees, pad_token_id=2)
    reference = AdapterOff().logprobs(policy, batch)
    scores = completion_scores(model, batch, chunk_tokens=3)
    output = FDPO("jensen_shannon", beta=0.7)(
        CompletionBatch(
            logprobs=scores.logprobs,
            completion_mask=batch.completion_mask,
            prompt_index=batch.prompt_index,
            reference_logprobs=reference,
            preference=batch.preference,
        )
    )
    return output.terms[0].losses.sum()


def policy_model():
    return with_lora(tiny_model(), trained=True).train()


def gradients(kind, layout):
    policy = policy_model()
    if kind == "ddp":
        model = DistributedDataParallel(policy)
    else:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for layer in policy.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        model = fully_shard(policy, mesh=mesh)
    loss = loss_sum(model, policy, SHARES[dist.get_rank()], layout)
    (loss * dist.get_world_size()).backward()  # both wrappers average over ranks
    grads = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def reference_scores(kind, folder):
    """Log-probs under a reference: with the whole policy, and with the policy in shards; None if it refuses shards."""
    policy = policy_of(kind)
    reference = kind.build(policy, folder / f"rank{dist.get_rank()}")
    if not reference.can_shard:
        return None
    whole = reference.logprobs(policy, BATCH)
    shard(policy, device=torch.device("cpu"))
    if reference.identity()["kind"] == "cached":  # else it would read what it has just kept
        reference = kind.build(policy, folder / f"sharded{dist.get_rank()}")
    return whole, reference.logprobs(policy, BATCH)


def main(folder):
    served_model()  # in a process group, only one process would save it
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for kind in ("ddp", "fsdp2"):
        for layout in LAYOUTS:
            whole = gradients(kind, layout)
            if dist.get_rank() == 0:
                torch.save(whole, f"{folder}/{kind}-{layout}.pt")
    scores = {name: reference_scores(kind, Path(folder) / name) for name, kind in KINDS.items()}
    if dist.get_rank() == 0:
        torch.save(scores, f"{folder}/references.pt")
    while SERVERS:
        SERVERS.pop().stop()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
