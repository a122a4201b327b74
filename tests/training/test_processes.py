import pytest

from falign.errors import ConfigError
from falign.runfile import parse_run
from falign.training.processes import join, own_batches, part
from tests.training.pairs import run_data


def test_parts_are_the_whole_in_its_order_and_of_one_size_but_for_one():
    for parts in (1, 2, 4, 11):
        found = [part(range(9), number, parts) for number in range(parts)]
        assert [item for each in found for item in each] == list(range(9))
        assert max(map(len, found)) - min(map(len, found)) <= 1


def test_a_process_alone_has_all_batches_and_all_of_them_count():
    assert list(own_batches("abcde", 2)) == [("ab", True), ("cd", True), ("e", True)]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ZeRO .* is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "set fsdp_config.fsdp_version=2"),
    ],
)
def test_what_is_not_supported_is_refused_before_the_processes_meet(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        join()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reference": {"kind": "moving_average", "alpha": 0.5, "every": 5}},
            "reference.kind=moving_average under FSDP2",
        ),
        ({"reference": {"kind": "periodic_reset", "every": 5}}, "reference.kind=periodic_reset under FSDP2"),
    ],
)
def test_what_sharded_weights_cannot_do_is_refused_with_the_reason(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_run(run_data("model", "data", tmp_path, **changes)).reference.check_sharding(field="reference")
