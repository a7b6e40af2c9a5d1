"""Stands for a command of Flower: a warm process is that command, and this one lends it all that it has.

It runs as a script, in an interpreter without site-packages, so it imports little. Arguments, environment,
directory and standard streams go there; signals that come here are passed on; the exit code comes back. If
nobody is there, or the arguments are not understood, the real command runs here.
"""

import json
import os
import signal
import socket
import sys

COLD = 127  # what the host answers if the real command shall run


def main() -> None:
    """Be the command."""
    code = ask(sys.argv[1:])
    if code == COLD:
        run_cold(sys.argv[1:])
    if code < 0:
        if -code != signal.SIGKILL:  # whose handler nobody can set
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def ask(command: list[str]) -> int:
    """Have a warm process run the command; return its exit code, negative if a signal has ended it.

    Parameters
    ----------
    command : list of str

    Returns
    -------
    int
        ``COLD`` if the real command shall run.
    """
    cwd = os.getcwd()  # noqa: PTH109
    request = {"command": command, "cwd": cwd, "environ": dict(os.environ)}
    try:
        host = socket.socket(socket.AF_UNIX)
        host.connect(os.environ["_FEDEXEC_SOCKET"].replace("@", "\0"))
        payload = json.dumps(request).encode()
        head = f"{os.environ['_FEDEXEC_KEY']} launch {len(payload):012d}\n".encode()
        socket.send_fds(host, [head], [0, 1, 2])
        host.sendall(payload)
    except (OSError, KeyError) as exc:
        print(f"fedexec: {command[0]} starts cold: {exc!r}", file=sys.stderr)
        return COLD
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, lambda number, _: host.sendall(b"%c" % number))
    answer = host.makefile("rb").readline()
    return int(answer) if answer else 1  # the host was killed, and the warm process with it


def run_cold(command: list[str]) -> None:
    """Run the real command in place of this process.

    Parameters
    ----------
    command : list of str
    """
    own = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bin")  # noqa: PTH100, PTH118, PTH120
    os.environ["PATH"] = os.pathsep.join(
        each for each in os.environ.get("PATH", os.defpath).split(os.pathsep) if each != own
    )
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
