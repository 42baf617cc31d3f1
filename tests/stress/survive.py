"""What a user's accidents and long runs do: broken files, wrong flags, kills, full disks, signals, 3,000 steps, 200,000
images, operators under sanitizers. Nothing may be lost.

    python tests/stress/survive.py             about 90 minutes on 2 cores
    python tests/stress/survive.py --share 0.02 --seed 7 --kinds images kills
    python tests/stress/survive.py --share 0.03 --kinds images checkpoints wrong_flags    half a minute, in .ci/run

Each kind prints a line. Refused: one line on standard error and status 2. Survived: it worked, or --resume took the run
to its end. Lost: a traceback, a crash, another exit status, a checkpoint that cannot be read, memory that grows.
"""
import argparse
import contextlib
import importlib
import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: networks here are small

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common import console, layouts  # noqa: E402
from common.checkpoint import read_checkpoint  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
import train_semi  # noqa: E402
from csrc import build, ops  # noqa: E402

SMALL = "--backbone efficientnet_lite0 --init none --crop 65 --batch-size 2 --log-every 1 --workers 0 --gpu -1".split()
NET = ["--ckpt", "start/last.pt"]
RIGHT = {  # a command line of each script that flags drawn at random are added to; trainings have SMALL besides
    **{f"train_{name}": ["--data", "data", "--out", "flags"] for name in ("base", "adv", "semi", "match")},
    "eval": NET, "predict": [*NET, "data/images", "--out", "predicted"],
    "report": ["start", "--out", "page.html"], "export": [*NET, "--out", "model.pt2"], "prepare": []}
COMMANDS = {  # of prepare.py; not voc, which `--from ""` would let download
    "check": "--data data", "split": "--data data --out lists", "camvid": "--from camvid --root made",
    "cityscapes": "--root cityscapes", "import": "data --out imported"}
VALUES = ("-1", "0", "0.5", "1", "3", "nan", "inf", "1e-30", "", "abc", "no/such/place", "data/classes.txt", "@no.txt",
          "ü")
SLOW = {"--compile", "--iters", "--help", "-h", "--recipes"}  # flags that a random draw leaves out
MARK = "item "  # before a line that a child prints of its work


