"""What every command line here does: one-line errors, @files of flags, progress, files that are whole or not there."""
import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm


class InputError(Exception):
    """Wrong input from the user: one line that names the file or flag and the cure. Ends a script with status 2."""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and @files of flags."""

    def __init__(self, description, **more):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **more)

    def parse_args(self, words=None, namespace=None):
        return super().parse_args([*expand(sys.argv[1:] if words is None else words)], namespace)

    def error(self, message):
        raise InputError(message)


def expand(words, folder=Path(), inside=()):
    """Yield `words`, each @FILE, beside the file that names it, replaced by its words up to a #. Errors: InputError."""
    for word in words:
        if not word.startswith("@"):
            yield word
            continue
        file = Path(os.path.normpath(folder / word[1:]))
        if file in inside:
            raise InputError(f"{word}: {inside[-1]} leads back to it; take that line out")
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"{word}: {file} cannot be read ({getattr(e, 'strerror', None) or 'not text'})") from None
        yield from expand((w for line in lines for w in line.split("#")[0].split()), file.parent, (*inside, file))


class Recipes(argparse.Action):
    """A flag that prints the files in recipes/: command, published numbers, what the file says of itself."""

    def __init__(self, option_strings, dest, help=None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser, *_):
        for file in sorted((Path(__file__).parent / "recipes").glob("*.txt")):
            said = dict(line[2:].split(": ", 1) for line in file.read_text().splitlines() if line.startswith("# "))
            print(f"python {said['script']} @recipes/{file.name:27} published {said['published']}\n    {said['what']}")
        parser.exit()


def launch(main, flags):
    """Run a script: parse its flags, call main(args), turn InputError into one line and exit status 2."""
    try:
        main(flags().parse_args())
    except InputError as e:
        # a loader's worker hands its exception over with the traceback as text: the message is behind the class's name
        print(f"{Path(sys.argv[0]).name}: {str(e).rsplit('InputError: ', 1)[-1].strip()}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as e:
        if "WORLD_SIZE" not in os.environ or not re.search("gloo|NCCL", str(e)):
            raise
        print(f"{Path(sys.argv[0]).name}: another process ended, so this one does; read its line, and --resume goes on "
              "from the last checkpoint", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def commit():
    """Short hash of the checkout this file is in, "-dirty" behind it where it has changes; "" where there is no git."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def progress(items, total, what):
    """Yield `items` under a tqdm bar on a terminal; elsewhere with a line every 10 seconds: count, rate, time left.

    Of several processes the first one's are shown.
    """
    if int(os.environ.get("RANK", 0)):
        yield from items
        return
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, total=total, leave=False)
        return
    began = said = time.monotonic()
    for n, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said > 10:
            said, rate = now, n / (now - began)
            print(f"{what} {n}/{total}, {rate:.1f}/s, {clock((total - n) / rate)} left", file=sys.stderr)


def folder(flag, path):
    """`path` as a Path that a folder can be made at. Errors: InputError naming `flag` where a file is in the way."""
    try:
        if Path(path).exists() and not Path(path).is_dir():
            raise InputError(f"{flag} {path}: that is a file; name a folder")
    except PermissionError as e:
        raise InputError(f"{flag} {path}: cannot be reached ({e.strerror}); name another folder") from None
    return Path(path)


@contextlib.contextmanager
def writing(path):
    """Errors: InputError naming `path` where what happens inside cannot be written."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch.save says RuntimeError where the disk is full
        raise InputError(f"{path}: cannot be written ({getattr(e, 'strerror', None) or e}); make room or name another "
                         "place") from None


def replace(path, write):
    """Call write(temporary path) and move the result to `path`: whole or not at all. Errors: InputError."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        try:
            write(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
