"""What every command shares: its flags, what it says to bad input, signals and closed pipes."""

import contextlib
import difflib
import errno
import io
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import tyro

from envs.api import CannotGoOn
from envs.stopping import Program, Stopped, armed
from experiments.local_path import with_local_paths
from experiments.streams import open_missing
from experiments.visible import visible
from ictjax.ranges import fault

HELP = ("-h", "--help")
CLOSED_PIPE = 128 + signal.SIGPIPE  # what a shell calls a program that SIGPIPE ended
_MOST_NAMES = 12  # of a list in one sentence
_NARROWEST = 20  # columns; less cannot be read
_FULL = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space and start it again")
_Args = TypeVar("_Args")


class Flags:
    """Base of flags that check their numbers, by the ranges that their fields state."""

    def __post_init__(self) -> None:
        """Raises ValueError, by its flag, for the first value that is out of its range."""
        if found := fault(self):
            flag = f"--{found.name.replace('_', '-')}"
            raise ValueError(f"{flag} must be {found.expected}, got {found.shown}.")


def run_main(body: Callable[[], None], remedy: str) -> None:
    """Runs a command: bad input ends with one sentence and exit code 2, a run that cannot go on, or
    memory that does not suffice, with one and exit code 1, SIGINT and SIGTERM with a word on how to
    go on, output into a closed pipe without a word (exit code 141).
    """
    open_missing()
    with armed() as program:
        program.remedy = remedy
        try:
            _run(body)
            program.check()
        except Stopped as stopped:
            _end(program, stopped)
        except (SystemExit, Exception) as ended:
            if program.number is None or (isinstance(ended, SystemExit) and not ended.code):
                raise
            # Ctrl-C reaches the programs that this one has started too: no wonder that work fails
            _end(program, Stopped(program.number))


def _end(program: Program, stopped: Stopped) -> None:
    with contextlib.suppress(OSError):
        print(f"\nictjax: stopped by {stopped}; {program.remedy}", file=sys.stderr)
    program.end(stopped.exit_code)


def _run(body: Callable[[], None]) -> None:
    try:
        try:
            body()
        finally:
            sys.stdout.flush()  # here, not while the interpreter ends: there nobody can catch it
    except BrokenPipeError:
        # what is still buffered goes nowhere, so that the interpreter's own flush is quiet too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(CLOSED_PIPE)
    except ValueError as error:
        _complain(str(error))
        sys.exit(2)
    except CannotGoOn as error:
        _complain(str(error))
        sys.exit(1)
    except OSError as error:
        if error.filename is None and (left := _left_folder()):
            _complain(f"The current folder{left} was removed: change to another, and start again.")
            sys.exit(2)
        where = "" if error.filename is None else f"{error.filename!s:.200}: "
        reason = error.strerror or " ".join(str(error).split())
        remedy = _FULL.get(error.errno or 0, "name another place")
        _complain(f"{where}{reason}; {remedy}.")
        sys.exit(2)
    except MemoryError:
        _end_without_memory("")
    except RuntimeError as error:  # JAX's, which is not imported here
        if str(error).startswith("Unable to initialize backend"):
            reason = " ".join(str(error).partition(" (set JAX_PLATFORMS")[0].split())
            _complain(
                f"JAX cannot use the devices that were asked for ({reason:.300}): set JAX_PLATFORMS"
                " to those that are here, or to nothing; a TPU or GPU may be in use by another"
                " process, or its extra (cuda, tpu) not installed."
            )
            sys.exit(2)
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        wanted = re.search(r"allocat\w* ([\d.]+ ?[A-Za-z]+)", str(error))
        _end_without_memory("" if wanted is None else f" ({wanted[1]} were asked for)")


