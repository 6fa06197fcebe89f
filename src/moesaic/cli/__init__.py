"""The command `moesaic` and its subcommands, one module each: moesaic <command> [key=value ...].

This module imports nothing but the standard library, so that help, version and typing errors are answered at once.
"""

import dataclasses
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from moesaic import __version__
from moesaic.cli.streams import keep_going
from moesaic.interrupts import exit_status, interruptible

__all__ = ["COMMANDS", "Command", "main"]


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand. Its keys are those of conf/<name>.yaml and its code is cli/<name>.py, with _ in place of -."""

    summary: str
    words: tuple[str, ...] = ()
    """Keys that leading words without `=` fill, in this order. A name that ends in ... takes all that are left."""
    usage: str = ""
    """These words as the help shows them."""
    at_once: str = ""
    """What it says before anything is imported, where it would be silent for long."""


COMMANDS = {
    "train": Command("Train a model; -m for a sweep."),
    "evaluate": Command("Score a checkpoint on any data.", ("checkpoint",), "CHECKPOINT"),
    "generate": Command("Continue a prompt with a trained model.", ("checkpoint", "prompt"), "CHECKPOINT [PROMPT]"),
    "study": Command("Run arms over seeds, with tuned learning rates, and report intervals and a verdict."),
    "ladder": Command("Run arms at growing compute: laws of the loss, and what an arm is worth in compute."),
    "predict": Command("Put a prediction of a larger run on record, before it runs.", ("directory",), "RESULTS"),
    "report": Command("Turn a tree of runs into one table and one plot.", ("directory",), "DIRECTORY"),
    "compare": Command(
        "Ask whether an idea beats the baseline: checked, made fair, run on several seeds.",
        at_once="loading torch, then the parts and the data",
    ),
    "scaffold": Command("Write a study's file to fill in.", ("name",), "NAME"),
    "convert": Command(
        "Convert between transformers' directories and checkpoints.",
        ("source", "destination"),
        "SOURCE [DESTINATION]",
    ),
    "conformance": Command("Check mixture-of-experts layers, also your own.", ("layers...",), "[LAYER ...]"),
    "parallel-check": Command(
        "Compare trainings on several processes with one process.",
        at_once="three steps each; this takes a minute or two",
    ),
    "transfer": Command("Check that settings found at one size hold at others.", ("action",), "check"),
    "memory": Command("Say how much memory a model takes, without allocating it.", ("name",), "MODEL"),
    "plan": Command("Say what a training takes on many GPUs, without any of them.", ("model",), "[MODEL]"),
    "cache-targets": Command(
        "Compute a teacher's targets once, for any number of students.", ("teacher", "directory"), "TEACHER DIRECTORY"
    ),
    "tokenize": Command(
        "Write the token ids of text of any size, to train from.", ("data.path", "directory"), "SOURCE DIRECTORY"
    ),
    "bench": Command("Measure layers and models on this machine.", ("name",), "[NAME]"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that `argv` (by default the command line) names; ends the process with its exit status."""
    keep_going()
    os.environ["MPLBACKEND"] = "agg"  # pictures are files; another backend may fail before it is asked for anything
    # PyTorch advises in raw lines against what several processes do on purpose, such as find_unused_parameters
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return
    if arguments[0] == "-sc":
        arguments = _of_completion(arguments)
    name, *rest = arguments
    if name == "--version":
        print(f"moesaic {__version__}")
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
        hint = f" (did you mean moesaic {close[0]}?)" if close else ""
        print(f"error: {name}: unknown command{hint}; must be one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    try:
        with interruptible():  # while it imports, too
            _run(name, rest)
    except KeyboardInterrupt as error:  # outside of what a command guards itself
        print("interrupted", file=sys.stderr)
        sys.exit(exit_status(error))


def _run(name: str, arguments: Sequence[str]) -> None:
    """Run a command that exists."""
    try:
        if {"-h", "--help"} & set(arguments):
            print(importlib.import_module("moesaic.cli.config_files").help_text(name, arguments))
            return
        common = importlib.import_module("moesaic.cli.common")
        prepared = common.prepare(name, arguments)  # a typo ends it before torch
        if prepared.only_shows:
            common.launch(name, prepared, lambda config: None)
            return
        if COMMANDS[name].at_once:
            print(COMMANDS[name].at_once, flush=True)
        module = importlib.import_module(f"moesaic.cli.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "moesaic":
            raise
        package = error.name.split(".")[0]
        extra = "hf" if package == "transformers" else "train"
        print(f"error: moesaic {name} needs the package {package}: pip install 'moesaic[{extra}]'", file=sys.stderr)
        sys.exit(2)
    module.main(prepared)


def _of_completion(arguments: Sequence[str]) -> list[str]:
    """The arguments with the command of the line that the shell completes; it asks with the program's name alone.

    What moesaic train -sc install=bash prints does so.
    """
    if "COMP_LINE" not in os.environ:  # typed; what is printed serves all commands
        return ["train", *arguments]
    program, _, line = os.environ["COMP_LINE"].partition(" ")
    name, blank, line = line.lstrip().partition(" ")
    if not blank:
        print(*(each for each in COMMANDS if each.startswith(name)), sep="\n")
        sys.exit()
    os.environ["COMP_LINE"] = f"{program} {line}"
    return [name, *arguments]


def overview() -> str:
    """The commands, one line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "Usage: moesaic COMMAND [WORD ...] [key=value ...]",
            "",
            *lines,
            "",
            "moesaic COMMAND --help explains every key of a command. moesaic --version prints the version.",
        ]
    )
