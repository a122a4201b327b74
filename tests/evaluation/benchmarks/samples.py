"""Rows in the published schemas, made up, and files of them."""

import json


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rewardbench_row(subset, number=0, **fields):
    return {
        "prompt": f"Question {number} of {subset}?",
        "chosen": "A good answer.",
        "chosen_model": "human",
        "rejected": "A bad one.",
        "rejected_model": "unknown",
        "subset": subset,
        "id": number,
    } | fields


def rewardbench2_row(subset, id, right=1, wrong=3, **fields):
    return {
        "id": id,
        "prompt": f"Question {id}?",
        "chosen": [f"Right {i}." for i in range(right)],
        "rejected": [f"Wrong {i}." for i in range(wrong)],
        "num_correct": right,
        "num_incorrect": wrong,
        "total_completions": right + wrong,
        "models": ["unknown"] * (right + wrong),
        "subset": subset,
        "additional_metadata": None,
    } | fields


def rm_bench_row(id, **fields):
    sides = {side: [f"{side} {style}" for style in ("short", "long", "*rich*")] for side in ("chosen", "rejected")}
    return {"id": id, "prompt": f"Question {id}?", **sides} | fields


def judgebench_row(source, label, number=0, **fields):
    return {
        "pair_id": f"pair-{number}",
        "original_id": str(number),
        "source": source,
        "question": f"Question {number}?",
        "response_model": "some-model",
        "response_A": "Answer A.",
        "response_B": "Answer B.",
        "label": label,
    } | fields


def llmbar_row(label, **fields):
    return {"input": "Do this.", "output_1": "Done.", "output_2": "Not done.", "label": label} | fields
