"""Every kind of adapter under every verb: equal to PEFT on the same files, or refused before training.

The oracle is PEFT itself: the base read by transformers, the adapter's folder read by ``PeftModel.from_pretrained``.
"""

import io
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from rich.console import Console
from safetensors.torch import load_file
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from falign.cli.export import Format, export
from falign.cli.sample import sample
from falign.errors import ConfigError, FalignError, ModelError
from falign.evaluation.loading import load_run
from falign.models import (
    export_adapter,
    export_merged,
    load_adapter,
    load_model,
    load_tokenizer,
    stop_token_ids,
    write_soup,
)
from falign.references import AdapterOff
from falign.rollouts.answers import answer
from falign.runfile import parse_run
from falign.runs import RunFolder
from falign.runs.loading import load_trained
from falign.scoring import LAYOUTS, PromptTree, completion_scores
from falign.training import train
from tests.models.tiny import VOCABULARY, fill_adapter, save_tiny, tiny_tokenizer
from tests.scoring.models import with_peft
from tests.training.pairs import run_data, write_pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

TREES = [PromptTree((0, 40, 60, 61), ((70, 80, 1), (90, 1)), preference=(1.0, 0.0), place="a:1")]
BATCH = LAYOUTS["padded"](TREES, pad_token_id=1)
IDS = torch.tensor([[0, 40, 60, 61, 70, 80, 5, 7]])
QUESTION = "question 1: "
TOLERANCE = {"rtol": 0, "atol": 1e-5}

QV = {"target_modules": ["q_proj", "v_proj"]}
TRAINED = {
    "LoRA": ("llama", None),
    "rsLoRA": ("llama", {**QV, "use_rslora": True}),
    "lm_head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "tied lm_head": ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),
    "MoE": ("mixtral", None),
    "4-bit base": ("nf4", None),
    "DoRA": ("llama", {**QV, "use_dora": True}),
    "tokens": ("llama", {**QV, "trainable_token_indices": [5, 70]}),
    "tied tokens": ("qwen2", {**QV, "trainable_token_indices": [5, 70]}),
    "modules_to_save": ("llama", {**QV, "modules_to_save": ["lm_head", "norm"]}),
    "MoE experts": ("mixtral", {"target_modules": "all-linear"}),
}
REFUSED = {
    "PiSSA": ("llama", {**QV, "init_lora_weights": "pissa"}, "subtracts the adapter's initial update"),
    "OLoRA": ("llama", {**QV, "init_lora_weights": "olora"}, "subtracts the adapter's initial update"),
    "embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, "on an embedding|lora_embedding_A"),
}
CHANGE_THE_BASE = ("PiSSA", "OLoRA")
WITHOUT_SOUP = {
    "DoRA": "is DoRA",
    "tokens": "has trained tokens",
    "tied tokens": "has trained tokens",
    "modules_to_save": "has fully trained modules",
    "MoE experts": "acts on parameters such as experts",
}


@dataclass
class World:
    """The bases, the adapters that PEFT has saved, and the runs, each made once."""

    root: Path
    told: dict = field(default_factory=dict)

    def base(self, name):
        folder = self.root / name
        if folder.is_dir():
            return folder
        if name == "mixtral":
            torch.manual_seed(0)
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
            model = MixtralForCausalLM(
                MixtralConfig(
                    **{"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2},
                    **{**sizes, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
                )
            )
        elif name == "nf4":
            model = load_model(self.base("llama"), quantization="nf4")
        else:
            return save_tiny(folder, name)
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return folder

    def saved(self, kind, base, options, seed=1):
        """An adapter that PEFT has made, moved away from its start, and saved."""
        folder = self.root / f"{kind}-{seed}"
        if not folder.is_dir():
            torch.manual_seed(seed)
            model = with_peft(
                load_model(self.base(base)), LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, **options)
            )
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and ("lora_B" in name or "lora_" not in name):
                    parameter.data += 0.1 * torch.randn(parameter.shape)
            model.save_pretrained(folder)
        return folder

    def run(self, kind):
        """The run of a kind, trained for two steps, with a checkpoint at each."""
        base, options = TRAINED[kind]
        path = self.root / f"run-{kind}"
        adapter = {"r": 2, "alpha": 4}
        if options is not None:
            adapter = {"init": str(self.saved(kind, base, options))}
        config = self.config(path, base, adapter)
        if not path.is_dir():
            console = Console(file=io.StringIO(), width=300)
            train(config, console=console)
            self.told[kind] = console.file.getvalue()
        return config, RunFolder.open(path)

    def config(self, path, base, adapter, **changes):
        data = self.root / "pairs.jsonl"
        values = run_data(self.base(base), data if data.is_file() else write_pairs(data, n=8), path, **changes)
        values["adapter"] = adapter
        values["data"] |= {"eval_size": 2}
        values["training"] |= {"max_steps": 2, "save_steps": 1, "save_total_limit": 3, "learning_rate": 0.05}
        values["reference"] = {"kind": "adapter_off"}
        values["sampling"] = {"prompts": []}
        return parse_run(values)

    def plain(self, name):
        model = AutoModelForCausalLM.from_pretrained(self.base(name), device_map={"": "cpu"}).eval()
        for module in model.modules():
            if isinstance(module, Linear4bit):  # its kernel for inference rounds the scales
                module.support_avx512bf16_for_cpu = False
        return model

    def oracle(self, name, adapter):
        return PeftModel.from_pretrained(self.plain(name), adapter).eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("matrix"))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


