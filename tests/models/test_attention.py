import re

import pytest
import torch
from transformers.utils import import_utils

from falign.errors import ConfigError
from falign.models import load_model
from falign.models.attention import check_attention
from falign.runfile import parse_run
from tests.training.pairs import run_data


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
