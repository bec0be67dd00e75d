"""A training run: what stands around a training's loop and is the same for every training.

    with Run(args, folder, model, draw, sizes, clips) as run:     # resume, log, signals
        for step, passes in run.steps():                          # batches from workers, some steps ahead
            for batch in passes:
                run.backward(losses_of(batch))                    # a dict of scalars, "loss" among them
            if run.update(learning_rate(step, ...)):              # average, clip, check, optimise, log, save
                contact_sheet(run.sheet, ...)                     # after a save: look at it

Every sample of every step has a random generator of its own, seeded by (seed, step, index in the whole batch). It draws
the sample and then travels with it, as batch["generators"], to draw its noise. So a run may be stopped and resumed, cut
into passes (--accumulate) or shared by processes (torchrun: data parallel, gradients are averaged) and still makes
the same steps (test_killed_ten_times_it_ends_with_the_same_bits, test_processes_and_passes_train_as_one).

SIGINT and SIGTERM end the step, save and stop; a second one ends the process at once.
"""
import argparse
import io
import json
import math
import os
import platform
import shlex
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from kit.command import (average, check_device, end_at_second_signal, end_process_group, is_first, number, peak_memory,
                         positive, processes, ranks, start_process_group, whole)
from kit.curves import draw_curves
from kit.files import WEIGHTS, Checkpoint, replacing, save_json, save_text


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every training; warm-up, decay and clipping are ours, the official code has none of them."""
    add = parser.add_argument_group("the run").add_argument
    add("--lr", type=number(1e-12), default=1e-4, metavar="LR", help="learning rate; it falls to 0 (ours) [1e-4]")
    add("--warmup", type=positive, default=100, metavar="N", help="steps in which it rises to --lr (ours) [100]")
    add("--betas", type=number(0, 0.999999), nargs=2, default=(0.9, 0.999), metavar="B", help="of AdamW [0.9 0.999]")
    add("--weight-decay", type=number(0), default=0.01, metavar="W", help="of AdamW and Muon [0.01]")
    add("--clip", type=number(1e-6), default=1.0, metavar="C", help="largest norm of the gradient (ours) [1]")
    add("--muon", action="store_true", help="Muon for matrices and kernels, AdamW for the rest")
    add("--lora-plus", type=number(1e-6), default=1.0, metavar="X", help="how much larger steps LoRA's B takes [1]")
    add("--accumulate", type=positive, default=1, metavar="N", help="passes that a batch is cut into: less memory [1]")
    add("--checkpoint", action="store_true", help="compute blocks again in backward: less memory, slower")
    add("--checkpoint-offload", action="store_true", help="the same, what is kept between blocks in host memory")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 ... [%(default)s]")
    add("--bf16", action="store_true", help="compute in bfloat16, train float32")
    add("--compile", action="store_true", help="torch.compile the blocks; needs a C++ compiler")
    add("--half", action="store_true", help="store the result in float16")
    add("--seed", type=whole, default=0, metavar="N", help="of weights, batches and noise [0]")
    add("--workers", type=whole, default=min(4, max(1, (os.cpu_count() or 1) // 2)), metavar="N",
        help="processes that read clips while the model trains; 0: none [%(default)s here]")
    add("--start", metavar="PATH", help="weights to begin with: a file that a training has written, a folder with one "
        "(such as tiny), or checkpoint.pt of another run")
    add("--resume", action="store_true", help="go on from the last checkpoint of the same run")
    add("--log-every", type=positive, default=50, metavar="N", help="steps between lines of log.jsonl [50]")
    add("--save-every", type=positive, default=500, metavar="N", help="steps between checkpoints and sheets [500]")


FREE = ("resume", "start", "device", "data", "out", "cache", "workers", "log_every", "save_every", "checkpoint",
        "checkpoint_offload", "accumulate", "compile", "shard", "half")       # may change when a run is resumed


def begin(args, sizes: list[int]) -> None:
    """Seed, device and place among processes. ValueError for what flags alone tell; sizes: of each step's batch."""
    if not Path(args.base).is_dir():
        raise FileNotFoundError(f"there is no folder {args.base}: give --base the folder of a checkpoint")
    if "RANK" not in os.environ:           # torchrun's processes get their devices now
        check_device(args.device)
    torch.manual_seed(args.seed)
    args.device = start_process_group(args.device)[2] or args.device
    for size in set(sizes):
        shares(size, *ranks(), args.accumulate)


