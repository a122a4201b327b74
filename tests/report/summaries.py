"""Summaries in the form of ``falign evaluate``, with numbers that occur nowhere else."""

import json


def estimate(value):
    return {"value": value, "low": value - 0.0204, "high": value + 0.0306}


def rewards_summary(**changes):
    bins = [{"confidence": c, "accuracy": a, "count": n} for c, a, n in ((0.55, 0.5, 30), (0.95, 0.8, 10), (0.7, 0, 0))]
    summary = {
        "kind": "rewards",
        "name": "rm_bench",
        "benchmark": "rm_bench",
        "source": "total_dataset.json",
        "num_items": 1327,
        "skipped": {"longer than the window": 19, "empty completion": 0},
        "scorers": {
            "implicit_reward": {
                "scores": {"score": estimate(0.6173), "hard": estimate(0.3419)},
                "calibration": {"ece": 0.0871, "brier": 0.2357, "bins": bins},
            },
            "length": {"scores": {"score": estimate(0.5432), "hard": estimate(0.2765)}, "calibration": None},
        },
    }
    return {**summary, **changes}


def samples_summary(**changes):
    summary = {
        "kind": "samples",
        "name": "samples",
        "divergence": "jensen_shannon",
        "num_prompts": 41,
        "num_completions": 16,
        "source": "prompts.jsonl",
        "sampling": {"temperature": 1.0, "max_new_tokens": 77},
        "metrics": {
            "reward": estimate(0.7317),
            "reference/reward": estimate(0.4391),
            "divergence/reverse_kl": estimate(2.8465),
            "self_bleu": 0.1953,
            "pass@1": estimate(0.3141),
            "pass@2": estimate(0.4528),
            "pass@4": estimate(0.6667),
        },
        "frontier": {
            "divergence": "reverse_kl",
            "points": [{"label": "end", "divergence": 2.8465, "reward": 0.7317}],
            "best_of_n": [{"n": 1, "divergence": 0.0, "reward": 0.4}, {"n": 4, "divergence": 0.64, "reward": 0.7}],
            "ideal": {
                "jensen_shannon": [
                    {"beta": 1.0, "divergence": 0.3, "reward": 0.6},
                    {"beta": 0.1, "divergence": 2.0, "reward": 0.9},
                    {"beta": 0.0, "divergence": float("inf"), "reward": 1.0},
                ]
            },
        },
    }
    return {**summary, **changes}


def add_summary(run, summary):
    folder = run / "evaluation" / summary["name"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder / "summary.json"
