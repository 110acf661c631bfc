"""Locks a process of its own in, for good, before code that nobody has read runs in it.

Standard library alone, because the sandbox runs it in a bare interpreter. After `confine` the
process can compute, read Python's own library and write flat files in its folder. It can reach no
network, start no process or thread, signal or watch no other process, and raise no limit. Three
mechanisms of Linux do it, none of which needs privileges: resource limits; seccomp, a filter that
lets only the system calls below pass; and Landlock, which closes the file system. A kernel without
Landlock (before 5.13, or with it switched off) leaves the files of the user readable, and then
nothing can be written at all.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
import sys

# Numbers of x86_64, the only platform that Potstill's engines are locked for.
_SYSCALLS = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
    "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21,
    "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32,
    "dup2": 33, "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39,
    "recvfrom": 45, "shutdown": 48, "getsockname": 51, "getpeername": 52,
    "socketpair": 53, "getsockopt": 55, "exit": 60, "uname": 63, "fsync": 74,
    "fdatasync": 75, "ftruncate": 77, "getcwd": 79, "chdir": 80, "readlink": 89, "umask": 95,
    "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100,
    "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "getpgrp": 111,
    "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204,
    "getdents64": 217, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "newfstatat": 262, "readlinkat": 267,
    "faccessat": 269, "pselect6": 270, "ppoll": 271, "epoll_pwait": 281, "eventfd2": 290,
    "epoll_create1": 291, "dup3": 292, "pipe2": 293, "getrandom": 318, "statx": 332, "rseq": 334,
    "faccessat2": 439,
}  # fmt: skip
_SYSCALLS_THAT_WRITE = {"rename": 82, "unlink": 87, "unlinkat": 263, "renameat": 264}
# Number -> the place of an argument, and the values of it that pass. Others would have the kernel
# signal another process (F_SETOWN, FIOSETOWN), limit one, or send to a local socket of one.
_ONLY_WITH = {
    16: (1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),  # ioctl: terminals, FIONBIO, FIOCLEX
    44: (5, (0,)),  # sendto: without an address
    72: (1, (0, 1, 2, 3, 4, 5, 6, 7, 1030)),  # fcntl: flags, locks, copies
    302: (0, (0,)),  # prlimit64: of the process itself
}
_OPENAT = 257
_WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CAPSET, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 126, 444, 445, 446
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38

_MIB = 1 << 20
_FILE_BYTES = 16 * _MIB
_OPEN_FILES = 64

_libc = ctypes.CDLL(None, use_errno=True)


def confine(cpu_s: int, memory_mib: int) -> None:
    """Lock this process in; its current folder is the one that it may write to.

    Raises OSError where this machine cannot: then nothing unknown may run here.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, "the sandbox is made for Linux on x86_64")
    _limit(cpu_s, memory_mib)
    _call("prctl", _PR_SET_PDEATHSIG, 9)  # nobody is there to watch the time if the parent dies
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _drop_capabilities()
    _filter_syscalls(may_write=_close_files())


def _limit(cpu_s: int, memory_mib: int) -> None:
    for what, most in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, memory_mib * _MIB),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def _call(name: str, *arguments: int | bytes | None) -> int:
    """A function of the C library. Raises OSError where it fails."""
    wide = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    result = int(getattr(_libc, name)(*wide))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments[:1]}: {os.strerror(number)}")
    return result


def _drop_capabilities() -> None:
    """What makes root more than the owner of its files; of any other user there is nothing."""
    _call("syscall", _CAPSET, struct.pack("<Ii", 0x20080522, 0), bytes(24))


def _close_files() -> bool:
    """Let Landlock close the file system; False where this kernel has none."""
    try:
        abi = _call("syscall", _LANDLOCK_CREATE, None, 0, 1)
    except OSError:
        return False
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1  # every right that it knows
    write, read, list_, remove, make, cut = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8, 1 << 14
    ruleset = _call("syscall", _LANDLOCK_CREATE, struct.pack("<Q", handled), 8, 0)
    for folder in (f"{sys.base_prefix}/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64", _ZONES):
        _allow(ruleset, folder, read | list_)
    _allow(ruleset, "/dev/null", read | write)
    _allow(ruleset, "/dev/urandom", read)
    _allow(ruleset, os.getcwd(), (read | write | list_ | remove | make | cut) & handled)
    _call("syscall", _LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)
    return True


_ZONES = "/usr/share/zoneinfo"


def _allow(ruleset: int, path: str, rights: int) -> None:
    if os.path.exists(path):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _call("syscall", _LANDLOCK_ADD, ruleset, 1, struct.pack("<Qi", rights, place), 0)
        os.close(place)


def _filter_syscalls(may_write: bool) -> None:
    """A seccomp filter, in the words of BPF: (operation, jump if true, jump if false, operand)."""
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06
    passes, fails = (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x00050000 | errno.ENOSYS)

    def only_if(number: int, *body: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
        return [(equal, 0, len(body), number), *body]

    # The architecture first: the numbers of another one would mean other calls.
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, 0xC000003E),
        (give, 0, 0, 0x80000000),
        (load, 0, 0, 0),
    ]
    calls = _SYSCALLS | (_SYSCALLS_THAT_WRITE if may_write else {})
    for number in calls.values():
        program += only_if(number, passes)
    for number, (place, values) in _ONLY_WITH.items():
        tests = [step for value in values for step in ((equal, 0, 1, value), passes)]
        program += only_if(number, (load, 0, 0, 16 + 8 * place), *tests, fails)
    forbidden = 0 if may_write else _WRITING_FLAGS
    flags = (load, 0, 0, 16 + 8 * 2)
    program += only_if(_OPENAT, flags, (any_bit, 0, 1, forbidden), fails, passes)
    program.append(fails)
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in program))
    header = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code))
    _call("prctl", _PR_SET_SECCOMP, 2, header, 0, 0)