def _left_folder() -> str:
    """Where this program was started, with a blank before it, if that was removed; else nothing."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return f" {os.environ['PWD']}" if "PWD" in os.environ else " of this program"
    return ""


def _end_without_memory(about: str) -> NoReturn:
    _complain(
        f"the memory does not suffice{about}: give smaller sizes (rows, slots, lengths), or more"
        " devices."
    )
    sys.exit(1)


def _complain(sentence: str) -> None:
    end = "" if sentence.endswith(".") else "."  # readers' reasons stand in other sentences too
    with contextlib.suppress(OSError):  # a log on a full disk does not change the exit code
        print(f"ictjax: {visible(sentence)}{end}", file=sys.stderr)


def unknown(complaint: str, given: str, known: Sequence[str], listed_by: str = "") -> ValueError:
    """The refusal of a name that is none: with the nearest one and the names there are, or, where
    these are many, the nearest few and the command that lists all.

    Args:
      complaint: the sentence without its end, for example "Unknown preset 'x'".
      listed_by: the command that lists all names.
    """
    nearest = difflib.get_close_matches(given, known, n=3)
    if len(known) > _MOST_NAMES and listed_by:
        there = f"`{listed_by}` lists all {len(known)}"
        return ValueError(
            f"{complaint} (nearest: {', '.join(nearest)}): {there}."
            if nearest
            else f"{complaint}: {there}."
        )
    meant = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return ValueError(f"{complaint}{meant}: use one of {', '.join(known)}.")


def run_by_position(argv: Sequence[str]) -> list[str]:
    """The words of a command that takes runs without a flag, where people wrote `--run-dir` before
    them, as other commands have it.
    """
    return [word.removeprefix("--run-dir=") for word in argv if word != "--run-dir"]


def parse(
    kind: Any, command: str, description: str, argv: Sequence[str], default: _Args | None = None
) -> Any:
    """Flags -> a dataclass of `kind`; of a flag that is given twice, the last one counts.

    Args:
      kind: the dataclass.
      command: as people type it behind `ictjax`.
      description: what --help begins with.
      default: what is not given.

    Raises:
      ValueError: flags or values that do not exist, in one sentence.
    """
    return with_local_paths(_parse(kind, command, argv, default, description=description), argv)


def parse_subcommand(
    kinds: Mapping[str, type], command: str, description: str, argv: Sequence[str]
) -> Any:
    """The flags behind a second word, `ictjax COMMAND WORD ...`, as the dataclass of that word;
    without a word, or with --help, `description` and the words there are. Raises ValueError as
    `parse` does.
    """
    about = {name: " ".join((kind.__doc__ or "").split()) for name, kind in kinds.items()}
    if not argv or argv[0] in HELP:
        overview(f"ictjax {command}", description, about)
        sys.exit(0)
    if argv[0] not in kinds:
        raise unknown(f"Unknown word {argv[0]!r} behind {command}", argv[0], list(kinds))
    return parse(kinds[argv[0]], f"{command} {argv[0]}", about[argv[0]], argv[1:])


def overview(program: str, description: str, words: Mapping[str, str]) -> None:
    """Prints the words that may follow a program, each with what it does."""
    print(f"usage: {program} COMMAND ...\n")
    print("\n".join(textwrap.wrap(description, _width(), break_on_hyphens=False)) + "\n")
    indent = max(map(len, words)) + 4
    for name, about in words.items():
        lines = textwrap.wrap(about, max(_width() - indent, _NARROWEST), break_on_hyphens=False)
        print(f"  {name:<{indent - 2}}" + f"\n{' ' * indent}".join(lines))
    ending = f"`{program} {next(iter(words))} --help`, for example, lists its flags."
    print("\n" + "\n".join(textwrap.wrap(ending, _width(), break_on_hyphens=False)))


def _width() -> int:
    return max(shutil.get_terminal_size().columns, _NARROWEST)


def parse_known(kind: type[_Args], command: str, argv: Sequence[str]) -> tuple[_Args, list[str]]:
    """The flags that a dataclass has, for those that decide the defaults of others, and the
    arguments that are left over: --help among them.

    Raises ValueError as `parse` does.
    """
    args, rest = _parse(kind, command, argv, None, return_unknown_args=True, add_help=False)
    return with_local_paths(args, argv), rest


def _parse(kind: Any, command: str, argv: Sequence[str], default: Any, **settings: Any) -> Any:
    for word in argv:
        if any("\udc80" <= character <= "\udcff" for character in word):  # bytes that are no text
            raise ValueError(
                f"The argument {word!r:.100} is not text in UTF-8: give it in that encoding."
            )
    if default is not None:
        settings["default"] = default

    def read() -> Any:
        return tyro.cli(kind, prog=f"ictjax {command}", args=list(argv), **settings)

    page = _Page()
    try:
        with contextlib.redirect_stdout(page), contextlib.redirect_stderr(io.StringIO()):
            return read()
    except SystemExit as ended:
        if not ended.code:
            print("\n".join(map(_wrapped, page.lines())))
            raise
    complaint = io.StringIO()
    # once more, in lines that are never broken
    with _wide(), contextlib.redirect_stderr(complaint), contextlib.suppress(SystemExit):
        read()
    raise ValueError(f"{_short(_sentence(complaint.getvalue()))}; see `ictjax {command} --help`.")


class _Page(io.TextIOWrapper):
    """Catches --help, with the colours and the characters that it will be shown with."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        super().__init__(io.BytesIO(), encoding=sys.stdout.encoding or "utf-8")

    def isatty(self) -> bool:
        return self._terminal

    def lines(self) -> list[str]:
        """What was written."""
        self.seek(0)
        return self.read().splitlines()