def same(found, expected):
    torch.testing.assert_close(found, expected, **TOLERANCE)


@torch.no_grad()
def dense(model):
    """Log-probabilities of the completions of `TREES`, one row at a time, from the model's own logits."""
    rows = []
    for completion in TREES[0].completion_ids:
        ids = torch.tensor([TREES[0].prompt_ids + completion])
        logprobs = log_softmax(model(input_ids=ids, use_cache=False).logits.float(), dim=-1)
        start = len(TREES[0].prompt_ids)
        rows.append(torch.stack([logprobs[0, start + i - 1, token] for i, token in enumerate(completion)]))
    return torch.cat(rows)


def of_completions(logprobs):
    return torch.cat([row[: len(ids)] for row, ids in zip(logprobs, TREES[0].completion_ids, strict=True)])


def greedy_answer(model, tokenizer, stops):
    """The model's answer to `QUESTION`, by transformers."""
    turns = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    mask, stop = torch.ones_like(ids), list(stops)
    with torch.no_grad():
        greedy = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=8, eos_token_id=stop, pad_token_id=1
        )
    return tokenizer.decode(greedy[0, ids.shape[1] :], skip_special_tokens=True).strip()  # as falign shows it


each_trained = pytest.mark.parametrize("kind", TRAINED)
each_refused = pytest.mark.parametrize("kind", REFUSED)


@each_trained
def test_train(world, kind):
    _, folder = world.run(kind)
    oracle = world.oracle(TRAINED[kind][0], folder.adapter)
    same(logits(load_trained(folder).model), logits(oracle))
    moved = (logits(oracle) - logits(world.plain(TRAINED[kind][0]))).abs().max()
    assert moved > 1e-2


