"""What runs inside the sandbox: Python's standard library alone, and nothing of this package.

The process talks to the trainer in lines of JSON on its standard input and output. The first line is the setup. It
says whether the process serves a program (`serve_program`) or runs the dataset's tests (`run_tests`). These are two
sandboxes: a program never meets the test that judges it, and what is expected of it is known only outside. Whatever a
program does in its sandbox, it can only change its own answers.

A program runs in processes that are forked from this one, each with limits and a filter of system calls: one for each
standard input, or one for all calls of its functions.
"""

import atexit
import builtins
import ctypes
import json
import os
import resource
import select
import sys
import time
import types
from collections.abc import Iterator


# What many programs import is imported once for all processes of a program.
import bisect, collections, functools, heapq, itertools, math, re, string  # noqa: E401  # isort: skip


TRAINER_IN, TRAINER_OUT = 0, 1
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
SIGKILL, SIGXCPU = 9, 24
NUM_FILES, NUM_TASKS = 64, 48
"""Open files of a process; threads and processes of a sandbox."""
TIMEOUT, OUTPUT, ENDED = "timeout", "output", "ended"
"""Why a program has given no answer: a time limit, too much output, or it ended by itself."""


class Died(BaseException):
    """In a sandbox of tests: the program that they ask has ended. No `except Exception` of a test shall hide that."""


def main():
    lines = Lines(TRAINER_IN)
    setup = json.loads(lines.read())
    if setup["uid"] is not None:  # root, whose rights bubblewrap needed until here
        os.setgroups([])
        os.setresgid(setup["uid"], setup["uid"], setup["uid"])
        os.setresuid(setup["uid"], setup["uid"], setup["uid"])
    # End with bubblewrap, or with the trainer; a change of user has undone what bubblewrap asked for.
    prctl(PR_SET_PDEATHSIG, SIGKILL)
    (serve_program if setup["tests"] is None else run_tests)(lines, setup)


class Lines:
    """The lines that come out of a file descriptor."""

    def __init__(self, descriptor):
        self.descriptor, self.buffer = descriptor, b""

    def read(self, deadline=None, limit=None):
        """The next line; None at the end, where a line is longer than `limit`, and at the deadline (`is_late`)."""
        self.is_late = False
        while b"\n" not in self.buffer:
            if deadline is not None and not wait_for(self.descriptor, deadline):
                self.is_late = True
                return None
            part = os.read(self.descriptor, 1 << 16)
            self.buffer += part
            if not part or (limit is not None and len(self.buffer) > limit):
                return None
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line


def send(descriptor, message):
    """Write a message as one line."""
    data = memoryview(json.dumps(message).encode() + b"\n")
    while data:
        data = data[os.write(descriptor, data) :]


