"""What a verifier may not do, for processes of their own: it imports nothing of falign, as their modules do."""

import os
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from pathlib import Path


def try_write(completion):
    Path(completion).write_text("x")


def try_append(completion):
    os.open(completion, os.O_WRONLY | os.O_APPEND)


def try_remove(completion):
    os.remove(completion)


def try_rename(completion):
    os.rename(completion, completion + "2")


def try_connect(completion):
    socket.create_connection(("127.0.0.1", 1))


def try_fetch(completion):
    urllib.request.urlopen("http://127.0.0.1:1/")


def try_start(completion):
    subprocess.run([sys.executable, "-c", "1"], check=True)


def try_fork(completion):
    os.fork()


def try_kill(completion):
    os.kill(os.getppid(), 0)


def try_machine_code(completion):
    import ctypes

    ctypes.CDLL(None).unlink(completion.encode())


def try_write_a_database(completion):
    connection = sqlite3.connect(completion)
    connection.execute("CREATE TABLE t (x)")
    connection.commit()


def evaluate(completion):
    return eval(completion)


def reads(completion):
    return float(Path(completion).read_text() == "mine")
