"""A Linux seccomp filter, by which the kernel permanently refuses system calls of a verifier's process.

It is loaded by :mod:`falign.rewards.confinement` from its file, and imports no part of falign. Python reports events of
its own functions, and not of all of them; whatever goes past Python still has to ask the kernel.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import sys

__all__ = ["refuse_system_calls"]

# By architecture: its number in the kernel, the number of clone, and the numbers of the refused calls.
CALLS = {
    "x86_64": (
        0xC000003E,
        56,
        {
            "processes": (57, 58, 59, 322),  # fork, vfork, execve, execveat
            "signals": (62, 129, 200, 234, 297, 424),  # kill, rt_sigqueueinfo, tkill, tgkill, rt_tgsigqueueinfo, pidfd_
            "other processes": (101, 310, 311, 434, 438),  # ptrace, process_vm_readv, _writev, pidfd_open, pidfd_getfd
            "devices and pipes with a name": (133, 259),  # mknod, mknodat
            "network": (41, 42, 49),  # socket, connect, bind
            "ways around": (165, 272, 308, 425),  # mount, unshare, setns, io_uring_setup
        },
    ),
    "aarch64": (
        0xC00000B7,
        220,
        {
            "processes": (221, 281),
            "signals": (129, 130, 131, 138, 240, 424),
            "other processes": (117, 270, 271, 434, 438),
            "devices and pipes with a name": (33,),
            "network": (198, 200, 203),
            "ways around": (40, 97, 268, 425),
        },
    ),
}
CLONE3, CLONE_THREAD = 435, 0x10000
FIRST_X32 = 0x40000000  # numbers of another calling convention of x86-64
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in the kernel's input to the filter program
ALLOWED, REFUSED = 0x7FFF0000, 0x00050000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, MODE_FILTER = 38, 22, 2


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("if_true", ctypes.c_ubyte),
        ("if_false", ctypes.c_ubyte),
        ("operand", ctypes.c_uint),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def refuse_system_calls() -> bool:
    """Make the kernel refuse new processes, signals, sockets and named pipes from now on.

    Returns:
        Whether it does: only Linux on x86-64 and ARM64 can.
    """
    if sys.platform != "linux" or platform.machine() not in CALLS:
        return False
    architecture, clone, calls = CALLS[platform.machine()]
    refuse = (RETURN, 0, 0, REFUSED | errno.EPERM)
    steps = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), refuse, (LOAD, 0, 0, NUMBER)]
    steps += [(AT_LEAST, 0, 1, FIRST_X32), refuse]
    for number in sorted(number for group in calls.values() for number in group):
        steps += [(EQUAL, 0, 1, number), refuse]
    # Without clone3 the C library starts threads by clone; a filter cannot read the flags of clone3.
    steps += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, REFUSED | errno.ENOSYS)]
    steps += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, FIRST_ARGUMENT), (ANY_BIT, 1, 0, CLONE_THREAD), refuse]
    steps.append((RETURN, 0, 0, ALLOWED))
    instructions = (_Instruction * len(steps))(*(_Instruction(*step) for step in steps))
    program = _Program(len(steps), instructions)
    library = ctypes.CDLL(None)
    library.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return library.prctl(PR_SET_SECCOMP, MODE_FILTER, ctypes.byref(program), 0, 0) == 0