def make_data(folder):
    """A data set of 8 + 2 images of blocks."""
    rng = np.random.RandomState(0)
    for part in ("images", "labels"):
        (folder / "data" / part).mkdir(parents=True)
    (folder / "data/classes.txt").write_text("grey\nred\ngreen\nblue\n")
    for n in range(10):
        label = rng.randint(0, 4, (5, 6)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
        kind = (".png", ".jpg", ".jpg")[n % 3]
        image = Image.fromarray(rng.randint(0, 255, (80, 96, 3), np.uint8))
        image = image.convert(("RGB", "RGBA", "P", "L")[n // 3] if kind == ".png" else "RGB")
        image.save(folder / f"data/images/{n}{kind}", progressive=n == 2)
        mask = Image.fromarray(label)
        if n % 2:
            mask.putpalette(layouts.voc_palette())
        mask.save(folder / f"data/labels/{n}.png")


def make(folder):
    """The data set, two images of it in the layouts of others, and a checkpoint of one step."""
    make_data(folder)
    for n, part in (0, "train"), (3, "val"):  # the same in the layouts that prepare.py converts
        for name, source in ((f"camvid/{part}/{n}", "images"), (f"camvid/{part}annot/{n}", "labels"),
                             (f"cityscapes/leftImg8bit/{part}/a/a_1_{n}_leftImg8bit", "images"),
                             (f"cityscapes/gtFine/{part}/a/a_1_{n}_gtFine_labelIds", "labels")):
            file = folder / f"{name}.png"
            file.parent.mkdir(parents=True)
            shutil.copy(folder / f"data/{source}/{n}.png", file)
    done = train("train_semi", folder, "start", "--iters", "1")
    assert done.returncode == 0, done.stderr
    return folder


def command(script, folder, out, *words):
    return [sys.executable, str(ROOT / f"{script}.py"), "--data", str(folder / "data"), *SMALL, "--out",
            str(folder / out), *map(str, words)]


def train(script, folder, out, *words, code=None):
    """A training in a process of its own; `code` runs in it first."""
    words = command(script, folder, out, *words)
    if code:
        start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {script}; from common import console\n{code}\n"
        words = [words[0], "-c", start + f"console.launch({script}.main, {script}.flags)", *words[2:]]
    return subprocess.run(words, capture_output=True, text=True, cwd=folder)


def readable(folder, out):
    """The step of a run's last.pt. Errors: whatever reading it raises."""
    checkpoint = read_checkpoint(folder / out / "last.pt", "--ckpt")
    model.load_segmenter(out, checkpoint)
    return checkpoint["step"]


def spoil(content, rng):
    """Bytes with some changed, cut out, doubled or cut off."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 50])):
        at, length = rng.randrange(len(content)), rng.choice([1, 1, 4, 100])
        how = rng.randrange(4)
        if how == 0:
            content[at:at + length] = rng.randbytes(min(length, len(content) - at))
        elif how == 1:
            del content[at:at + length]
        elif how == 2:
            content[at:at] = content[at:at + length]
        else:
            content[at] ^= 1 << rng.randrange(8)
        if rng.random() < 0.02 or not content:
            return bytes(content[:at])
    return bytes(content)


def call(module, words):
    """Run a script's main in this process, at most to a SystemExit. Errors: InputError and what is none."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            module.main(module.flags().parse_args([*map(str, words)]))
    except SystemExit as e:
        assert e.code in (0, None, False, True, 1, 2), e.code
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)


# ---- what a child does: (folder, random.Random, number of the item) -> "refused" or "survived"; all else is lost ----

def images(folder, rng, _):
    kind, file = rng.choice([("images", "jpg"), ("images", "png"), ("labels", "png")]), folder / "spoilt"
    whole = rng.choice(sorted((folder / "data" / kind[0]).glob(f"*.{kind[1]}")))
    file = file.with_suffix(whole.suffix)
    warnings.simplefilter("error")  # one on the way is an error too
    warnings.simplefilter("ignore", ResourceWarning)  # files are closed when they are collected
    file.write_bytes(spoil(whole.read_bytes(), rng))
    try:
        if kind[0] == "images":
            assert data.read_image(file).mode == "RGB"
        else:
            ids = data.read_label(layouts.Label(str(file), 4, ()), (96, 80))
            assert ids.shape == (80, 96) and set(np.unique(ids)) <= {0, 1, 2, 3, 255}
    except console.InputError as e:
        assert str(file) in str(e) and len(str(e).splitlines()) == 1, e
        return "refused"
    return "survived"


def checkpoints(folder, rng, number):
    """By turns read as eval.py does and as --resume does."""
    whole, file = folder / "start/last.pt", folder / "resumed/last.pt"
    shutil.rmtree(file.parent, ignore_errors=True)
    file.parent.mkdir()
    if rng.random() < 0.5:
        file.write_bytes(spoil(whole.read_bytes(), rng))
    else:
        checkpoint = torch.load(whole, weights_only=True)
        part = rng.choice([checkpoint, checkpoint["args"], checkpoint["seg"]])
        key = rng.choice(sorted(part))
        part[key] = rng.choice([None, 3, "x", [], {}, -1.5, torch.zeros(2), ["a"], {"a": 1}])
        if rng.random() < 0.3:
            del part[key]
        torch.save(checkpoint, file)
    try:
        if number % 2:
            call(train_semi, command("train_semi", folder, "resumed", "--iters", 2, "--resume")[2:])
        else:
            model.load_segmenter(file)
    except console.InputError as e:
        assert len(str(e).splitlines()) == 1, e
        return "refused"
    return "survived"


def wrong_flags(folder, rng, number):
    script = list(RIGHT)[number % len(RIGHT)]
    module = importlib.import_module(script)
    parser, words = module.flags(), [*RIGHT[script]]
    if script == "prepare":
        name = rng.choice(list(COMMANDS))
        parser, words = parser._subparsers._group_actions[0].choices[name], [name, *COMMANDS[name].split()]
    known = [a for a in parser._actions if a.option_strings and not SLOW & set(a.option_strings)]
    for action in rng.sample(known, rng.randint(1, min(3, len(known)))):
        values = [*VALUES, *map(str, action.choices or ())]
        words += [rng.choice(action.option_strings), *rng.choices(values, k=rng.choice([0, 1, 1, 1, 2]))]
    if script.startswith("train"):
        words = [*SMALL, *words, "--iters", "1"]
    print(f"{script} {' '.join(words)}", file=sys.stderr)
    try:
        call(module, words)
    except console.InputError as e:
        assert "\n" not in str(e) and str(e), repr(e)
        return "refused"
    return "survived"


# ---- the kinds: (folder, how many, seed) -> counts ----

def in_children(kind, folder, many, seed):
    """Do `kind` for items 0..many-1 in processes that may die."""
    counts, done = dict(refused=0, survived=0, lost=0), 0
    while done < many:
        words = [sys.executable, __file__, "--child", kind, "--seed", seed, "--first", done, "--items", many,
                 "--folder", folder]
        words = [*map(str, words)]
        child = subprocess.run(words, capture_output=True, text=True, cwd=folder, errors="replace")
        for line in child.stdout.splitlines():
            if line.startswith(MARK):
                counts[line.split()[2]] += 1
                done += 1
        if done < many:  # the child died of this one
            print(f"{kind} {done}, seed {seed}: status {child.returncode}: {child.stderr.strip()[-2000:]}")
            counts["lost"] += 1
            done += 1
    return counts


def kills(folder, many, seed):
    """kill -9 at a random moment, start-up counts, and by turns inside the save after it: --resume never goes back."""
    counts, rng, last, inside = dict(refused=0, survived=0, lost=0), random.Random(f"{seed}/kills"), 1, 0
    out = folder / "killed"
    part = out / "last.pt.part"
    flags = "--save-every", 1, "--eval-every", 5, "--semi-start", 3, "--resume"
    words = command("train_semi", folder, "killed", "--iters", 10**5, *flags)
    train("train_semi", folder, "killed", "--iters", 1, *flags)
    for n in range(many):
        if n % 2:
            part.unlink(missing_ok=True)  # an earlier kill's; the other runs must live with it
        run = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder)
        time.sleep(rng.uniform(0, 12))
        while n % 2 and run.poll() is None:
            run.send_signal(signal.SIGSTOP)  # so that the save cannot end between this look and the kill
            time.sleep(1e-3)
            if part.exists():
                break
            run.send_signal(signal.SIGCONT)
            time.sleep(1e-3)
        run.kill()
        error = run.communicate()[1]
        inside += n % 2 and part.exists()
        try:
            step = readable(folder, "killed")
            assert run.returncode == -signal.SIGKILL and not error, f"status {run.returncode} {error}"
            assert step >= last, f"from step {last} to {step}"
            counts["survived"], last = counts["survived"] + 1, step
        except Exception as e:
            counts["lost"] += 1
            print(f"kill {n}, seed {seed}: {e}")
    done = train("train_semi", folder, "killed", "--iters", last + 5, *flags)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    whole = [row["step"] for row in rows] == [*range(1, last + 6)] and read_checkpoint(out / "best.pt", "--ckpt")
    print(f"kills: {inside} inside a save; step {last}, the log is {'whole' if whole else 'broken'} {done.stderr}")
    counts["lost"] += bool(done.returncode) or not whole or inside < many // 2
    return counts


def full_disk(folder, many, seed):
    """A disk of 30 to 150 MB that a run fills or not: what it had saved last goes on, elsewhere."""
    counts, rng = dict(refused=0, survived=0, lost=0), random.Random(f"{seed}/disk")
    for n in range(many):
        size, place = rng.randint(30, 150 if n % 2 else 60), folder / f"disk{n}"
        place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "none", place]
        if subprocess.run(mount, capture_output=True).returncode:
            print("full disk: mounting a tmpfs is not allowed here")
            return counts
        try:
            done = train("train_base", folder, f"disk{n}/out", "--iters", 6, "--save-every", 1, "--eval-every", 2)
            one_line = done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
            result = "refused" if one_line else "lost" if done.returncode else "survived"
            left = [f.name for f in place.rglob("*.part")]
            shutil.copytree(place, folder / f"copy{n}")
        finally:
            subprocess.run(["umount", place], check=True)
        saved = readable(folder, f"copy{n}/out") if (folder / f"copy{n}/out/last.pt").exists() else 0
        logged = done.stdout.count("\nstep ")
        more = train("train_base", folder, f"copy{n}/out", "--iters", 7, "--save-every", 1, "--resume")
        if left or more.returncode or saved not in (logged, logged - 1):  # a step's line stands before its save
            result = "lost"
        if result == "lost":
            said = done.stderr + more.stderr
            print(f"disk of {size} MB, seed {seed}: {left} step {saved} of {logged}: {said[-500:]}")
        counts[result] += 1
    return counts


