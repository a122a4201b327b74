"""Objects of a wrong type, given from Python: each is named with its remedy, not only where types are checked."""

import json
import subprocess
import sys

import pytest

from tests.models.tiny import save_tiny

CALLS = {
    "falign.objectives.PolicyGradient(weights='dads')": "weights='dads' is not a list: give a list of token weights",
    "falign.objectives.PolicyGradient(penalty_weights=['dads'])": "penalty_weights has the name 'dads'",
    "falign.objectives.Cloning(weights=[falign.objectives.Dads])": "which is not a token weight: give an object with",
    "falign.methods.OREAL(passed_token_weights=[len])": "weights has <built-in function len>, which is not a token ",
    "falign.methods.SuperHF(beta='0.1')": "beta='0.1' is a str; it must be a number",
    "falign.methods.KTO(beta='0.1')": "beta='0.1' is a str; it must be a number",
    "falign.methods.HDPO(alpha='1')": "alpha='1' is a str; it must be a number",
    "falign.methods.HDPO(alpha=-1)": "alpha=-1 must be positive and finite",
    "falign.methods.HDPO('jensen_shannon', alpha=0.5)": "alpha=0.5 under jensen_shannon",
    "falign.methods.SparsePO(mask='maop')": "mask='maop' is unknown; choose one of ['mapo', 'learned', ",
    "falign.methods.SparsePO(mask_l1=1.0)": "mask_l1=1.0 with mask='mapo': it is for learned masks; leave it out, or",
    "falign.methods.ADPA(gamma=-1)": "gamma=-1 must be positive and finite",
    "falign.objectives.PolicyGradient(beta='x')": "beta='x' is a str; it must be a number",
    "falign.objectives.PolicyGradient(beta=True)": "beta=True is a bool; it must be a number",
    "falign.objectives.Pairwise(falign.divergences.get('reverse_kl'), beta=None)": "beta=None is a NoneType; it must",
    "falign.objectives.MomentConstraints((1.0, '2'))": "lambdas[1]='2' is a str; it must be a number",
    "falign.objectives.TopK(falign.divergences.get('reverse_kl'), 2.5)": "k=2.5 is a float; it must be a whole number",
    "falign.objectives.DifficultyKernel(a='1')": "a='1' is a str; it must be a number",
    "falign.objectives.ace(alpha='1')": "alpha='1' is a str; it must be a number",
    "falign.divergences.Alpha('2')": "alpha='2' is a str; it must be a number",
    "falign.methods.DisCO(score='log_ratio')": "score='log_ratio': choose one of log_likelihood, ratio",
    "falign.pairs(rows, out='pairs.jsonl', min_margin='0.5')": "min_margin='0.5' must be a finite number",
    "falign.audit(falign.objectives.Supervised(), 3)": "divergence=3 is a int; give a name, or a Divergence",
    "falign.sample(model, 'a')": "model is a LlamaForCausalLM: give a run, or the path or name",
    "falign.score(model, [], 'scores.jsonl')": "model is a LlamaForCausalLM: give a run",
    "falign.presample(model, [], 'sorted', verifier=\"number(answer='n')\")": "model is a LlamaForCausalLM: give a run",
    "falign.evaluate_samples(model, [])": "model is a LlamaForCausalLM: give a run",
    "falign.evaluate_rewards(model, 'preferences')": "model is a LlamaForCausalLM: give a run",
    "falign.soup([model, model], 'soup')": "models is a LlamaForCausalLM: give a run",
    "falign.sample(folder, 7)": "prompts is a int: give a text, or a list",
    "falign.sample(folder, {'role': 'user'})": "prompts is a dict: give a text, or a list",
    "falign.sample(folder, [{'role': 'user', 'content': 'a'}])": "prompts has a mapping: give a list of texts and",
    "falign.sample(folder, [[{}]])": "prompt 0: 'prompt[0]' is {}; a turn must have role and content",
    "falign.sample(folder, [7])": "prompt 0: 'prompt' is 7; it must be text or a list of turns",
    "falign.evaluate_samples(folder, rows, rewards=['math'], out='samples')": "rewards has 'math': give functions",
    "falign.evaluate_samples(folder, rows, reference=model, out='s')": "reference is a LlamaForCausalLM: give a run",
    "falign.score(folder, rows, 'scores.jsonl', reference=model)": "reference is a LlamaForCausalLM: give a run",
    "falign.evaluate_rewards(folder, 'preferences', reference=model)": "reference is a LlamaForCausalLM: give a run",
    "train(reference=model)": "reference is a LlamaForCausalLM: give FrozenModel(model, **falign.models.model_iden",
    "train(references=['reference'])": "references is ['reference']: give a mapping from a name to each",
    "train(references={'teacher': folder})": "references['teacher']: reference is a str: give a falign.references.Ref",
    "train(objective=falign.methods.OPD(3))": "divergence is 3: give a name, such as 'jensen_shannon', or a falign",
    "train(objective=falign.methods.KD(None))": "divergence is None: give a name",
    "train(measures=['entropy'])": "measures is ['entropy']: give a mapping",
    "train(measures='entropy')": "measures is 'entropy': give a mapping from a name to each",
    "train(rewards='math')": "rewards has 'math': give functions f(prompts, completions, **columns)",
    "train(rewards=['math'])": "rewards has 'math': give functions",
    "train(rewards=7)": "rewards has 7: give functions",
    "train(rewards=dict(kind='maths'))": "rewards.0.kind='maths' is unknown",
    "train(rewards=dict(function=len, wieght=2))": "unknown key 'wieght' beside a function, which takes name",
    "train(rewards=dict(function=len, kind='math'))": "unknown key 'kind' beside a function",
    "train(rewards=dict(function=len, weight='x'))": "rewards: weight='x': Input should be a valid number",
    "train(callbacks=['wandb'])": "callbacks has 'wandb': give transformers.TrainerCallback objects",
    "train(callbacks=lambda: None)": "callbacks has <function <lambda>",
    "train(new_rewards=True)": "`new_rewards` has no effect without `resume`",
    "train(data=DatasetDict(train=table, test=table))": "splits ['train', 'test']: give one of them, or dict(",
}
PROGRAM = """
import json, sys
from pathlib import Path
import falign
from datasets import Dataset, DatasetDict
from falign.errors import FalignError
from falign.models import load_model

folder, said = sys.argv[1], {}
rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
table = Dataset.from_list(rows)
model = load_model(folder)


def train(**arguments):
    return falign.train(folder, **{"output_dir": "run", "data": rows, **arguments})


for call in json.loads(sys.argv[2]):
    try:
        eval(call)
        said[call] = "no error"
    except (FalignError, ValueError) as error:
        said[call] = str(error)
    except BaseException as error:
        said[call] = repr(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("types")
    # Tests check types at each call, so a program of its own shows what a user sees.
    command = [sys.executable, "-c", PROGRAM, str(save_tiny(folder / "tiny")), json.dumps(list(CALLS))]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("call", CALLS)
def test_an_object_of_a_wrong_type_is_named_with_its_remedy(said, call):
    assert CALLS[call] in said[call]
