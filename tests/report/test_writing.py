"""Whole reports of real runs: what is in the page, and that it needs nothing else."""

import json
import re
import sys

import pytest

from falign.cli.main import main
from falign.errors import ConfigError
from falign.evaluation.summaries import read_evaluations
from falign.report import write_report
from tests.report.conftest import HOSTILE
from tests.report.page_text import Page
from tests.report.summaries import add_summary, samples_summary


def read(written):
    text = written.page.read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_is_whole_and_refers_to_nothing_outside(reported):
    _, text, page = reported
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not {tag for tag in page.tags if tag in ("script", "link", "img", "iframe", "object", "image")}
    links = [value for _, name, value in page.attributes if name in ("href", "src")]
    assert links
    assert all(link.startswith("#") and link[1:] in page.ids for link in links)
    assert len(set(page.ids)) == len(page.ids)


def test_what_completions_hold_is_text(reported):
    _, text, page = reported
    assert "<script" not in text
    assert HOSTILE.strip() in page.words()


def test_completions_of_online_runs_are_text_whatever_they_hold(runs):
    run = runs("online", logs=False)
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        row["completion"] = "</p><img src=x onerror=alert(1)>\x00\ud800 \x1b[31m"
    (run / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text, page = read(write_report([run]))
    assert "<img" not in text
    assert "</p><img src=x onerror=alert(1)>\ufffd\ufffd \ufffd[31m" in page.words()
    assert "user: question" in page.words()


@pytest.mark.parametrize(
    "shown",
    [
        "61.7% 59.7 to 64.8%",
        "34.2% 32.1 to 37.2%",
        "54.3%",
        "0.087",
        "0.236",
        "1327 items of total_dataset.json; left out: 19 longer than the window.",
        "0.732 0.711 to 0.762",
        "0.439",
        "2.846",
        "0.195",
        "66.7% 64.6 to 69.7%",
        "41 prompts with 16 completions each, temperature 1.0, max new tokens 77, from prompts.jsonl",
    ],
)
def test_the_numbers_of_evaluations_are_there_with_their_intervals(reported, shown):
    assert shown in reported[2].words()


def test_what_was_not_skipped_is_not_mentioned(reported):
    assert "empty completion" not in reported[2].words()


def test_held_out_values_are_those_of_the_run(runs):
    run = runs("offline", logs=False)
    summary = json.loads((run / "summary.json").read_text())
    words = read(write_report([run]))[1].words()
    accuracy, margin = summary["after"]["rewards/accuracies"], summary["after"]["rewards/margins"]
    assert f"reward accuracy 50.0% {accuracy:.1%}" in words
    assert f"mean margin +0.000 {margin:+.3f}".replace("-", "−") in words


def test_the_data_and_the_command_to_train_it_again(runs):
    run = runs("offline", logs=False)
    manifest = json.loads((run / "manifest.json").read_text())
    words = read(write_report([run]))[1].words()
    assert f"to train on {manifest['data']['num_train']}" in words
    assert "rows read 24" in words
    assert f"falign train {run}/run.yaml output_dir={run}-again" in words
    assert f"torch {manifest['versions']['torch']}" in words


def test_sections_without_data_say_which_command_fills_them(runs):
    run = runs("offline", logs=False)
    words = read(write_report([run]))[1].words()
    assert f"falign evaluate rewards {run} rm_bench" in words
    assert f"falign evaluate samples {run}" in words
    assert "No step has been logged yet." in words


def test_runs_that_lack_an_evaluation_are_named(reported):
    written, _, page = reported
    other = written.page.parents[1] / "other"
    assert f"Without: other, online. falign evaluate rewards {other} rm_bench" in page.words()


def test_several_runs_have_their_differences_and_one_colour_each(reported):
    _, text, page = reported
    assert "objective .beta 0.5 0.3 0.0" in page.words()
    assert "objective .divergence jensen_shannon forward_kl null" in page.words()
    assert re.search(r"output_dir \S*offline \S*other", page.words()) is None
    assert all(f"stroke: var(--run-{i})" in text for i in (1, 2, 3))
    assert "stroke: var(--run-4)" not in text
    assert not re.findall(r"(?:stroke|fill): #[0-9a-f]{6}", text)


def test_a_run_that_has_not_ended_has_a_report_of_what_is_there(runs):
    run = runs("offline")
    for name in ("summary.json", "samples.json"):
        (run / name).unlink()
    logs = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(logs[:4]))
    words = read(write_report([run]))[1].words()
    assert "Not ended: offline." in words
    assert f"falign train {run}/run.yaml --resume" in words
    assert "reward accuracy 50.0% –" in words
    assert "3 so far" in words


def test_a_run_that_has_only_begun_has_a_report(runs):
    run = runs("offline", logs=False)
    for name in ("summary.json", "samples.json", "before.json"):
        (run / name).unlink()
    assert "Not ended: offline." in read(write_report([run]))[1].words()


