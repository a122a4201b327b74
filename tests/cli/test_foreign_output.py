"""Text of libraries and of the option parser is masked and harmless, as falign's own is."""

import logging
import sys
import threading
import warnings

import pytest

from falign.cli.foreign_output import cleaned_output

SECRET = "https://me:hunter2@h/x\x1b[2J\x9b31m"


@pytest.fixture
def stream_handler():
    handler = logging.StreamHandler()
    logger = logging.getLogger("a_library")
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)


def fails():
    raise OSError(SECRET)


def log_an_exception(logger):
    try:
        fails()
    except OSError:
        logger.exception("it failed")


def fail_in_a_thread(_):
    thread = threading.Thread(target=fails)
    thread.start()
    thread.join()


def fail_in_a_finalizer(_):
    class Fails:
        def __del__(self):
            fails()

    Fails()


@pytest.mark.parametrize(
    "say",
    [
        lambda logger: logger.warning("100 %% of %s", SECRET),
        lambda logger: logger.warning(SECRET),
        lambda logger: logger.warning(*("%s %s", SECRET)),
        log_an_exception,
        lambda _: sys.stderr.write(warnings.formatwarning(SECRET, UserWarning, "x.py", 1)),
        fail_in_a_thread,
        fail_in_a_finalizer,
    ],
)
def test_what_libraries_say_is_cleaned(stream_handler, capsys, say):
    stream_handler.handlers[0].setStream(sys.stderr)
    with cleaned_output():
        say(stream_handler)
    err = capsys.readouterr().err
    assert "https://***@h/x" in err
    assert "hunter2" not in err
    assert not {"\x1b", "\x9b"} & set(err)


def test_everything_is_as_before_afterwards():
    before = (logging.getLogRecordFactory(), warnings.formatwarning, threading.excepthook, sys.unraisablehook)
    with cleaned_output():
        pass
    assert before == (logging.getLogRecordFactory(), warnings.formatwarning, threading.excepthook, sys.unraisablehook)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "x.yaml", f"--{SECRET}"], "error: No such option: --https://***@h/x"),
        (["sample", "x", "--temperature", SECRET], "error: Invalid value for '--temperature': "),
        (["report", "x", f"--out={SECRET}", f"--nothing={SECRET}"], "See falign report --help."),
        (["divergences", SECRET], "https://***@h/x"),
        ([SECRET], "See falign --help."),
        (["train"], "error: Missing argument 'RUN.yaml'. See falign train --help."),
        (["trian"], "error: No such command 'trian'. Did you mean 'train'? See falign --help."),
        (["data", "nothing"], "error: No such command 'nothing'. See falign data --help."),
    ],
)
def test_mistakes_in_options_are_told_as_all_others(falign_printed, arguments, message):
    status, out, err = falign_printed(*arguments, columns=300)
    assert (status, out) == (2, "")
    assert message in err
    assert "hunter2" not in err
    assert not {"\x1b", "\x9b"} & set(err)


@pytest.mark.parametrize("arguments", [[], ["data"], ["evaluate"], ["--help"], ["train", "--help"]])
def test_help_is_shown(falign_printed, arguments):
    status, out, err = falign_printed(*arguments)
    assert status == (0 if "--help" in arguments else 2)
    assert "Usage: falign" in " ".join(out.split())
    assert err == ""


class PanicException(BaseException):
    """As libraries in Rust raise it."""


def test_an_error_that_is_no_exception_is_cleaned(falign_printed, monkeypatch):
    def panics(*_, **__):
        raise PanicException(SECRET)

    monkeypatch.setattr("falign.cli.data.plain_yaml", panics)
    status, _, err = falign_printed("data", "check", "x.jsonl")
    assert status == 1
    assert "PanicException: https://***@h/x␛[2J�31m" in err
    assert "hunter2" not in err


def test_an_interrupt_ends_the_command_without_a_traceback(falign_printed, monkeypatch):
    def interrupts(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("falign.cli.data.plain_yaml", interrupts)
    assert falign_printed("data", "check", "x.jsonl") == (130, "", "")
