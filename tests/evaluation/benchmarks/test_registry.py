import pytest

from falign.errors import ConfigError
from falign.evaluation import benchmarks
from falign.evaluation.benchmarks import Benchmark, missing_subsets


def test_every_name_gives_a_benchmark_of_that_name():
    assert benchmarks.names() == ("rewardbench", "rewardbench2", "rm_bench", "judgebench", "llmbar", "preferences")
    for name in benchmarks.names():
        benchmark = benchmarks.get(name)
        assert isinstance(benchmark, Benchmark)
        assert benchmark.name == name


def test_an_unknown_name_suggests_the_near_miss():
    with pytest.raises(ConfigError, match=r"benchmark='rmbench' is unknown.*did you mean 'rm_bench'"):
        benchmarks.get("rmbench")


def test_missing_subsets_are_the_published_ones_of_which_there_is_no_item():
    assert missing_subsets(benchmarks.get("rm_bench"), ["code", "chat", "code", "math"]) == (
        "safety-refuse",
        "safety-response",
    )
    assert missing_subsets(benchmarks.get("preferences"), [""]) == ()
