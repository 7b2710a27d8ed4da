"""The command line: `ferrovae COMMAND`. Results go to stdout, progress and errors to stderr.

A user's mistake is one sentence and exit status 2, training that fails is 1, Ctrl-C is 130. `--help` never imports
torch. FERROVAE_TRACEBACK=1 shows the traceback of a mistake too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from ferrovae import __version__

Command = Callable[[str, list[str]], int]

# What is typed, the module in `ferrovae.cli` whose `main` runs it, the arguments shown, one line of help.
COMMANDS: list[tuple[str, str, str, str]] = [
    ("train vae", "train", "[OPTIONS]", "train a VAE on images"),
    ("train vqvae", "train", "[OPTIONS]", "train a VQ-VAE on images"),
    ("train --resume", "train", "RUN", "go on with a run that was stopped or killed, to the same numbers"),
    ("evaluate", "evaluate", "RUN", "estimate log p(x) on test images; write evaluation.json and report.html"),
    ("sample", "sample", "RUN", "draw images from a trained model into a PNG or .npy file"),
    ("info", "info", "", "which operation runs on which backend here, and why not on the others"),
    ("demo", "demo", "", "train a VAE and a VQ-VAE on handwritten digits and write a report (a minute)"),
    ("bench", "bench", "[OPERATION ...]", "measure against the alternatives, interleaved; draw; tune the kernels"),
]


def usage(commands: Sequence[tuple[str, str, str, str]] = COMMANDS) -> str:
    """The commands with a line each."""
    width = max(len(f"{name} {arguments}") for name, _, arguments, _ in commands) + 2
    lines = [f"  ferrovae {f'{name} {arguments}':<{width}}{text}" for name, _, arguments, text in commands]
    return "\n".join(
        ["usage: ferrovae COMMAND [OPTIONS]", "", *lines, "", "ferrovae COMMAND --help shows its options."]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(f"ferrovae {__version__}: variational autoencoders with a log p(x) you can trust\n\n{usage()}")
        return 0 if arguments else 2
    if arguments[0] in ("--version", "-V"):
        print(f"ferrovae {__version__}")
        return 0
    if arguments[:2] in (["train", "-h"], ["train", "--help"]):
        print(usage([command for command in COMMANDS if command[0].startswith("train")]))
        return 0
    if arguments[0] == "train" and arguments[1:2] in (["vae"], ["vqvae"]) and "--resume" in arguments[2:]:
        arguments.pop(1)  # the run knows which it is
    for name, module, _, _ in COMMANDS:
        words = name.split()
        if arguments[: len(words)] == words:
            return _run(module, name, arguments)
    known = ", ".join(dict.fromkeys(name.split()[0] for name, *_ in COMMANDS))
    if arguments[0] == "train":
        got = f"train {arguments[1]}" if len(arguments) > 1 else "train"
        return fail(f"{got!r} is not a command, expected train vae, train vqvae or train --resume RUN")
    return fail(f"{arguments[0]!r} is not a command, expected one of {known}")


def fail(message: str, status: int = 2) -> int:
    """Say what is wrong on stderr; returns the exit status."""
    print(f"ferrovae: {message}", file=sys.stderr)
    return status


def _run(module: str, name: str, arguments: list[str]) -> int:
    words = [word for word in name.split() if not word.startswith("-")]
    command: Command = import_module(f"ferrovae.cli.{module}").main
    try:
        return command("ferrovae " + " ".join(words), arguments[len(words) :])
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except Exception as error:
        status = _status(error)
        if status is None or os.environ.get("FERROVAE_TRACEBACK") == "1":
            raise
        return fail(_sentence(error), status)


def _status(error: Exception) -> int | None:
    """The exit status of an error that is no fault of ours; None for one that is, which keeps its traceback."""
    from ferrovae.training.errors import Interrupted, NonFiniteError

    if isinstance(error, Interrupted):
        return 130
    if isinstance(error, NonFiniteError):
        return 1
    # What the public calls raise for bad input, files that are not there, extras that are not installed.
    return 2 if isinstance(error, ValueError | OSError | ImportError) else None


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