MOMENTS = {"load": "data.read_image", "step": "model.set_poly_lr", "save": "torch.save",
           "evaluation": "data.pad_to_stride"}


def signals(folder, many, seed):
    """SIGTERM while a image is loaded, in a step, a save, an evaluation: --resume gives the log of a straight run."""
    counts, rng = dict(refused=0, survived=0, lost=0), random.Random(f"{seed}/signals")
    words = "--iters", 8, "--eval-every", 4, "--save-every", 2
    train("train_semi", folder, "straight", *words)
    want = (folder / "straight/log.jsonl").read_text()
    for n in range(many):
        moment, out = list(MOMENTS)[n % len(MOMENTS)], f"signal{n}"
        module, name = MOMENTS[moment].split(".")
        at = rng.randint(1, {"load": 12, "step": 8, "save": 3, "evaluation": 3}[moment])
        code = (f"import os, signal, itertools, {module}; calls = itertools.count(1); real = {module}.{name}\n"
                f"def hooked(*a, **k):\n    if next(calls) == {at}: os.kill(os.getpid(), signal.SIGTERM)\n"
                f"    return real(*a, **k)\n{module}.{name} = hooked")
        stopped = train("train_semi", folder, out, *words, code=code)
        resumed = train("train_semi", folder, out, *words, "--resume")
        good = "stopped by SIGTERM" in stopped.stdout and not stopped.returncode and not resumed.returncode
        if good and (folder / out / "log.jsonl").read_text() == want:
            counts["survived"] += 1
        else:
            counts["lost"] += 1
            said = (stopped.stderr + resumed.stderr)[-500:]
            print(f"SIGTERM in {moment} {at}, seed {seed}: {stopped.returncode} {said}")
        shutil.rmtree(folder / out, ignore_errors=True)
    return counts


