import pytest

from falign.errors import ConfigError
from falign.runfile import parse_run
from falign.runfile.engine_config import TransformersEngineConfig, VLLMEngineConfig
from tests.training.prompts import online_data


def engine(**section):
    return parse_run(online_data("model", "prompts", "run", rollout={"engine": section})).rollout.engine


def test_completions_are_sampled_in_process_unless_a_server_is_named():
    assert parse_run(online_data("model", "prompts", "run")).rollout.engine == TransformersEngineConfig()
    assert engine(kind="vllm", shared_dir="/shared", timeout=5) == VLLMEngineConfig(shared_dir="/shared", timeout=5)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "vlm", "shared_dir": "/shared"}, r"rollout\.engine"),
        ({"kind": "vllm"}, r"rollout\.engine.*shared_dir"),
        ({"kind": "vllm", "shared_dir": "/shared", "tiemout": 3}, "timeout"),
        ({"kind": "vllm", "shared_dir": "/shared", "url": "localhost:8000"}, r"rollout\.engine\.url"),
        ({"kind": "vllm", "shared_dir": "/shared", "wait": -1}, r"rollout\.engine\.wait"),
        ({"kind": "transformers", "shared_dir": "/shared"}, "shared_dir"),
    ],
)
def test_what_no_engine_has_is_refused_by_name(section, message):
    with pytest.raises(ConfigError, match=message):
        engine(**section)


def test_weights_below_one_cannot_be_the_bound():
    with pytest.raises(ConfigError, match=r"rollout\.correction\.cap"):
        parse_run(online_data("model", "prompts", "run", rollout={"correction": {"cap": 0.5}}))
