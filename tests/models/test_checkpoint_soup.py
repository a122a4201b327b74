import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from falign.errors import ConfigError, ModelError
from falign.models import checkpoint_soup, load_model, load_tokenizer
from falign.models.checkpoint_files import CheckpointFiles
from falign.models.checkpoint_soup import write_checkpoint_soup
from falign.models.soup import cached_checkpoint_soup, write_soup
from falign.models.soup_members import soup_members
from tests.models.tiny import save_tiny, swap_tokens

IDS = torch.tensor([[7, 100, 30, 5, 222, 9]])


@pytest.fixture
def three(tmp_path):
    return [save_tiny(tmp_path / f"c{seed}", seed=seed) for seed in range(3)]


def stored(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("weights", [[0.2, 0.5, 0.3], [1 / 3] * 3, [0.6, 0.0, 0.4]])
def test_every_tensor_is_the_weighted_average(three, tmp_path, weights):
    folder = write_soup(three, tmp_path / "soup", weights=weights)
    members, soup = [stored(path) for path in three], stored(folder)
    assert soup.keys() == members[0].keys()
    for name, tensor in soup.items():
        expected = sum(w * member[name].double() for w, member in zip(weights, members, strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    assert load_model(folder)(input_ids=IDS).logits.isfinite().all()
    assert load_model(folder).generation_config.eos_token_id == [1, 3]
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(three[0]).get_vocab()
    record = json.loads((folder / "soup.json").read_text())
    assert (record["kind"], [each["weight"] for each in record["members"]]) == ("checkpoint", weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_weight_on_the_first_is_the_first_bit_for_bit(tmp_path, dtype):
    folders = [save_tiny(tmp_path / f"c{seed}", seed=seed, dtype=dtype) for seed in range(2)]
    first, soup = stored(folders[0]), stored(write_soup(folders, tmp_path / "soup", weights=[1.0, 0.0]))
    assert all(torch.equal(first[name], soup[name]) for name in first | soup)
    assert (tmp_path / "soup" / "config.json").read_bytes() == (folders[0] / "config.json").read_bytes()


def test_16_bit_checkpoints_are_summed_in_float32_and_rounded_once(tmp_path):
    folders = [save_tiny(tmp_path / f"c{seed}", seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    soup = stored(write_soup(folders, tmp_path / "soup"))
    members = [stored(path) for path in folders]
    for name, tensor in soup.items():
        exact = sum(member[name].double() for member in members) / 3
        assert tensor.dtype == torch.bfloat16
        # Half a unit in the last place of bfloat16 is a 256th; what cancels in the sum is rounded as float32.
        assert ((tensor.double() - exact).abs() <= exact.abs() / 256 + 1e-7).all()
    wide = write_soup(folders, tmp_path / "wide", dtype="float32")
    assert {tensor.dtype for tensor in stored(wide).values()} == {torch.float32}
    assert load_model(wide).dtype == torch.float32


def test_shards_in_and_out_hold_the_same_tensors(three, tmp_path):
    model = load_model(three[1])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    load_tokenizer(three[1]).save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    whole = stored(write_soup([three[0], three[1]], tmp_path / "whole", weights=[0.3, 0.7]))
    (tmp_path / "cut").mkdir()
    members = soup_members([three[0], tmp_path / "sharded"], [0.3, 0.7])
    write_checkpoint_soup(members, tmp_path / "cut", max_shard_bytes=100_000)
    shards = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert len(shards) > 2
    assert max(file.stat().st_size for file in shards) < 110_000
    cut = stored(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole | cut)
    loaded = load_model(tmp_path / "cut").state_dict()
    assert all(torch.equal(loaded[name], whole[name]) for name in loaded)


def test_no_more_is_held_than_a_file_of_the_result_and_a_tensor_of_each_member(three, tmp_path, monkeypatch):
    limit, alive, most, written = 60_000, [], [], []
    read, save = CheckpointFiles.read, checkpoint_soup.save_file

    def reads(self, name):
        most.append(sum(reference() is not None for reference in alive))
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    def saves(tensors, *arguments, **options):
        written.append(sum(tensor.nbytes for tensor in tensors.values()))
        save(tensors, *arguments, **options)

    monkeypatch.setattr(CheckpointFiles, "read", reads)
    monkeypatch.setattr(checkpoint_soup, "save_file", saves)
    (tmp_path / "soup").mkdir()
    write_checkpoint_soup(soup_members(three), tmp_path / "soup", max_shard_bytes=limit)
    tensors = stored(three[0]).values()
    assert len(alive) == 3 * len(tensors)
    assert max(most) == 1  # the one before, until this one takes its name
    assert max(written) <= max(limit, *(tensor.nbytes for tensor in tensors))
    assert sum(written) == sum(tensor.nbytes for tensor in tensors)


def test_tied_heads_are_left_out_also_where_a_member_has_written_its_own(tmp_path):
    folders = [save_tiny(tmp_path / f"q{seed}", kind="qwen2", seed=seed) for seed in range(2)]
    weights = stored(folders[1])
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folders[1] / "model.safetensors", metadata={"format": "pt"})
    for order in (folders, folders[::-1]):
        soup = load_model(write_soup(order, tmp_path / f"soup-{order[0].name}"))
        assert soup.get_output_embeddings().weight is soup.get_input_embeddings().weight
        expected = sum(stored(folder)["model.embed_tokens.weight"] for folder in folders) / 2
        torch.testing.assert_close(soup.get_input_embeddings().weight.detach(), expected)


def test_checkpoints_of_another_architecture_are_refused_with_the_first_field(three, tmp_path):
    other = save_tiny(tmp_path / "gpt2", kind="gpt2")
    with pytest.raises(ModelError, match=r"c0 and .*gpt2 are different architectures \(\w+ is"):
        write_soup([three[0], other], tmp_path / "soup")
    config = json.loads((three[1] / "config.json").read_text())
    (three[1] / "config.json").write_text(json.dumps({**config, "num_attention_heads": 2, "use_cache": False}))
    with pytest.raises(ModelError, match=r"different architectures \(num_attention_heads is 4 and 2\)"):
        write_soup(three[:2], tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_how_a_checkpoint_generates_is_no_matter_of_architecture(three, tmp_path):
    config = json.loads((three[1] / "config.json").read_text())
    changed = {**config, "use_cache": False, "pad_token_id": 3, "transformers_version": "4.40.0"}
    (three[1] / "config.json").write_text(json.dumps(changed))
    write_soup(three[:2], tmp_path / "soup")
    assert (tmp_path / "soup" / "config.json").read_bytes() == (three[0] / "config.json").read_bytes()


def test_another_vocabulary_is_refused_with_its_first_token(three, tmp_path):
    tokenizer = load_tokenizer(three[1])
    tokenizer.add_tokens(["<own>"])
    tokenizer.save_pretrained(three[1])
    with pytest.raises(
        ConfigError, match=r"c1 and .*c0 have different tokens: '<own>' has the id 260 in the first and none"
    ):
        write_soup([three[1], three[0]], tmp_path / "soup")
    write_soup(three[:2], tmp_path / "soup")  # the first has all of its tokens in the second, and gives the tokenizer
    swap_tokens(three[2], "a", "b")
    with pytest.raises(
        ConfigError, match=r"c0 and .*c2 have different tokens: 'a' has the id 68 in the first and 69 in the"
    ):
        write_soup([three[0], three[2]], tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"model.norm.weight is in .*c0 and not in .*c1"),
        (lambda w: w.update(extra=torch.zeros(2)), r"extra is in .*c1 and not in .*c0"),
        (lambda w: w.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight is \(64,\) in .*\(3,\) in .*c1"),
    ],
)
def test_other_tensors_are_refused_with_the_first_of_them(three, tmp_path, change, message):
    weights = stored(three[1])
    change(weights)
    save_file(weights, three[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        write_soup(three[:2], tmp_path / "soup")
    assert not list(tmp_path.glob(".soup*"))


def test_integers_that_differ_have_no_average(three, tmp_path):
    for i, folder in enumerate(three):
        weights = stored(folder) | {"steps": torch.tensor([min(i, 1)])}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"steps holds integers, and .*c1 has others than .*c0"):
        write_soup(three[:2], tmp_path / "soup")
    assert stored(write_soup(three[1:], tmp_path / "soup"))["steps"].tolist() == [1]


def test_quantized_pickled_damaged_and_missing_checkpoints_are_refused(three, tmp_path):
    with pytest.raises(ModelError, match=r"did you mean .*c1"):
        soup_members([three[0], tmp_path / "c11"])
    with pytest.raises(ModelError, match="some/name is not a local folder"):
        soup_members([three[0], "some/name"])
    damaged = shutil.copytree(three[1], tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match=r"damaged/model.safetensors is damaged"):
        write_soup([three[0], damaged], tmp_path / "soup")
    pickled = shutil.copytree(three[1], tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickled weights"):
        write_soup([three[0], pickled], tmp_path / "soup")
    config = json.loads((three[2] / "config.json").read_text())
    quantized = {**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (three[2] / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(ModelError, match="c2 has quantized weights"):
        write_soup([three[0], three[2]], tmp_path / "soup")


def test_a_soup_in_the_cache_is_made_once_and_named_by_its_content(three, tmp_path, monkeypatch):
    monkeypatch.setenv("FALIGN_CACHE", str(tmp_path / "cache"))
    first = cached_checkpoint_soup(soup_members(three[:2]))
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert cached_checkpoint_soup(soup_members(three[:2])) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    assert cached_checkpoint_soup(soup_members(three[:2], [0.4, 0.6])) != first
    shutil.copy(three[2] / "model.safetensors", three[1] / "model.safetensors")
    assert cached_checkpoint_soup(soup_members(three[:2])) != first


@pytest.mark.parametrize("member", [0, 1])
def test_a_soup_in_the_cache_belongs_to_the_configurations_of_its_members(three, tmp_path, monkeypatch, member):
    monkeypatch.setenv("FALIGN_CACHE", str(tmp_path / "made"))
    for path in three[:2]:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    first = cached_checkpoint_soup(soup_members(three[:2]))
    logits = load_model(first)(input_ids=IDS).logits
    for path in three[:2]:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    second = cached_checkpoint_soup(soup_members(three[:2]))
    assert second != first
    assert not torch.equal(load_model(second)(input_ids=IDS).logits, logits)
    (three[member] / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5, "use_cache": False}))
    assert cached_checkpoint_soup(soup_members(three[:2])) != second


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "kept.json"])
def test_a_soup_in_the_cache_with_a_flipped_bit_is_refused(three, tmp_path, monkeypatch, name):
    monkeypatch.setenv("FALIGN_CACHE", str(tmp_path / "made"))
    file = cached_checkpoint_soup(soup_members(three[:2])) / name
    content = bytearray(file.read_bytes())
    content[-20] ^= 4
    file.write_bytes(content)
    with pytest.raises(ModelError, match=rf"{file.parent}.* is made again"):
        cached_checkpoint_soup(soup_members(three[:2]))
