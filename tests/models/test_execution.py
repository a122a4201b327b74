"""How a model is run."""

import re

import pytest
import torch
from transformers.utils import import_utils

from falign.errors import ConfigError
from falign.models import execution as precision
from falign.models import load_model
from falign.models.execution import check_attention, multiplies_bfloat16, named_device, resolve_dtype
from falign.runfile import parse_run
from tests.training.pairs import run_data


def test_a_device_is_named_or_chosen():
    assert named_device("cpu") == torch.device("cpu")
    assert named_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["nowhere", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(name, tiny):
    with pytest.raises(ConfigError, match=f"device='{name}' is"):
        load_model(tiny, device=name)


CPU = torch.device("cpu")


def test_names_mean_their_types():
    assert resolve_dtype("auto", device=CPU) is None
    named = [resolve_dtype(name, device=CPU) for name in ("float32", "bfloat16", "float16")]
    assert named == [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_fastest_follows_the_device(monkeypatch, native, expected):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: native)
    assert resolve_dtype("fastest", device=CPU) is expected


@pytest.mark.parametrize(
    ("capability", "avx512", "amx", "onednn", "expected"),
    [
        ("AVX512", True, False, True, True),
        ("AVX512", False, True, True, True),
        ("AVX512", False, False, True, False),  # oneDNN emulates it there
        ("AVX2", False, False, True, False),
        ("DEFAULT", False, False, True, True),  # ARM with the extension
        ("DEFAULT", False, False, False, False),
    ],
)
def test_a_cpu_counts_only_with_native_instructions(monkeypatch, capability, avx512, amx, onednn, expected):
    class Operators:
        class mkldnn:
            _is_mkldnn_bf16_supported = staticmethod(lambda: onednn)

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch, "ops", Operators)
    assert multiplies_bfloat16(CPU) is expected


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"dtype='bf16' is unknown; choose one of \['auto', 'float32', 'bfloat16'"):
        resolve_dtype("bf16", device=CPU)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_what_is_offered_computes_the_same(tiny, name):
    ids = torch.tensor([[5, 9, 70, 3]])
    with torch.no_grad():
        logits = load_model(tiny, attn_implementation=name)(ids).logits
        torch.testing.assert_close(logits, load_model(tiny)(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["flash_attention", "Sdpa", "", "paged|eager", "kernels-community/flash-attn2", "flash_attention_2"]
)
def test_what_cannot_work_is_refused_by_name_before_anything_is_loaded(tmp_path, name):
    if name == "flash_attention_2" and import_utils.is_flash_attn_2_available():
        pytest.skip("it works here")
    with pytest.raises(ConfigError, match=rf"attn_implementation={re.escape(repr(name))} (is unknown|needs a GPU)"):
        load_model(tmp_path / "nothing", attn_implementation=name)
    run = run_data(tmp_path / "nothing", "none.jsonl", tmp_path / "run", model={"attn_implementation": name})
    run["model"]["path"] = "nothing"
    with pytest.raises(ConfigError, match=r"^model\.attn_implementation="):
        parse_run(run).check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="it works here")
def test_flex_attention_is_refused_on_a_cpu():
    with pytest.raises(ConfigError, match="no backward pass on a CPU"):
        check_attention("flex_attention")
