"""What a verifier may not do, for processes of their own: it imports nothing of falign, as their modules do."""

import os
import signal
import socket
import sqlite3
import stat
import struct
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


def try_named_pipe(completion):
    os.mkfifo(completion + ".pipe")


def try_node(completion):
    os.mknod(completion + ".node", 0o600 | stat.S_IFREG)


def try_fork_and_execute_past_subprocess(completion):
    import _posixsubprocess

    arguments = [b"/usr/bin/touch", completion.encode() + b".touched"]
    reading, writing = os.pipe()
    streams, user = (-1, -1, -1, -1, -1, -1, reading, writing), (None, None, None, -1, None)
    group, vfork = (-1,), (False,)
    _posixsubprocess.fork_exec(
        arguments, arguments[:1], True, (writing,), None, None, *streams, True, False, *group, *user, *vfork
    )
    os.close(writing)
    if failed := os.read(reading, 100):
        raise OSError(failed)


def try_signal_by_descriptor(completion):
    signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)


def try_socket_past_the_module(completion):
    import _socket

    _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)


def try_read_the_environment_of_the_supervisor(completion):
    Path(f"/proc/{os.getppid()}/environ").read_bytes()


def try_read_it_by_the_folder(completion):
    folder = os.open("/", os.O_RDONLY)
    os.read(os.open(f"proc/{os.getppid()}/environ", os.O_RDONLY, dir_fd=folder), 100)


def try_find_the_connection(completion):
    import gc

    gc.get_objects()


def try_look_at_other_threads(completion):
    sys._current_frames()


def environment(completion):
    return dict(os.environ)


def pid(completion):
    return os.getpid()


def channels():
    """The descriptors that are sockets."""
    found = []
    for name in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(name).st_mode):
                found.append(name)
        except OSError:
            pass
    return found


HEADER = struct.Struct("!I16s?")


def forges(completion, how):
    """Write to the run as if it were the answer, and return 0."""
    answer = b'{"value": 1.0}'
    frames = {
        "whole frame": HEADER.pack(len(answer), bytes(16), False) + answer,
        "half a frame": HEADER.pack(1000, bytes(16), False)[:7],
        "a long frame": HEADER.pack((1 << 32) - 1, bytes(16), False),
        "noise": b"\n\n\n" * 100,
    }
    for name in channels():
        os.write(name, frames[how])
    return 0.0


def forges_later(completion):
    """Leave a thread that forges the answers of later calls."""
    import threading
    import time

    def forge():
        while True:
            time.sleep(0.01)
            forges("", "whole frame")

    threading.Thread(target=forge, daemon=True).start()
    return 0.0


def half_a_frame_and_hang(completion):
    import time

    forges(completion, "half a frame")
    time.sleep(3600)


def number_in_reach(completion):
    """Count the texts of 16 bytes that lead from the frames of this thread, as a number of a request would."""
    found, frame = 0, sys._getframe()
    while frame is not None:
        found += sum(isinstance(value, bytes) and len(value) == 16 for value in frame.f_locals.values())
        frame = frame.f_back
    return found
