"""Reward models, from pairs to scores in transformers; TRL's RewardTrainer gives the same loss and gradient."""

import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

import falign
from falign.errors import ConfigError, DataError
from falign.models.heads import RewardHead
from falign.objectives import RankedRewardModel, RewardModel
from falign.references import objective_inputs
from falign.rewards.classifier import ClassifierReward, load_classifier
from falign.runfile import parse_run
from falign.scoring import PromptTree, Scorer
from falign.training import train
from tests.models.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
TREES = [
    PromptTree((5, 9, 7), ((11, 12, 1), (13, 1)), (1.0, 0.0)),
    PromptTree((8, 6), ((14,), (15, 16, 17, 1), (18, 1)), (2.0, 0.0, 1.0)),
]


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def rewards_of(model, head, layout, trees=TREES, objective=None):
    scorer = Scorer(layout, pad_token_id=1)
    objective = RewardModel() if objective is None else objective
    batch = scorer.lay_out(trees, model=model)
    return objective_inputs(
        model, batch, references={}, objective=objective, reward_head=head, with_vocabulary=False
    ).completions


def test_a_reward_is_read_at_the_last_token_in_both_layouts():
    model = tiny_model("llama").double().eval()
    head = RewardHead.of(model, seed=3).double()
    expected = []
    for tree in TREES:
        for ids in tree.completion_ids:
            hidden = model.model(torch.tensor([[*tree.prompt_ids, *ids]])).last_hidden_state
            expected.append((hidden[0, -1] @ head.weight[0]).item())
    for layout in ("tree", "padded"):
        batch = rewards_of(model, head, layout)
        assert batch.learned_rewards.tolist() == pytest.approx(expected, rel=1e-9)
        assert batch.logprobs[batch.completion_mask].isnan().all()