def _wrapped(line: str) -> str:
    """A line of --help. The parser fits its boxes to the terminal, but not what stands above."""
    if line.startswith(("\u2500", "\u2502", "\u256d", "\u2570", "\x1b")) or len(line) <= _width():
        return line
    return textwrap.fill(line, _width(), break_on_hyphens=False)


@contextlib.contextmanager
def _wide() -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _short(sentence: str) -> str:
    """The same without the rest of what is too long to be read."""
    return re.sub(r"(\S{60})\S{200,}", r"\1...", sentence)


def _sentence(complaint: str) -> str:
    """What the parser's box says, in one clause that begins with the flag."""
    lines = [re.sub("[\u2500-\u257f]|-{4,}", "", line).strip() for line in complaint.splitlines()]
    title, text = complaint.splitlines()[0], next(filter(None, lines[1:]), complaint.strip())
    flags = [line for line in lines[2:] if line.startswith("--")]
    if "Required" in title:
        first = lines.index(flags[0]) if flags else 2
        about = "".join(lines[first + 1 : first + 2]).replace("(required)", "").strip()
        what = f"{lines[first].split()[0]} is missing"
        return f"{what}: {about.rstrip('.')}" if about else what
    if found := re.match(r"Unrecognized options: ([^,]*)", text):
        meant = f" (did you mean {flags[0].split()[0].rstrip(',')}?)" if flags else ""
        return f"Unknown {'flag' if found[1].startswith('-') else 'argument'} {found[1]!r}{meant}"
    if found := re.match(
        r"invalid choice '(.*)' for argument '(.*)'\. .* one of \((.*?),?\)", text
    ):
        choices = [choice.strip().strip("'") for choice in found[3].split(",")]
        choices = [choice for choice in choices if choice != "None"]  # as if it were not given
        return str(unknown(f"{found[2]} cannot be {found[1]!r}", found[1], choices)).rstrip(".")
    if found := re.match(r"Missing value for argument '(.*?)'", text):
        return f"{found[1]} has no value: give one behind it, or {found[1]}=-x if it begins with -"
    if found := re.match(r"Error parsing (--\S+): invalid literal for int\(\).*: (.*)", text):
        return f"{found[1]} takes a whole number, not {found[2]}"
    if found := re.match(r"Error parsing (--\S+): could not convert string to float: (.*)", text):
        return f"{found[1]} takes a number, not {found[2]}"
    if found := re.match(r"Error parsing (--\S+): Exceeds the limit .* digits", text):
        return f"{found[1]} takes a whole number, not one of thousands of digits"
    if found := re.match(r"Error parsing (--\S+): Failed to parse key-value pairs", text):
        return f"{found[1]} takes pairs, NAME VALUE NAME VALUE, and one of them is not whole"
    if found := re.match(r"Error parsing (--\S+): (?:no type matching|Could not).* \[(.*)\]", text):
        return f"{found[1]} cannot be {found[2]}"
    if found := re.match(r"Error parsing (\S+): (.*)", text):
        return _of_record(found[1].removeprefix("settings."), found[2].rstrip("."))
    return text.rstrip(".")


def _of_record(place: str, message: str) -> str:
    """What a record that refused its values says, with the place of the record on the command line
    unless the message names it.
    """
    if place[0].isupper():  # the name of a class: the command itself
        return message
    if place.startswith("--"):
        return f"{place}: {message}"
    *above, last = place.replace("-", "_").split(".")
    if message.startswith(f"{place.replace('-', '_')}."):
        return message
    if re.match(r"\w+ must be ", message):  # the name of a field
        return f"{place.replace('-', '_')}.{message}"
    return ".".join([*above, message]) if message.startswith(f"{last}.") else f"{place}: {message}"