def wait_for(descriptor, deadline):
    """Wait until there is something to read. False at the deadline."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.register(TRAINER_IN, 0)
    found = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
    if TRAINER_IN in found:  # the trainer has closed the pipe, or is gone
        os._exit(0)
    return descriptor in found


# A program


def serve_program(lines, setup):
    """Answer the trainer's requests until it closes the pipe.

    {"stdin": text} runs the program: {"stdout": text, "code": its exit code, or minus a signal}.
    {"names": null} loads it: {"names": the callables at its top level}.
    {"call": [name, arguments, keyword arguments]} calls one: {"value": encoded}, or {"raised": class, "said": text}.
    Each may be answered with {"died": reason}.
    """
    calls = Calls(setup)
    send(TRAINER_OUT, {"ready": True})
    while (line := lines.read()) is not None:
        request = json.loads(line)
        send(TRAINER_OUT, run_once(request["stdin"], setup) if "stdin" in request else calls.ask(request))


def run_once(text, setup):
    """One run of the program as a script."""
    stdin, stdout = memory_file(text.encode("utf-8", "surrogatepass")), memory_file()
    pid = os.fork()
    if pid == 0:
        enter(setup, stdin, stdout)
        os._exit(exit_code_of(setup["source"]))
    os.close(stdin)
    end = os.pidfd_open(pid)
    is_late = not wait_for(end, time.monotonic() + setup["wall_s"])
    os.close(end)
    code = end_of(pid)
    output = os.pread(stdout, setup["output_bytes"] + 1, 0)
    os.close(stdout)
    if is_late or code == -SIGXCPU:
        return {"died": TIMEOUT}
    if len(output) > setup["output_bytes"]:
        return {"died": OUTPUT}
    return {"stdout": output.decode("utf-8", "replace"), "code": code}


def exit_code_of(source):
    """Run a program as a script to its end, its threads and what it has left to write included.

    As the interpreter would, which then takes 10 ms more to take itself apart.
    """
    code = 0
    for step in (lambda: run("__main__", source), wait_for_threads, atexit._run_exitfuncs, close_files):
        try:
            step()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            code = 1
    return code & 0xFF


def wait_for_threads():
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()


def close_files():
    sys.modules["__main__"].__dict__.clear()
    sys.stdout.flush()


class Calls:
    """A process that has loaded the program and calls its functions; after a death the next call has another."""

    def __init__(self, setup):
        self.setup, self.pid = setup, None

    def ask(self, request):
        if self.pid is None:
            self.start()
        deadline = time.monotonic() + self.setup["wall_s"]
        try:
            send(self.requests, request)
            line = self.replies.read(deadline, self.setup["output_bytes"])
            reply = json.loads(line) if line is not None else None
        except (OSError, ValueError, RecursionError):
            reply = None
        if isinstance(reply, dict):
            return reply
        is_long = len(self.replies.buffer) > self.setup["output_bytes"]
        is_timeout = self.end() == -SIGXCPU or self.replies.is_late
        return {"died": TIMEOUT if is_timeout else OUTPUT if is_long else ENDED}

    def start(self):
        requests, self.requests = os.pipe()
        replies_of_trainer, replies = os.pipe()
        self.replies = Lines(replies_of_trainer)
        self.pid = os.fork()
        if self.pid == 0:
            enter(self.setup, memory_file(), memory_file(), requests, replies)
            answer_calls(Lines(requests), replies, self.setup)
        os.close(requests)
        os.close(replies)

    def end(self):
        code = end_of(self.pid)
        os.close(self.requests)
        os.close(self.replies.descriptor)
        self.pid = None
        return code


def answer_calls(lines, replies, setup):
    """What the process of `Calls` does, until the pipe closes."""
    try:
        namespace = run("solution", setup["source"])
    except BaseException:
        os._exit(1)
    while (line := lines.read()) is not None:
        allow_seconds(setup["cpu_s"])
        request = json.loads(line)
        if "names" in request:
            reply = {"names": [name for name, value in list(namespace.items()) if callable(value)]}
        else:
            reply = answer_of(namespace, *request["call"])
        send(replies, reply)
    os._exit(0)


def answer_of(namespace, name, arguments, keywords):
    try:
        # LeetCode's form: the function is a method of a class.
        function = namespace[name] if name in namespace else getattr(namespace["Solution"](), name)
        value = function(*map(decode, arguments), **{key: decode(value) for key, value in keywords.items()})
        return {"value": encode(value)}
    except BaseException as error:
        return {"raised": type(error).__name__, "said": str(error)[:200]}


def run(name, source):
    """Run a source as the module `name`. Returns its namespace."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, name + ".py", "exec"), module.__dict__)
    return module.__dict__


def enter(setup, stdin, stdout, *others):
    """Confine a forked process, with these file descriptors and no others."""
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.dup2(memory_file(), 2)
    first = 3
    for kept in (*sorted(others), NUM_FILES):
        os.closerange(first, kept)
        first = kept + 1
    confine(setup)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = open(number, "rw"[number > 0], encoding="utf-8", closefd=False)  # noqa: SIM115 (it stays open)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)  # which keeps the buffer of a stream that a program replaces
    sys.argv = ["solution.py"]


