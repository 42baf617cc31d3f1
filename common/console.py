"""What every command needs: one-line errors, progress bars, files that are written atomically."""
import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from tqdm import tqdm


class InputError(Exception):
    """Wrong input. The message is one line that names the file or flag and the remedy; `launch` prints it."""


def launch(main, flags):
    """Run a command: parse its flags, call main(args); wrong input and lack of memory are one line, exit status 2."""
    name, args = Path(sys.argv[0]).name, argparse.Namespace()
    try:
        args = flags().parse_args()
        main(args)
    except InputError as e:
        # an exception from a loader's worker arrives with its traceback as text; the message follows the class name
        print(f"{name}: {str(e).rsplit('InputError: ', 1)[-1].strip()}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as e:
        names = [f"--{x.replace('_', '-')}" for x in ("batch_size", "crop", "window") if x in args]
        if names and re.search("out of memory|allocate memory|STATUS_ALLOC_FAILED", str(e)):  # of CUDA or of the CPU
            print(f"{name}: out of memory ({' '.join(str(e).split())[:160]}); lower {' or '.join(names)}",
                  file=sys.stderr)
            sys.exit(2)
        if "WORLD_SIZE" not in os.environ or not re.search("gloo|NCCL", str(e)):
            raise
        print(f"{name}: another rank failed; see its error above. --resume continues from the last checkpoint",
              file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the output was piped to a command that ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def git_commit():
    """Return the short hash of this checkout, with "-dirty" if it has changes, or "" without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""


def format_time(seconds):
    """Return seconds as "minutes:seconds"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def progress(items, total, description):
    """Return the items under a progress bar of rank 0; without a terminal it appears every 10 seconds."""
    seconds, rank = 0.1 if sys.stderr.isatty() else 10, int(os.environ.get("RANK", 0))
    return tqdm(items, description, total, leave=False, disable=rank > 0, mininterval=seconds, delay=seconds)


def output_folder(flag, path):
    """Return `path` as a Path at which a folder can be made; an InputError if it is empty, a file, or unreachable."""
    with catch_write_errors(f"{flag} {path}"):
        if not path or Path(path).exists() and not Path(path).is_dir():
            raise InputError(f"{flag} {str(path) or repr('')}: not a folder; name a folder")
    return Path(path)


@contextlib.contextmanager
def catch_read_errors(path):
    """Raise an InputError that names `path` if the block cannot read it, whatever the file holds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, about metadata
            yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; correct its name") from None
    except Exception as e:  # PIL raises nearly anything on a damaged file
        why = getattr(e, "strerror", None) or str(e).replace(f" {str(path)!r}", "") or type(e).__name__
        raise InputError(f"{path}: cannot be read ({' '.join(why.split())}); replace or remove it") from None


@contextlib.contextmanager
def catch_write_errors(path):
    """Raise an InputError that names `path` if the block cannot write."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError if the disk is full
        why = getattr(e, "strerror", None) or e
        raise InputError(f"{path}: cannot be written ({why}); make room or name another place") from None


def write_atomically(path, write):
    """Call write(temporary path) and move the result to `path`, which is never left half-written; make its folder."""
    temporary = path.with_name(path.name + ".part")
    with catch_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