def sample_generator(seed: int, step: int, index: int) -> torch.Generator:
    """All the randomness of one sample, `index` in the whole batch of a step; -1: what the whole batch has in common.
    Of a seed, torch's generator takes 32 bits."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 10_007 + index) % 2 ** 32)


def shares(n: int, rank: int, world: int, accumulate: int = 1) -> list[range]:
    """A process's parts of a batch of n, one a pass. ValueError if n cannot be cut so."""
    if n % (world * accumulate):
        raise ValueError(f"a batch of {n} cannot be cut into {world * accumulate} equal parts ({world} processes, "
                         f"--accumulate {accumulate}): make the batch a multiple of that")
    size, begin = n // (world * accumulate), rank * n // world
    return [range(begin + k * size, begin + (k + 1) * size) for k in range(accumulate)]


def make_optimizers(module: nn.Module, args) -> list[torch.optim.Optimizer]:
    """AdamW for what trains in `module`; with --muon, matrices and kernels (seen as c_out x rest) get
    Muon, whose step has AdamW's size. LoRA's B, which starts at zero behind a scale of 1/rank, takes
    steps --lora-plus times as large (arXiv 2402.12354)."""
    trained = {k: p for k, p in module.named_parameters() if p.requires_grad}
    matrices = [k for k, p in trained.items() if args.muon and p.dim() >= 2 and min(p.shape[0], p[0].numel()) >= 8
                and "token_embedding" not in k]
    views = {k: nn.Parameter(trained[k].detach().flatten(1)) for k in matrices}       # the same memory, two axes

    def groups(parameters):
        by_scale = {}
        for name, p in parameters.items():
            by_scale.setdefault(args.lora_plus if name.endswith("lora_B") else 1, []).append(p)
        return [dict(params=params, scale=scale) for scale, params in by_scale.items()]

    def hand_over_gradients(*_):
        for name, view in views.items():
            grad = trained[name].grad
            view.grad = None if grad is None else grad.flatten(1)
    optimizers = []
    if others := {k: p for k, p in trained.items() if k not in views}:
        optimizers.append(torch.optim.AdamW(groups(others), args.lr, tuple(args.betas), weight_decay=args.weight_decay))
    if views:
        optimizers.append(torch.optim.Muon(groups(views), args.lr, args.weight_decay, adjust_lr_fn="match_rms_adamw"))
        optimizers[-1].register_step_pre_hook(hand_over_gradients)
    return optimizers


def learning_rate(step: int, steps: int, lr: float, warmup: int = 100) -> float:
    """Linear warm-up, then linear towards zero."""
    return lr * min((step + 1) / warmup, (steps - step) / steps)


class Batches(Dataset):
    """This process's passes of each step. Errors travel as values, for a worker's would arrive as tracebacks."""

    def __init__(self, draw: Callable, sizes: list[int], args):
        self.draw, self.sizes, self.seed = draw, sizes, args.seed
        self.cut = (*ranks(), args.accumulate)

    def __getitem__(self, step: int):
        passes = []
        try:
            for part in shares(self.sizes[step], *self.cut):
                generators = [sample_generator(self.seed, step, index) for index in part]
                passes.append(self.draw(step, generators) | dict(generators=generators))
        except (ValueError, OSError) as error:
            return error
        return passes


def ignore_signals(_) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):      # they reach workers too, but the run ends its step
        signal.signal(number, signal.SIG_IGN)


def load_batches(batches: Batches, steps: range, args) -> Iterator[list[dict]]:
    """The passes of every step in order, some steps ahead of the training."""
    ahead = dict(worker_init_fn=ignore_signals, prefetch_factor=4) if args.workers else {}
    loader = DataLoader(batches, batch_size=None, sampler=steps, num_workers=args.workers,
                        pin_memory=torch.device(args.device).type == "cuda", **ahead)
    for passes in loader:
        if isinstance(passes, Exception):
            raise ValueError(f"{passes} (the run stopped there; --resume goes on from its last checkpoint)")
        yield passes


