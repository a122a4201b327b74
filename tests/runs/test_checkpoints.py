import json
import os
import shutil

import pytest

from falign.errors import TrainingError
from falign.runs.checkpoints import checkpoints, newest_undamaged, remove_leftovers, rotate, seal, why_damaged

RUN = "0123abcd"


def checkpoint(run, step, content="weights"):
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_text(content)
    (folder / "optimizer.pt").write_text("moments")
    seal(folder, run=RUN, step=step, logs={})
    return folder


def names(run):
    return sorted(path.name for path in run.iterdir())


def whole(run, told=None):
    return newest_undamaged(run, run=RUN, tell=(told if told is not None else []).append)


def truncate(folder):
    os.truncate(folder / "optimizer.pt", 3)


def change(folder):
    (folder / "optimizer.pt").write_text("moment5")


def remove(folder):
    (folder / "optimizer.pt").unlink()


def sealed_as(text):
    def unseal(folder):
        (folder / "checksums.json").write_text(text)

    unseal.__name__ = f"sealed as {text}"
    return unseal


def unname(folder):
    """Flip a bit of a file that the seal does not name."""
    file = folder / "checksums.json"
    sealed = json.loads(file.read_text())
    del sealed["files"]["optimizer.pt"]
    file.write_text(json.dumps(sealed))
    change(folder)


def give_to_another_run(folder):
    file = folder / "checksums.json"
    file.write_text(file.read_text().replace(RUN, "fedcba98"))


def take_of_an_earlier_step(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("checkpoint-9"), folder)


HALF = '{"run": "0123abcd", "step": 10, "logs": {}, "files": {"optimizer.pt": '
SEALS = (
    '{"optim',
    "",
    "[]",
    "null",
    "{}",
    "3",
    '{"files": {}}',
    HALF + "null}}",
    HALF + '{"bytes": 7}}}',
    HALF + "[]}}",
)
DAMAGES = {
    truncate: "optimizer.pt has 3 of 7 bytes",
    change: "has changed since",
    remove: "missing",
    unname: "optimizer.pt is not in checksums.json",
    give_to_another_run: "it belongs to another run",
    take_of_an_earlier_step: "it is the checkpoint of step 9",
    **{sealed_as(text): "checksums.json is missing or damaged" for text in SEALS},
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_newest_checkpoint_is_put_aside_with_its_reason_and_the_one_before_it_serves(tmp_path, damage):
    first, second, told = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10), []
    damage(second)
    assert whole(tmp_path, told) == first
    assert names(tmp_path) == ["checkpoint-9", "damaged-checkpoint-10"]
    (line,) = told
    assert DAMAGES[damage] in line
    assert "the run resumes from checkpoint-9" in line
    assert whole(tmp_path, told) == first
    assert len(told) == 1


def test_all_damaged_is_an_error_that_names_each_and_moves_none(tmp_path):
    truncate(checkpoint(tmp_path, 1))
    remove(checkpoint(tmp_path, 2))
    with pytest.raises(
        TrainingError, match=r"no undamaged checkpoint \(checkpoint-2: .*missing; checkpoint-1: .*3 of 7"
    ):
        whole(tmp_path)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_a_second_damaged_checkpoint_of_a_step_gets_a_name_of_its_own(tmp_path):
    checkpoint(tmp_path, 1)
    for _ in range(2):
        truncate(checkpoint(tmp_path, 2))
        whole(tmp_path)
    assert names(tmp_path) == ["checkpoint-1", "damaged-checkpoint-2", "damaged-checkpoint-2-2"]


def test_no_checkpoint_is_none(tmp_path):
    assert whole(tmp_path) is None


def test_a_link_is_no_checkpoint_of_the_run_and_what_it_leads_to_is_left_alone(tmp_path):
    elsewhere = checkpoint(tmp_path / "elsewhere", 7)
    run = tmp_path / "run"
    checkpoint(run, 3)
    (run / "checkpoint-7").symlink_to(elsewhere)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-3"]
    assert whole(run).name == "checkpoint-3"
    rotate(run, run=RUN, keep=1)
    assert why_damaged(elsewhere) is None


def test_the_newest_stay_by_step_and_not_by_time(tmp_path):
    for step in (10, 9, 2):
        checkpoint(tmp_path, step)
    rotate(tmp_path, run=RUN, keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-9"]
    rotate(tmp_path, run=RUN, keep=None)
    assert len(names(tmp_path)) == 2


def test_the_checkpoint_that_a_resume_would_take_is_never_removed(tmp_path):
    first = checkpoint(tmp_path, 1)
    for step in (2, 3):
        truncate(checkpoint(tmp_path, step))
    rotate(tmp_path, run=RUN, keep=2)
    assert whole(tmp_path) == first


def test_what_a_kill_left_half_written_goes_and_all_else_stays(tmp_path):
    checkpoint(tmp_path, 1)
    for name in (".checkpoint-2.0123abcd.partial", ".adapter.0123abcd.replaced", ".checkpoint-1.removed", ".mine"):
        (tmp_path / name).mkdir()
    (tmp_path / ".run.yaml.partial").write_text("half")
    outside = tmp_path / "checkpoint-1" / "optimizer.pt"
    (tmp_path / ".linked.partial").symlink_to(outside)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".mine", "checkpoint-1"]
    assert outside.read_text() == "moments"


def test_a_seal_names_every_file_in_every_folder(tmp_path):
    folder = checkpoint(tmp_path, 1)
    (folder / "shards").mkdir()
    (folder / "shards" / "0.safetensors").write_text("x")
    seal(folder, run=RUN, step=1, logs={})
    sealed = json.loads((folder / "checksums.json").read_text())["files"]
    assert set(sealed) == {"adapter_model.safetensors", "optimizer.pt", "shards/0.safetensors"}
    (folder / "shards" / "0.safetensors").write_text("y")
    assert why_damaged(folder) == "shards/0.safetensors has changed since it was written"