def test_pictures_lie_beside_the_page_and_the_same_runs_give_the_same_bytes(runs):
    run = runs("online")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = ("step", "reward", "eval_reward")
    logs = [{key: value for key, value in json.loads(line).items() if key in kept} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))
    first = write_report([run])
    assert first.page == run / "report.html"
    assert first.pictures == (run / "report-figures" / "reward.png", run / "report-figures" / "pass-k-held-out.png")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in first.pictures)
    before = [path.read_bytes() for path in (first.page, *first.pictures)]
    again = write_report([run])
    assert [path.read_bytes() for path in (again.page, *again.pictures)] == before


def test_pages_of_one_folder_keep_their_pictures_apart(runs, tmp_path):
    run = runs("offline", logs=False)
    figures = [write_report([run], tmp_path / name).figures for name in ("a.html", "b.html", "folder")]
    assert figures == [tmp_path / "a-figures", tmp_path / "b-figures", tmp_path / "folder" / "report-figures"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("samples.json", [3]), ("manifest.json", {"data": {"sources": [{}]}}), ("summary.json", [3])],
)
def test_a_file_of_another_form_is_refused_and_no_page_is_left(runs, tmp_path, name, content):
    run = runs("offline").rename(tmp_path / "spoilt")
    (run / name).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"spoilt.* does not have the form|spoilt.* is damaged"):
        write_report([run], tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_a_file_that_is_no_report_is_not_overwritten(runs, tmp_path):
    run = runs("offline", logs=False)
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    with pytest.raises(ConfigError, match=r"mine.html exists and is not a report"):
        write_report([run], tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
    assert not (tmp_path / "mine-figures").exists()


def test_tables_have_headings_and_plots_have_words(reported):
    _, text, page = reported
    headings = [value for tag, name, value in page.attributes if tag == "th" and name == "scope"]
    assert len(headings) == page.tags.count("th")
    assert page.tags.count("caption") == page.tags.count("table")
    plots = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert page.tags.count("figure") == len(plots)
    assert any(re.match(r"Loss\. optimizer step against .* offline: from 0\.69", words) for words in plots)
    assert 'name="viewport"' in text
    assert '<html lang="en">' in text


def test_what_is_drawn_is_also_a_picture(reported):
    written, _, page = reported
    names = {path.stem for path in written.pictures}
    assert len(written.pictures) == page.tags.count("figure")
    assert {"loss", "reward", "scores-rm-bench", "reliability-rm-bench", "frontier-samples"} <= names
    assert {"pass-k-of-samples", "pass-k-held-out", "divergence-reverse-kl"} <= names


def test_a_run_that_ends_while_it_is_reported_is_shown_as_it_was_read(runs, monkeypatch, capsys):
    run = runs("offline", logs=False)
    summary, samples = ((run / name).read_text() for name in ("summary.json", "samples.json"))
    for name in ("summary.json", "samples.json"):
        (run / name).unlink()
    read = read_evaluations

    def ends(folder):
        (run / "samples.json").write_text(samples)
        (run / "summary.json").write_text(summary)
        return read(folder)

    monkeypatch.setattr("falign.report.runs.read_evaluations", ends)
    monkeypatch.setattr(sys, "argv", ["falign", "report", str(run)])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    assert not stopped.value.code, captured.err
    assert "has not ended" in " ".join(captured.out.split())
    assert "Not ended: offline." in Page((run / "report.html").read_text(encoding="utf-8")).words()


def test_an_evaluation_that_goes_away_meanwhile_is_left_out(tmp_path, monkeypatch):
    path = add_summary(tmp_path, samples_summary())
    listed = [path, path.with_name("gone.json")]
    monkeypatch.setattr(type(tmp_path), "glob", lambda *_: listed)
    assert [summary.name for summary in read_evaluations(tmp_path)] == ["samples"]


def test_a_picture_of_somebody_else_is_kept(runs):
    run = runs("online")
    picture = write_report([run]).pictures[0]
    assert write_report([run]).pictures[0] == picture
    page = (run / "report.html").read_bytes()
    picture.write_bytes(b"\x89PNG mine")
    (run / "summary.json").unlink()  # the page would be another one now
    with pytest.raises(ConfigError, match=rf"{picture.name} exists and was not drawn by falign"):
        write_report([run])
    assert picture.read_bytes() == b"\x89PNG mine"
    assert (run / "report.html").read_bytes() == page


@pytest.mark.parametrize("name", ["report.html", "report-figures", "report-figures/reward.png"])
def test_a_link_out_of_the_run_folder_is_refused(runs, tmp_path, name):
    run = runs("online", logs=False)
    (tmp_path / "elsewhere").write_text("mine")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=rf"{name} is a link"):
        write_report([run])
    outside = tmp_path / "page"
    with pytest.raises(ConfigError, match="is a link"):
        write_report([run], outside)
    assert (tmp_path / "elsewhere").read_text() == "mine"