def usage(pid):
    """[(resident MB, open files, threads)] of a process and then of its children, oldest first.

    Sockets and batches on their way to the script are not counted as open files.
    """
    found = []
    for n in (pid, *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        status = dict(line.split(":", 1) for line in Path(f"/proc/{n}/status").read_text().splitlines())
        names = []
        for file in Path(f"/proc/{n}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed by now
                names.append(os.readlink(file))
        files = sum("/torch_" not in name and "socket:" not in name for name in names)
        found.append((int(status["VmRSS"].split()[0]) / 1024, files, int(status["Threads"])))
    return found


def watched(words, folder):
    """Run a training -> its exit status and {step: (seconds since the start, usage)} at each logged step."""
    began, seen = time.monotonic(), {}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=folder) as run:
        for line in run.stdout:
            if line.startswith("step "):
                seen[int(line.split()[1].split("/")[0])] = time.monotonic() - began, usage(run.pid)
    return run.returncode, seen


def soak(folder, many, seed):
    """That many steps with workers, then --resume for a sixth more, against what was there after the first sixth.

    Lost where memory is 3 % above that, or the number of open files or threads is another.
    """
    found, done, many = [], 0, max(120, many)
    for end in many, many + many // 6:
        words = command("train_semi", folder, "soak", "--data", "shapes", "--workers", 2, "--log-every", 10, "--resume",
                        "--iters", end, "--semi-start", many // 4, "--seed", seed, "--eval-every", many // 3)
        status, seen = watched(words, folder)
        if status:
            return dict(refused=0, survived=0, lost=1)
        early = done + (end - done) // (6 if done == 0 else 2) // 10 * 10
        for step in early, end // 10 * 10:  # crops differ by step; without what an evaluation starts
            of = [seen[n][1][:5] for n in range(max(done + 10, step - 40), step + 1, 10)]
            mb = [np.median([u[i][0] for u in of]) for i in range(len(of[-1]))]
            files, threads = (min(sum(process[i] for process in u) for u in of) for i in (1, 2))  # between two images
            print(f"soak: step {step}: {len(mb)} processes, {sum(mb):.0f} MB ({mb[0]:.0f} the script), {files} files, "
                  f"{threads} threads")
            found.append((sum(mb), files, threads))
        done = end
    (before, *figures), *later = found
    good = all(others == figures and after < 1.03 * before for after, *others in later)
    return dict(refused=0, survived=done * good, lost=int(not good))


def many_images(folder, many, seed):
    """So many unlabelled images against 1,000: at most 10 s to the first step and 200 MB a worker more."""
    found = {}
    for number in 1000, many:
        place = folder / f"images{number}"
        place.mkdir()
        for n in range(number):
            (place / f"{n:06}.jpg").symlink_to(folder / f"copies/{n % 5}.jpg")
    (folder / "copies").mkdir()
    for n in range(5):
        shutil.copy(folder / "data/images/1.jpg", folder / f"copies/{n}.jpg")
    for number in (1000, many) * 3:
        words = command("train_semi", folder, "many", "--iters", 1, "--workers", 2, "--unlabelled",
                        folder / f"images{number}", "--seed", seed)
        status, seen = watched(words, folder)
        if status:
            return dict(refused=0, survived=0, lost=1)
        seconds, (_, *workers) = seen[1]
        before = found.get(number, (seconds, 0))
        found[number] = min(seconds, before[0]), max(before[1], *(u[0] for u in workers))
    (few_s, few_mb), (many_s, many_mb) = found.values()
    print(f"many images: first step after {few_s:.1f} s with 1,000, {many_s:.1f} s with {many:,}; a worker has "
          f"{few_mb:.0f} and {many_mb:.0f} MB")
    good = many_s < few_s + 10 and many_mb < few_mb + 200
    return dict(refused=0, survived=int(good), lost=int(not good))


SANITIZERS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined"


def operators(folder, many, seed):
    """Drawn calls of all operators for that many seconds, their C++ under AddressSanitizer and UBSan."""
    libraries = [subprocess.check_output([*shlex.split(build.cxx()), f"-print-file-name={name}"], text=True).strip()
                 for name in ("libasan.so", "libubsan.so")]
    env = os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "SEG_OPS": "kernel",
                        "SEG_OPS_CFLAGS": SANITIZERS}
    words = map(str, [sys.executable, __file__, "--child", "operator_calls", "--seed", seed, "--items", many])
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    calls = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not calls:
        print(f"operators, seed {seed}: status {done.returncode}: {done.stdout[-300:]} {done.stderr[-3000:]}")
        return dict(refused=0, survived=0, lost=1)
    return dict(refused=0, survived=int(calls[0]), lost=0)


def operator_calls(seconds, seed):
    """In a child: hypothesis draws sizes, strides, dtypes, values and masks until the time is up; prints how often."""
    import hypothesis
    from hypothesis import strategies as st
    assert ops.in_use() == "kernel"  # which builds them
    end, count = time.monotonic() + seconds, 0
    side, odd = st.integers(1, 40), st.sampled_from([None, float("nan"), float("inf"), -float("inf"), 3e38, 1e-42])

    def strided(x, how):
        """The same numbers with gaps, from the back to the front of memory, or as they are."""
        if how == 0:
            wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
            wide[..., 1::2] = x
            return wide[..., 1::2]
        order = list(range(x.dim()))[::-1]
        return x.permute(order).contiguous().permute(order) if how == 1 else x[:1].expand(x.shape) if how == 2 else x

    @hypothesis.settings(max_examples=200, deadline=None, database=None, phases=[hypothesis.Phase.generate],
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(n=st.integers(1, 3), k=st.one_of(st.integers(1, 40), st.integers(41, 255)),
                      low=st.tuples(side, side), high=st.tuples(st.integers(1, 70), st.integers(1, 70)),
                      scale=st.sampled_from([0, 0.1, 1, 30, 1e4]), how=st.lists(st.integers(0, 3), min_size=4,
                      max_size=4), special=odd, half=st.booleans(), wide=st.booleans(),
                      ignore=st.sampled_from([255, 0, -1, 300]), wrong=st.booleans(), places=st.tuples(side, side),
                      threshold=st.one_of(st.floats(0, 1), st.floats()), by_class=st.booleans(), masked=st.booleans(),
                      sure=st.booleans(), divide=st.sampled_from(["kept", "all"]), run=st.integers(1, 60),
                      dtype=st.sampled_from([None, torch.float32, torch.bfloat16]), number=st.integers(0, 2**31))
    def calls(n, k, low, high, scale, how, special, half, wide, ignore, wrong, places, threshold, by_class, masked,
              sure, divide, run, dtype, number):
        nonlocal count
        if time.monotonic() > end:
            return
        count += 1
        g = torch.Generator().manual_seed(number)
        logits = torch.randn(n, k, *low, generator=g) * scale
        if special is not None:
            logits.view(-1)[number % logits.numel()] = special
        logits = strided(logits.to(torch.bfloat16 if half else torch.float32), how[0]).requires_grad_()
        target = torch.randint(0, k, (n, high[0], -(-high[1] // run)), generator=g).repeat_interleave(run, 2)
        target = target[..., :high[1]].clone()
        target[torch.rand(target.shape, generator=g) < 0.2] = max(0, ignore) if wide else max(0, ignore) % 256
        if wrong:
            target.view(-1)[number % target.numel()] = k + number % 300
        target = strided(target if wide else target.to(torch.uint8), how[1])
        valid = strided(torch.rand(n, *high, generator=g) < 0.7, how[2]) if masked else None
        confidence = strided(torch.randn(n, 1, *places, generator=g) * scale, how[3]) if sure else None
        for labels in target, None:
            with contextlib.suppress(ValueError):  # a label that is out of range, and a threshold that is no number
                loss, kept = ops.masked_cross_entropy(logits, labels, confidence, valid=valid, threshold=threshold,
                                                      size=high, ignore=ignore, divide=divide)
                assert 0 <= kept <= target.numel()
                loss.backward()
        probabilities = ops.upsample_softmax(logits, high, dtype, valid)
        probabilities.backward(strided(torch.randn(n, k, *high, generator=g).to(probabilities.dtype), how[2]))
        ids = ops.upsample_argmax(logits, high)
        taught = ops.pseudo_labels(logits, high, torch.rand(k, generator=g) if by_class else threshold, valid)
        assert ids.max() < k and ((taught == ids) | (taught == 255)).all()
        for prediction in logits, ids, ids.long():
            with contextlib.suppress(ValueError):
                matrix = ops.confusion_matrix(prediction, target, k, ignore=ignore)
                assert matrix.sum() == (target.long() != ignore).sum()

    while time.monotonic() < end:
        seed += 1
        hypothesis.seed(seed)(calls)()
    print(f"{MARK}{count}")


WHOLE_RUNS = {"kills": kills, "full_disk": full_disk, "signals": signals, "soak": soak, "many_images": many_images,
              "operators": operators}
KINDS = {"images": 2000, "checkpoints": 300, "wrong_flags": 100 * len(RIGHT), "kills": 100, "full_disk": 10,
         "signals": 16, "soak": 3000, "many_images": 200_000, "operators": 600}  # tries, steps, files, seconds


def main(args):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which cleans up
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = make(Path(folder))
        for kind in args.kinds:
            many = max(4 if kind == "signals" else 2, round(KINDS[kind] * args.share))
            began = time.monotonic()
            counts = WHOLE_RUNS.get(kind, partial(in_children, kind))(folder, many, args.seed)
            lost += counts["lost"]
            figures = "  ".join(f"{name} {n:4}" for name, n in counts.items())
            print(f"{kind.replace('_', ' '):12} tried {sum(counts.values()):4}  {figures}  (seed {args.seed}, "
                  f"{time.monotonic() - began:.0f} s)", flush=True)
    return lost


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--share", type=float, default=1, help="of all tries (default 1)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="those to try (default all)")
    for flag, kind in (("--child", str), ("--folder", Path), ("--first", int), ("--items", int)):
        p.add_argument(flag, type=kind, help=argparse.SUPPRESS)
    given = p.parse_args()
    if not given.child:
        sys.exit(main(given) > 0)
    if given.child == "operator_calls":
        operator_calls(given.items, given.seed)
        sys.exit()
    for i in range(given.first, given.items):
        outcome = globals()[given.child](given.folder, random.Random(f"{given.seed}/{given.child}/{i}"), i)
        print(f"{MARK}{i} {outcome}", flush=True)
