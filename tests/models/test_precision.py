import pytest
import torch

from falign.errors import ConfigError
from falign.models import precision
from falign.models.precision import multiplies_bfloat16, resolve_dtype

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