class Run:
    """draw(step, generators) makes a batch of one sample a generator: a dict with "names" of the clips; it runs in
    workers. sizes: of each step's whole batch, as many as there are steps. clips: the data's fingerprint. load: puts
    the tensors of a weights file into the model, for --start."""

    def __init__(self, args, folder: Path, model: nn.Module, draw: Callable, sizes: list[int], clips: str = "",
                 load: Callable[[dict], None] | None = None):
        self.args, self.folder, self.model, self.sizes, self.clips = args, folder, model, sizes, clips
        self.trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
        self.optimizers, self.load = make_optimizers(model, args), load
        self.batches = Batches(draw, sizes, args)
        self.file, self.caught, self.handlers = folder / "checkpoint.pt", [], {}
        self.start, self.losses, self.rows, self.log = 0, [], [], None
        self.sums, self.count, self.waited, self.stop, self.times = {}, 0, 0.0, False, []

    def __enter__(self):
        self.take_up()
        self.earlier, self.began = (self.rows[-1]["seconds"] if self.rows else 0), time.perf_counter()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if is_first():
                versions = dict(python=platform.python_version(), torch=torch.__version__,
                                threads=torch.get_num_threads(), processes=processes())
                save_json(self.folder / "run.json", dict(arguments=vars(self.args), versions=versions))
                save_text(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
            self.log = open(self.folder / "log.jsonl" if is_first() else os.devnull, "a")
        except OSError as error:
            raise self.cannot_write(error) from None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.catch)
            self.wakeup = end_at_second_signal()
        return self

    def __exit__(self, kind, error, _):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.handlers:
            signal.set_wakeup_fd(-1)
            os.close(self.wakeup)
        with suppress(OSError):                 # of a full disk: told already
            self.log.close()
        self.seconds = time.perf_counter() - self.began
        if isinstance(error, OSError):          # inside, files are only written: reading fails in `load_batches`
            raise self.cannot_write(error) from None

    def catch(self, number, _):
        self.caught.append(number)

    def cannot_write(self, error: OSError) -> OSError:
        return OSError(f"cannot write into {self.folder} ({error.strerror or error}): make room or choose another "
                       f"--out; {last_good(self.file)}")

    def take_up(self) -> None:
        """--resume: weights, optimisers, step, losses and log of this run; --start: another run's weights."""
        resume, start = self.args.resume, self.args.start
        if not resume and self.file.exists():
            raise ValueError(f"{self.folder} holds a run already: --resume goes on with it, or choose another --out")
        if not (resume or start):
            return
        if start and not resume and self.load and Path(start).suffix in WEIGHTS:
            return self.start_from(start)
        saved = read_run(self.file if resume else start, self.trained)
        if resume:
            self.go_on(saved)
        with torch.no_grad():
            for name, value in saved["model"].items():
                self.trained[name].copy_(value)

    def start_from(self, file) -> None:
        try:
            self.load(Checkpoint(file).read())
        except (ValueError, RuntimeError) as error:         # RuntimeError: load_state_dict's
            raise ValueError(f"--start {file} does not fit what is trained here: {error}") from None

    def go_on(self, saved: dict) -> None:
        fixed = fixed_arguments(self.args, self.clips)
        if other := [name for name, value in fixed.items() if saved["arguments"].get(name) != value]:
            raise ValueError(f"{self.file} is of a run with other {', '.join(other)}: give what it was made with, "
                             "or begin a new run from its weights by --start")
        for optimizer, state in zip(self.optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        self.start, self.losses = saved["step"], saved["losses"]
        log = self.folder / "log.jsonl"
        for line in log.read_text().splitlines() if log.exists() else []:
            with suppress(ValueError):          # a line that was cut
                row = json.loads(line)
                self.rows += [row] if row["step"] <= self.start else []

    def steps(self) -> Iterator[tuple[int, list[dict]]]:
        """Each step's number and this process's passes. After a signal the step is finished and saved, then it ends."""
        steps = range(self.start, len(self.sizes))
        batches = load_batches(self.batches, steps, self.args)
        self.bar = tqdm(steps, initial=self.start, total=len(self.sizes), mininterval=5, disable=not is_first())
        try:
            for self.step in self.bar:
                asked = time.perf_counter()
                self.passes = next(batches)
                self.waited += time.perf_counter() - asked
                self.parts = {}
                self.model.zero_grad()          # not the optimisers': Muon's hold views of the parameters
                yield self.step, self.passes
                if self.stop:
                    break
        finally:
            batches.close()
        if self.stop:
            if is_first():
                print(f"stopped after step {self.step + 1}; {self.file} holds it, --resume goes on", file=sys.stderr)
            end_process_group()
            sys.exit(130)

    def backward(self, losses: dict[str, Tensor]) -> None:
        """Adds the gradients of one pass; its losses count as their means over passes and processes."""
        (losses["loss"] / len(self.passes)).backward()
        for name, value in losses.items():
            self.parts[name] = self.parts.get(name, 0) + value.detach().float() / len(self.passes)

    def update(self, lr: float) -> bool:
        """One step of the optimisers. True where a sheet is due at `self.sheet`: a checkpoint was saved."""
        parts, gradients = self.parts, [p.grad for p in self.trained.values() if p.grad is not None]
        parts["stop"] = torch.tensor(float(bool(self.caught)), device=parts["loss"].device)
        average(gradients + list(parts.values()))
        parts = {name: value.item() for name, value in parts.items()}
        self.stop = parts.pop("stop") > 0
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.args.clip).item()
        names = [name for batch in self.passes for name in batch["names"]]
        check_loss(parts["loss"], norm, self.losses, self.step, names, self.file)
        self.losses = self.losses[-999:] + [parts["loss"]]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * lr
            optimizer.step()
        return self.note(parts)

    def note(self, parts: dict[str, float]) -> bool:
        """A line of the log and a checkpoint, each when its time has come."""
        done = self.step + 1
        last = self.stop or done == len(self.sizes)
        self.times.append(time.perf_counter())
        if len(self.times) == 6 and not last:
            self.foretell((self.times[5] - self.times[2]) / 3)
        self.sums, self.count = {k: self.sums.get(k, 0) + v for k, v in parts.items()}, self.count + 1
        if done % self.args.log_every == 0 or last:
            means = {k: v / self.count for k, v in self.sums.items()}
            seconds = round(self.earlier + time.perf_counter() - self.began, 1)
            self.rows.append(dict(step=done, seconds=seconds, **means))
            print(json.dumps(self.rows[-1]), file=self.log, flush=True)
            self.bar.set_postfix({k: round(v, 5) for k, v in means.items()})
            self.sums, self.count = {}, 0
        save, self.sheet = done % self.args.save_every == 0 or last, self.folder / f"sheet-{done:06d}.png"
        if save and is_first():
            self.save(done)
        return save and (is_first() or getattr(self.args, "shard", False))      # sharded, all draw together

    def foretell(self, seconds: float) -> None:
        """What to expect, after the first steps and before anything long."""
        left, peak = seconds * (len(self.sizes) - self.step - 1), peak_memory(self.args.device) / 1e9
        size, unit = (3600, "hours") if left > 3600 else (60, "minutes") if left > 60 else (1, "s")
        if is_first():
            self.bar.write(f"about {left / size:.1f} {unit} to go, {seconds:.2g} s a step, {peak:.1f} GB so far",
                           file=sys.stderr)

    def save(self, step: int) -> None:
        buffer = io.BytesIO()                   # torch.save to a full disk is no OSError
        torch.save(dict(step=step, model=self.trained, optimizers=[o.state_dict() for o in self.optimizers],
                        losses=self.losses, arguments=fixed_arguments(self.args, self.clips)), buffer)
        with replacing(self.file) as temporary:
            temporary.write_bytes(buffer.getbuffer())
        draw_curves(self.folder / "curves.png", self.rows)

    def summary(self) -> dict:
        """What the finished run took."""
        steps, peak = len(self.sizes), peak_memory(self.args.device) / 1e9
        return dict(steps=steps, seconds=round(self.earlier + self.seconds, 1),
                    steps_a_second=round((steps - self.start) / self.seconds, 3),
                    waited_for_data=round(self.waited / self.seconds, 4), peak_memory_gb=round(peak, 2))


