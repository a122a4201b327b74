"""Nothing that others wrote commands the terminal: data, prompts, completions, names, error messages."""

import ast
import io
import json
from pathlib import Path

import pytest
from rich.markup import escape
from rich.table import Table
from rich.text import Text

import falign
from falign.terminal import Terminal, harmless, json_line

TITLE, CLEAR, C1, TURNED = "\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "\u202egnihton"
HOSTILE = f"a{TITLE}b{CLEAR}c{C1}d{TURNED}e\r\x7f"
COMMANDS = ("\x1b]", "\x1b[2J", "\x07", "\x9b", "\u202e", "e\r", "\x7f")


@pytest.fixture
def printed(falign_printed, monkeypatch):
    """Return a function that runs a command line and returns exit status and everything it printed."""
    monkeypatch.setenv("FORCE_COLOR", "1")

    def run(*arguments):
        status, out, err = falign_printed(*arguments)
        return status, out + err

    return run


def assert_harmless(text):
    assert not [command for command in COMMANDS if command in text]


@pytest.mark.parametrize(
    "print_it",
    [
        lambda console: console.print(HOSTILE, markup=False),
        lambda console: console.print(f"[bold red]error:[/] {escape(HOSTILE)}"),
        lambda console: console.print("model", Text(HOSTILE, style="bold")),
        lambda console: console.print(Table(HOSTILE, title=escape(HOSTILE), caption=HOSTILE)),
        lambda console: console.print(table_of(HOSTILE)),
        lambda console: console.rule(HOSTILE),
    ],
)
def test_whatever_is_printed_is_harmless_and_still_styled(print_it):
    file = io.StringIO()
    print_it(Terminal(file=file, force_terminal=True, color_system="truecolor", width=120))
    assert_harmless(file.getvalue())
    assert "owned" in file.getvalue()


def table_of(text):
    table = Table("one", "two")
    table.add_row(text, Text(text, style="red"))
    return table


def test_styles_of_falign_remain_and_emoji_codes_are_text():
    file = io.StringIO()
    Terminal(file=file, force_terminal=True, color_system="truecolor").print("[bold]x[/]:smile:")
    assert file.getvalue() == "\x1b[1mx\x1b[0m:smile:\n"


def test_tabs_and_line_feeds_and_all_letters_remain():
    text = "é\t漢字\n𝒳 👩‍👩‍👧 שלום"
    assert harmless(text) == text


def test_a_line_of_json_has_the_same_value():
    line = json_line({"completion": HOSTILE})
    assert_harmless(line)
    assert json.loads(line) == {"completion": HOSTILE}


def test_prompts_and_completions_are_harmless(printed, tiny, monkeypatch):
    monkeypatch.setattr("falign.rollouts.answers.answer", lambda *_, **__: [HOSTILE])
    for options in ((), ("--json",)):
        status, text = printed("sample", tiny, "--prompt", HOSTILE, *options)
        assert status == 0
        assert_harmless(text)
        assert "owned" in text


@pytest.mark.parametrize(
    "row",
    [
        {HOSTILE: "q", "chosen": "a", "rejected": "b"},
        {"prompt": HOSTILE, "chosen": 7, "rejected": HOSTILE},
        {"messages": [{"role": HOSTILE, "content": HOSTILE}]},
    ],
)
def test_data_and_column_names_are_harmless(printed, tmp_path, row):
    path = tmp_path / f"{CLEAR}.jsonl"
    path.write_text(json.dumps(row) + "\n{" + HOSTILE + "\n")
    status, text = printed("data", "check", path)
    assert status == 2
    assert_harmless(text)


@pytest.mark.parametrize(
    "arguments", [("sample", f"./{HOSTILE}", "-p", "x"), ("train", f"{HOSTILE}.yaml"), ("report", HOSTILE)]
)
def test_names_in_error_messages_are_harmless(printed, arguments):
    status, text = printed(*arguments)
    assert status == 2
    assert_harmless(text)
    assert "owned" in text


def test_a_traceback_is_harmless(printed, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError(HOSTILE)

    monkeypatch.setattr("falign.plain_yaml.plain_yaml", fails)
    monkeypatch.setattr("falign.cli.data.plain_yaml", fails)
    status, text = printed("data", "check", "x.jsonl")
    assert status == 1
    assert "Traceback" in text
    assert_harmless(text)


def test_everything_is_printed_through_the_terminal():
    root = Path(falign.__file__).parent
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"Console", "rich.print", "typer.secho"}:
                pytest.fail(f"{file.relative_to(root)}:{node.lineno}: print through falign.terminal.Terminal")