def test_value_and_gradient_are_those_of_the_formula_on_single_sequences():
    model = tiny_model("llama").double().eval()
    head = RewardHead.of(model, seed=3).double()
    weights = [head.weight, model.model.layers[1].mlp.down_proj.weight, model.model.embed_tokens.weight]
    r = [
        model.model(torch.tensor([[*tree.prompt_ids, *ids]])).last_hidden_state[0, -1] @ head.weight[0]
        for tree in TREES
        for ids in tree.completion_ids
    ]
    pairs = [(r[0], r[1]), (r[2], r[4]), (r[2], r[3]), (r[4], r[3])]
    smoothed = [-(0.9 * (w - v).sigmoid().log() + 0.1 * (v - w).sigmoid().log()) + 0.2 * (w + v) ** 2 for w, v in pairs]
    ranked = [
        -(r[0] - torch.stack(r[:2]).logsumexp(0)) + 0.2 * (r[0] + r[1]) ** 2,
        -(r[2] + r[4] - torch.stack(r[2:]).logsumexp(0) - torch.stack([r[3], r[4]]).logsumexp(0))
        + 0.2 * (r[2] + r[3]) ** 2,
    ]
    for objective, terms in ((RewardModel(0.2, "conservative(0.1)"), smoothed), (RankedRewardModel(0.2), ranked)):
        expected = torch.stack(terms).mean()
        loss = objective(rewards_of(model, head, "tree", objective=objective)).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        # RMSNorm computes in float32, whatever the weights are.
        wanted = torch.autograd.grad(expected, weights, retain_graph=True)
        for gradient, other in zip(torch.autograd.grad(loss, weights), wanted, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_loss_and_gradient_are_those_of_trl(tmp_path):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    save_tiny(tmp_path / "tiny")
    config = {"num_labels": 1, "pad_token_id": 2}
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tiny", **config)
    causal = LlamaForCausalLM.from_pretrained(tmp_path / "tiny")
    head = RewardHead.of(causal)
    head.weight.data.copy_(classifier.score.weight)
    pairs = [(tree.prompt_ids, tree.completion_ids[:2], gap) for tree, gap in zip(TREES, (0.4, 1.5), strict=True)]
    rows = [
        {"chosen_ids": [*prompt, *chosen], "rejected_ids": [*prompt, *rejected], "margin": gap}
        for prompt, (chosen, rejected), gap in pairs
    ]
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<unk>"
    arguments = RewardConfig(
        str(tmp_path / "trl"),
        center_rewards_coefficient=0.05,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_dropout=True,
    )
    trainer = RewardTrainer(classifier, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    inputs = trainer.data_collator([{key: value for key, value in row.items()} for row in rows])
    theirs = trainer.compute_loss(classifier, dict(inputs))
    theirs.backward()
    trees = [PromptTree(prompt, two, (1.0, 0.0)) for prompt, two, _ in pairs]
    objective = RewardModel(0.05, margin="data")
    batch = Scorer("tree", pad_token_id=1).lay_out(trees, model=causal)
    margins = torch.tensor([gap for _, _, gap in pairs for _ in range(2)])
    ours = objective(
        objective_inputs(
            causal,
            batch,
            references={},
            objective=objective,
            reward_head=head,
            with_vocabulary=False,
            columns={"margin": margins},
        ).completions
    ).mean()
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    torch.testing.assert_close(head.weight.grad, classifier.score.weight.grad, rtol=1e-3, atol=1e-5)
    own, other = dict(causal.model.named_parameters()), dict(classifier.model.named_parameters())
    for name in ("layers.0.self_attn.q_proj.weight", "layers.1.mlp.down_proj.weight", "embed_tokens.weight"):
        torch.testing.assert_close(own[name].grad, other[name].grad, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    tiny, data = save_tiny(folder / "tiny"), write_pairs(folder / "pairs.jsonl")
    values = run_data(tiny, data, folder / "run", training={"save_steps": 4})
    values["objective"] = {"kind": "reward_model", "centering": 0.01}
    train(parse_run(values), console=Console(quiet=True))
    return folder


def test_a_run_learns_rewards_that_every_door_gives_alike(reward_run, tmp_path):
    run = falign.load(reward_run / "run")
    assert run.summary.before["rewards/accuracies"] < 0.7
    assert run.summary.after["rewards/accuracies"] >= 0.8
    assert "entropy" not in run.summary.after
    exported = run.export("classifier", out=tmp_path / "classifier")
    assert 0 <= exported.proof.max_abs_difference <= 1e-4
    # Plain transformers, one text at a time; a text ends at the stop token, as in training.
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "classifier")
    rows = [json.loads(line) for line in lines(reward_run / "pairs.jsonl")]
    texts = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    with torch.no_grad():
        plain = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
        batched = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0].tolist()
    run.score(str(reward_run / "pairs.jsonl"), tmp_path / "scores.jsonl")
    scores = [json.loads(line)["implicit_reward"] for line in lines(tmp_path / "scores.jsonl")]
    reward = ClassifierReward(*load_classifier(tmp_path / "classifier", device="cpu"))
    as_reward = reward(
        [row["prompt"] for row in rows for _ in range(2)],
        [row[side] for row in rows for side in ("chosen", "rejected")],
    )
    for other in (plain, batched, as_reward):
        assert other == pytest.approx(scores, abs=1e-4)


def test_a_resumed_run_has_the_same_head_and_model(reward_run, tmp_path):
    import shutil

    whole = reward_run / "run"
    shutil.copytree(whole, tmp_path / "cut")
    for name in ("checkpoint-8", "summary.json", "samples.json"):
        target = tmp_path / "cut" / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    values = run_data(reward_run / "tiny", reward_run / "pairs.jsonl", tmp_path / "cut", training={"save_steps": 4})
    values["objective"] = {"kind": "reward_model", "centering": 0.01}
    train(parse_run(values), console=Console(quiet=True), resume=True)
    for file in ("reward_head.safetensors", "adapter_model.safetensors"):
        assert (tmp_path / "cut/adapter" / file).read_bytes() == (whole / "adapter" / file).read_bytes()


def test_a_conversation_ends_at_its_stop_token_where_the_template_writes_more(tmp_path):
    from falign.models.classifier_export import reading_tokenizer

    tokenizer = tiny_tokenizer()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}]
    for tail, end in (("</s>\n", "</s>"), ("\n", "\n</s>"), ("", " </s>")):
        tokenizer.chat_template = (
            "{% for m in messages %}{{ '<s>' + m['content'] + '" + tail.replace("\n", "\\n") + "' }}{% endfor %}"
        )
        reading = reading_tokenizer(tokenizer, {1})
        assert reading.apply_chat_template(turns, tokenize=False).endswith(end)
        asked = reading.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert asked == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert reading.pad_token_id not in (None, 1)