def confine(setup):
    """Limits and the filter of system calls, for good."""
    limits = {
        resource.RLIMIT_AS: setup["memory_bytes"],
        resource.RLIMIT_FSIZE: setup["output_bytes"] + 1,
        resource.RLIMIT_NOFILE: NUM_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if setup["is_apart"]:  # elsewhere all tasks of the user would count
        limits[resource.RLIMIT_NPROC] = NUM_TASKS
    for what, value in limits.items():
        resource.setrlimit(what, (value, value))
    allow_seconds(setup["cpu_s"])
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    code = bytes.fromhex(setup["filter"])
    array = ctypes.create_string_buffer(code, len(code))
    program = SocketFilters(len(code) // 8, ctypes.addressof(array))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))


class SocketFilters(ctypes.Structure):
    """`struct sock_fprog` of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("filters", ctypes.c_void_p))


def allow_seconds(seconds):
    """Have SIGXCPU end this process once it has computed for so much longer. Whoever catches that meets `wall_s`."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds), hard))


def prctl(option, *arguments):
    values = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    if ctypes.CDLL(None, use_errno=True).prctl(option, *values) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


def memory_file(content=b""):
    """A file of no name, at its start."""
    descriptor = os.memfd_create("file", 0)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def end_of(pid):
    """Kill a process unless it has ended. Returns its exit code, or minus a signal."""
    os.kill(pid, SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# Tests of the dataset


def run_tests(lines, setup):
    """Run tests that call the functions of a program in another sandbox.

    {"ready": true} comes first, then {"passed": bool} for each test. In between {"call": [name, arguments, keyword
    arguments]} asks for a call, as `serve_program` has it, whose reply is read.
    """
    trainer = os.dup(TRAINER_OUT)
    os.dup2(memory_file(), TRAINER_OUT)  # for what tests print
    confine(setup)
    tests = setup["tests"]
    module = types.ModuleType("tests")
    sys.modules["tests"] = module
    namespace = module.__dict__
    namespace.update({name: asking(lines, trainer, name) for name in tests["names"]})
    namespace.update(bisect=bisect, collections=collections, functools=functools, heapq=heapq, itertools=itertools)
    namespace.update(math=math, re=re, string=string, sys=sys)
    send(trainer, {"ready": True})
    if tests["setup"]:
        has_passed(tests["setup"], namespace)
    for source in tests["sources"]:
        allow_seconds(setup["cpu_s"])
        send(trainer, {"passed": has_passed(source, namespace)})


def has_passed(source, namespace):
    try:
        exec(compile(source, "tests.py", "exec"), namespace)
    except BaseException:
        return False
    return True


def asking(lines, trainer, name):
    """A function that stands for the program's function `name`."""

    def ask(*arguments, **keywords):
        values = [encode(value) for value in arguments], {key: encode(value) for key, value in keywords.items()}
        send(trainer, {"call": [name, *values]})
        reply = json.loads(lines.read())
        if "died" in reply:
            raise Died(reply["died"])
        if "raised" in reply:
            kind = getattr(builtins, str(reply["raised"]), None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                kind = RuntimeError
            raise kind(reply.get("said"))
        return decode(reply["value"])

    return ask


# Values


def encode(value):
    """Plain data in the form of JSON. A type that JSON lacks becomes a mapping from its name to what it is made of.

    Raises:
        ValueError: for anything else.
    """
    if value is None:
        return None
    for plain in (bool, int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, list):
        return [encode(each) for each in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(each)] for key, each in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    for name, kind in (("tuple", tuple), ("set", set), ("frozenset", frozenset), ("iter", Iterator)):
        if isinstance(value, kind):
            return {name: [encode(each) for each in value]}
    raise ValueError(f"{type(value).__name__} is no plain data")


def decode(value):
    """What `encode` was given, iterators as new ones."""
    if isinstance(value, list):
        return [decode(each) for each in value]
    if not isinstance(value, dict):
        return value
    [(kind, parts)] = value.items()
    if kind == "bytes":
        return bytes.fromhex(parts)
    if kind == "complex":
        return complex(*parts)
    if kind == "dict":
        return {decode(key): decode(each) for key, each in parts}
    values = [decode(each) for each in parts]
    if kind == "iter":
        return iter(values)
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](values)


if __name__ == "__main__":
    main()
