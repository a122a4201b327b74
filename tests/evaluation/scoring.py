"""A tiny policy beside a tiny reference, trees to score, and a dense computation to compare with."""

import torch

from falign import FDPO
from falign.evaluation import CompletionScorer
from falign.references import FrozenModel
from falign.scoring import PromptTree, Scorer
from tests.models.tiny import tiny_model

TREES = [
    PromptTree((5, 6, 7), ((8, 9, 1), (10, 1)), (1.0, 0.0), "rows.jsonl:1"),
    PromptTree((5,), ((11, 12, 13, 1), (14, 1), (15, 16, 1)), (2.0, 0.5, 1.0), "rows.jsonl:2"),
    PromptTree((20, 21), ((22, 23, 24, 25, 1),), None, "rows.jsonl:3"),
    PromptTree((30, 31, 32), ((33, 1), (34, 35, 1)), (0.0, 1.0), "rows.jsonl:5"),
    PromptTree((40, 41), ((42, 1),), (1.0,), "rows.jsonl:6"),
]


def policy_and_reference():
    return tiny_model("llama", seed=0).eval(), tiny_model("llama", seed=1).eval()


def tiny_scorer(objective=None, layout="padded"):
    policy, reference = policy_and_reference()
    return CompletionScorer(
        policy=policy,
        reference=FrozenModel(reference),
        objective=objective or FDPO("jensen_shannon", beta=0.3),
        scorer=Scorer(layout, pad_token_id=1, chunk_tokens=3),
    )


def dense(model, prompt_ids, completion_ids):
    """Log-softmax of the model's own logits where each completion token is predicted, one completion alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt_ids, *completion_ids]])).logits[0]
    return logits[len(prompt_ids) - 1 : -1].double().log_softmax(dim=-1)