@each_trained
def test_resume(world, kind):
    config, folder = world.run(kind)
    whole = load_file(folder.adapter / "adapter_model.safetensors")
    for name in ("checkpoint-2", "adapter"):
        shutil.rmtree(folder.path / name)
    (folder.path / "summary.json").unlink()
    train(config, console=Console(quiet=True), resume=True)
    resumed = load_file(folder.adapter / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@each_trained
def test_checkpoint(world, kind):
    _, folder = world.run(kind)
    found = load_trained(folder, checkpoint=1).model
    same(logits(found), logits(world.oracle(TRAINED[kind][0], folder.path / "checkpoint-1")))


@each_trained
def test_sample(world, kind):
    _, folder = world.run(kind)
    policy, tokenizer, *_ = load_trained(folder)
    stops = stop_token_ids(policy.get_base_model(), tokenizer)
    found = answer(policy, tokenizer, [QUESTION], stop_token_ids=stops, max_new_tokens=8)
    assert found == [greedy_answer(world.oracle(TRAINED[kind][0], folder.adapter), tokenizer, stops)]


@each_refused
def test_sampling_from_a_folder_is_pefts_or_refused(world, kind, tmp_path, capsys):
    base, options, reason = REFUSED[kind]
    saved, tokenizer = world.saved(kind, base, options), load_tokenizer(world.base(base))
    oracle, stops = world.oracle(base, saved), stop_token_ids(world.base(base), tokenizer)
    expected = greedy_answer(oracle, tokenizer, stops)
    if kind in CHANGE_THE_BASE:
        with pytest.raises(ModelError, match=reason):
            load_adapter(load_model(world.base(base)), saved, trainable=False)
    else:
        policy = load_adapter(load_model(world.base(base)), saved, trainable=False)
        assert answer(policy, tokenizer, [QUESTION], stop_token_ids=stops, max_new_tokens=8) == [expected]
    with pytest.raises(ModelError, match=r"holds an adapter, not a model: merge it into its base .*merge_and_unload"):
        sample(str(saved), [QUESTION])
    oracle.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    sample(str(tmp_path / "merged"), [QUESTION], max_new_tokens=8, json_lines=True)
    assert json.loads(capsys.readouterr().out)["completion"] == expected


@each_trained
def test_score_and_adapter_off_reference(world, kind):
    _, folder = world.run(kind)
    scored = load_run(str(folder.path), max_length=None)
    base = TRAINED[kind][0]
    with torch.no_grad():
        found = completion_scores(scored.policy.eval(), BATCH).logprobs
    same(of_completions(found), dense(world.oracle(base, folder.adapter)))
    assert scored.reference.identity()["kind"] == "adapter_off"
    same(of_completions(scored.reference.logprobs(scored.policy, BATCH)), dense(world.plain(base)))


@each_trained
def test_export_adapter(world, kind, tmp_path):
    _, folder = world.run(kind)
    export(str(folder.path), Format.adapter, tmp_path / "out")
    base = TRAINED[kind][0]
    same(logits(world.oracle(base, tmp_path / "out")), logits(world.oracle(base, folder.adapter)))


@each_trained
def test_export_merged(world, kind, tmp_path):
    _, folder = world.run(kind)
    base = TRAINED[kind][0]
    if base == "nf4":
        with pytest.raises(ModelError, match=r"is stored quantized \(nf4\).*\(--base\)"):
            export(str(folder.path), Format.merged, tmp_path / "out")
        base = "llama"  # what was quantized
        export(str(folder.path), Format.merged, tmp_path / "out", base=str(world.base(base)))
    else:
        export(str(folder.path), Format.merged, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    same(logits(merged), logits(world.oracle(base, folder.adapter)))


@each_trained
def test_soup(world, kind, tmp_path):
    _, folder = world.run(kind)
    earlier, tokenizer, *_ = load_trained(folder, checkpoint=1)
    members = [folder.adapter, export_adapter(earlier, tokenizer, tmp_path / "earlier")]
    if kind in WITHOUT_SOUP:
        with pytest.raises(ModelError, match=WITHOUT_SOUP[kind]):
            write_soup(members, tmp_path / "soup")
        return
    write_soup(members, tmp_path / "soup", weights=[0.75, 0.25])
    base = TRAINED[kind][0]
    oracle = world.oracle(base, members[0])
    oracle.load_adapter(str(members[1]), "second")
    oracle.base_model.set_adapter(["default", "second"])  # PEFT sums the updates of all that are active
    for layer in oracle.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", 0.75)
            layer.set_scale("second", 0.25)
    same(logits(world.oracle(base, tmp_path / "soup")), logits(oracle))
    same(logits(load_adapter(load_model(world.base(base)), tmp_path / "soup", trainable=False)), logits(oracle))


@each_refused
@pytest.mark.parametrize("place", ["start", "reference"])
def test_train_and_resume_are_refused_before_training(world, kind, place, tmp_path):
    base, options, reason = REFUSED[kind]
    saved = str(world.saved(kind, base, options))
    config = world.config(tmp_path / "run", base, {"init": saved} if place == "start" else {"r": 2, "alpha": 4})
    if place == "reference":
        values = config.model_dump(mode="json") | {"reference": {"kind": "adapter", "path": saved}}
        config = parse_run(values)
    with pytest.raises(ModelError, match=reason):
        train(config, console=Console(quiet=True))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="not a run folder"):
        train(config, console=Console(quiet=True), resume=True)


@each_refused
def test_soup_is_refused(world, kind, tmp_path):
    base, options, reason = REFUSED[kind]
    with pytest.raises(ModelError, match=reason):
        write_soup([world.saved(kind, base, options, seed) for seed in (1, 2)], tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


@each_refused
def test_loading_scoring_and_adapter_off_are_pefts_or_refused(world, kind):
    base, options, reason = REFUSED[kind]
    saved = world.saved(kind, base, options)
    if kind in CHANGE_THE_BASE:
        with pytest.raises(ModelError, match=reason):
            load_adapter(load_model(world.base(base)), saved, trainable=False)
        with pytest.raises(ModelError, match=reason):
            AdapterOff().logprobs(world.oracle(base, saved), BATCH)
        return
    oracle = world.oracle(base, saved)
    model = load_adapter(load_model(world.base(base)), saved, trainable=False)
    same(logits(model), logits(oracle))
    with torch.no_grad():
        same(of_completions(completion_scores(model, BATCH).logprobs), dense(oracle))
    same(of_completions(AdapterOff().logprobs(model, BATCH)), dense(world.plain(base)))
    states = AdapterOff().states(model, BATCH).distribution
    plain = AdapterOff().states(load_adapter(load_model(world.base(base)), saved, trainable=False), BATCH).distribution
    same(
        states.head.logits(states.head.embeddings(states.hidden)),
        plain.head.logits(plain.head.embeddings(plain.hidden)),
    )


@each_refused
def test_exports_are_refused(world, kind, tmp_path):
    base, options, reason = REFUSED[kind]
    model, tokenizer = world.oracle(base, world.saved(kind, base, options)), load_tokenizer(world.base(base))
    for write in (export_adapter, export_merged):
        with pytest.raises(FalignError, match=rf"{reason}|more than a pair of LoRA matrices"):
            write(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_weights_of_a_base_in_four_bits_cannot_be_trained(world, tmp_path):
    values = world.config(tmp_path / "run", "nf4", {"r": 2, "alpha": 4}).model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"adapter=null trains all weights.*stored quantized \(nf4\)"):
        train(parse_run(values | {"adapter": None, "reference": {"kind": "frozen"}}), console=Console(quiet=True))


def test_a_run_says_that_experts_are_left_out(world):
    world.run("MoE")
    assert "2 modules hold experts (first: model.layers.0.mlp.experts). They and their routers" in world.told["MoE"]
    world.run("LoRA")
    assert "experts" not in world.told["LoRA"]


def test_an_adapter_made_for_another_base_is_refused(world, tmp_path):
    other = save_tiny(tmp_path / "other", seed=1)
    _, folder = world.run("LoRA")
    for adapter, reference in (
        ({"init": str(folder.adapter)}, {"kind": "adapter_off"}),
        ({"r": 2, "alpha": 4}, {"kind": "adapter", "path": str(folder.path)}),
        ({"r": 2, "alpha": 4}, {"kind": "soup", "paths": [str(folder.path), str(folder.adapter)]}),
    ):
        values = world.config(tmp_path / "run", "llama", adapter).model_dump(mode="json") | {"reference": reference}
        values["model"]["path"] = str(other)
        with pytest.raises(ModelError, match=r"adapter was made for .*llama with the weights .* and .*other has"):
            train(parse_run(values), console=Console(quiet=True))
    saved = world.saved("rsLoRA", "llama", TRAINED["rsLoRA"][1])  # by PEFT, which records a name alone
    with pytest.warns(
        UserWarning, match=r"rsLoRA-1 was made for .*llama according to its adapter_config.json, .*over .*other"
    ):
        load_adapter(load_model(other), saved, trainable=False)


def test_the_head_and_embeddings_that_peft_saves_beside_an_adapter_are_compared_with_the_base(world, tmp_path):
    options = TRAINED["lm_head"][1]
    saved = world.saved("lm_head", "llama", options)
    assert any(name.endswith("lm_head.base_layer.weight") for name in load_file(saved / "adapter_model.safetensors"))
    same(
        logits(load_adapter(load_model(world.base("llama")), saved, trainable=False)),
        logits(world.oracle("llama", saved)),
    )
    grown = load_model(world.base("llama"))
    grown.resize_token_embeddings(VOCABULARY + 4)
    resized = with_peft(grown, LoraConfig(task_type="CAUSAL_LM", r=2, **QV))
    fill_adapter(resized).save_pretrained(tmp_path / "resized")
    with pytest.raises(
        ModelError, match=r"(embed_tokens|lm_head).weight has shape \[264, 64\].*this model has \[260, 64\]"
    ):
        load_adapter(load_model(world.base("llama")), tmp_path / "resized", trainable=False)
    base = load_model(world.base("llama"))
    base.get_parameter("lm_head.weight").data[3, 3] += 1e-3
    with pytest.raises(ModelError, match=r"brings lm_head.weight along .* with other values than this model has"):
        load_adapter(base, saved, trainable=False)