def read_run(file, trained: dict) -> dict:
    """A checkpoint.pt that a `Run` wrote for a model with the same trained tensors."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        fits = {k: v.shape for k, v in saved["model"].items()} == {k: p.shape for k, p in trained.items()} and (
            {"step", "optimizers", "losses", "arguments"} <= saved.keys())
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {file} to go on from; start without --resume or --start") from None
    except Exception as error:
        raise ValueError(f"{file} is not a checkpoint of a training here ({type(error).__name__})") from None
    if not fits:
        raise ValueError(f"{file} is of a model with other sizes or of another stage; give the flags it was made with")
    return saved


def fixed_arguments(args, clips: str) -> dict:
    """What a run that goes on must have in common with the one before."""
    fixed = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(args).items() if k not in FREE}
    return fixed | dict(data=clips)


def last_good(file: Path) -> str:
    return f"{file} is the last good state" if file.exists() else "nothing was saved before"


def check_loss(loss: float, norm: float, losses: list, step: int, names: list, file: Path) -> None:
    """ValueError if a step must not be taken: nothing of it is in the weights yet."""
    usual = statistics.median(losses) if len(losses) >= 100 else math.inf
    if not math.isfinite(loss + norm):
        what = f"loss ({loss:.4g}) or gradient ({norm:.4g}) is not finite"
    elif 0 < 50 * usual < loss:
        what = f"the loss {loss:.4g} is over 50 times its median {usual:.4g}"
    else:
        return
    raise ValueError(f"{what} at step {step}, clips {', '.join(map(str, names))}: look at these clips, or try a "
                     f"smaller --lr; {last_good(file)}")


def finish(folder: Path, summary: dict, *following) -> None:
    """summary.json, and the same on stdout; scores by name a line; last the words of a command that may follow."""
    if not is_first():
        return
    save_json(folder / "summary.json", summary)
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in summary.items() if type(value) is not dict))
    for title, scores in summary.items():
        for name, values in scores.items() if type(scores) is dict else ():
            print(f"{title.replace('_', ' ')}: {name:<24}" + ", ".join(f"{kind} {x:.3f}" for kind, x in values.items()))
    if following:
        print("next:", shlex.join(map(str, following)))