def test_what_cannot_be_is_refused_with_its_place(reward_run, tmp_path):
    run = falign.load(reward_run / "run")
    with pytest.raises(ConfigError, match="has trained a reward model: give format=classifier"):
        run.export("merged", out=tmp_path / "merged")
    values = run_data(reward_run / "tiny", reward_run / "pairs.jsonl", tmp_path / "margin")
    values["objective"] = {"kind": "reward_model", "margin": "data"}
    with pytest.raises(DataError, match=r"pairs.jsonl:\d+ has no margin, which the objective reads: give every row"):
        train(parse_run(values), console=Console(quiet=True))
    assert not (tmp_path / "margin").exists()
    online = online_data(reward_run / "tiny", write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "online")
    online["objective"] = {"kind": "reward_model"}
    with pytest.raises(ConfigError, match="learned_rewards"):
        train(parse_run(online), console=Console(quiet=True))


def test_margins_are_read_from_their_column(tmp_path):
    tiny, data = save_tiny(tmp_path / "tiny"), write_pairs(tmp_path / "pairs.jsonl", n=12)
    rows = [{**json.loads(line), "gap": i / 4} for i, line in enumerate(lines(data))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = run_data(tiny, data, tmp_path / "run", training={"max_steps": 1})
    values["data"]["train"][0]["columns"] = {"margin": "gap"}
    values["objective"] = {"kind": "reward_model", "margin": "data"}
    with_margin = train(parse_run(values), console=Console(quiet=True)).before["loss"]
    values["objective"]["margin"], values["output_dir"] = "none", str(tmp_path / "plain")
    assert with_margin > train(parse_run(values), console=Console(quiet=True)).before["loss"] + 0.2


def test_a_salsa_run_is_rewarded_by_the_exported_reward_model(reward_run, tmp_path):
    """On a soup of two adapters, as SALSA's reference; the logged rewards are those of the run that trained them."""
    tiny, exported = reward_run / "tiny", tmp_path / "classifier"
    falign.load(reward_run / "run").export("classifier", out=exported)
    for seed in (1, 2):
        values = run_data(tiny, reward_run / "pairs.jsonl", tmp_path / f"sft{seed}", training={"max_steps": 1})
        train(parse_run({**values, "seed": seed, "objective": {"kind": "supervised"}}), console=Console(quiet=True))
    values = online_data(tiny, write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "salsa")
    values |= {
        "adapter": {"init": str(tmp_path / "sft1")},
        "reference": {"kind": "soup", "paths": [str(tmp_path / "sft1"), str(tmp_path / "sft2")]},
        "rewards": [{"kind": "classifier", "path": str(exported)}],
        "objective": {"kind": "policy_gradient", "divergence": "reverse_kl", "beta": 0.01},
        "training": {**values["training"], "max_steps": 2},
    }
    folder = train(parse_run(values), console=Console(quiet=True)).folder
    sampled = [json.loads(line) for line in lines(folder.completions_file)]
    ended = [row for row in sampled if row["completion"].strip()]
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in ended]
    falign.load(reward_run / "run").score(rows, tmp_path / "scores.jsonl")
    scores = [json.loads(line)["implicit_reward"] for line in lines(tmp_path / "scores.jsonl")]
    assert len(scores) == len(ended) > 30
    assert [row["reward"] for row in ended] == pytest.approx(scores, abs=1e-4)
