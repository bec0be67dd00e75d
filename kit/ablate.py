"""The paper's ablations at small size: procedural clips, the embedded base tiny/, this folder's commands.

    OMP_NUM_THREADS=1 python -m kit.ablate [FOLDER] [--jobs 2] [--seeds 0 1 2 3 4]

Prints REPORT.md's tables: means over the seeds; then each claim of the paper, our difference with its 95 % interval
(of pairs with the same seed), the paper's, and a verdict. A run is a training and its evaluation; one that has its
eval.json is not made again. A training that diverges is a result, too.
"""
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kit import clips
from kit.command import Parser, positive, run_command, whole
from kit.files import TINY, read_json, read_section, save_json

ROOT = Path(__file__).parent.parent
LOOP = "--muon --bf16 --warmup 50 --workers 1 --save-every 10000 --seed {seed} --device cpu --base {base} --out {run}"
COMMANDS = {                                    # a training, but for its loop, and its evaluation
    "vae": ("train_vae.py {data} --unbled --perceptual 0 --rank 16 --lr 1e-3 --lora-plus 16 --size 64 "
            "--schedule 1000:1:48:8,1500:5:48:4",
            "-m kit.evaluate vae --unbled --clips 32 --device cpu --base {base} --out {run} "
            "--vae-adapter {run}/Wan-Alpha-v2-VAE.safetensors"),
    "dit": ("train_dit.py {data} --cache {out}/cache --rank 24 --lr 2e-3 --lora-plus 4 --unweighted --steps 700 "
            "--batch 16 --still-ellipse 0.5",
            "-m kit.evaluate dit --prompts 64 --brief --seed {seed} --device cpu --base {base} --out {run} "
            "--dora {run}/t2v.safetensors --control 8 --steps")}
RENDER = "--vae-adapter {out}/vae-render/{seed}/Wan-Alpha-v2-VAE.safetensors"
TABD = "--vae-adapter {out}/vae-tabd/{seed}/Wan-Alpha-v2-VAE.safetensors"
RUNS = {                                        # flags of both, of the training, of the evaluation
    "vae-naive": ("--naive", "--tabd 0", ""),
    "vae-render": ("", "--tabd 0", ""),
    "vae-tabd": ("", "", ""),
    "vae-tabd-official": ("", "--tabd-clamp 0 1", ""),
    "vae-tabd-paper": ("", "--tabd 1 --tabd-clamp -1000000 1000000 --tabd-strict", ""),
    "dit-render-0": (f"{RENDER} --mean 0", "", ""),
    "dit-render": (RENDER, "", ""),
    "dit-tabd-0": (f"{TABD} --mean 0", "", ""),
    "dit-tabd": (TABD, "", "1 2 8 20"),         # steps of the sampler, beside 4
    "dit-lora": (TABD, "--lora --rank 25", "--control 0"),                # 2 % more numbers than DoRA of rank 24
    "dit-few-dora": (TABD, "", "--control 0"),  # of fewer clips
    "dit-few-lora": (TABD, "--lora --rank 25", "--control 0"),
    **{f"dit-mean-{mean}": (f"{TABD} --mean {mean}", "", "") for mean in (0.05, 0.25, 0.5, 2)}}
CLIPS = dict(many=1000, few=200)                # of each data set
Claim = namedtuple("Claim", "text run against number sign paper")
CLAIMS = (
    Claim("renders: colour", "vae-render", "vae-naive", "soft render: psnr", 1, "+0.76 dB"),
    Claim("renders: colour, hard", "vae-render", "vae-naive", "hard render: psnr", 1, "+0.76 dB"),
    Claim("renders: alpha", "vae-render", "vae-naive", "alpha: psnr", 1, "+1.24 dB"),
    Claim("TABD: colour", "vae-tabd", "vae-render", "soft render: psnr", 1, "+0.59 dB"),
    Claim("TABD: alpha", "vae-tabd", "vae-render", "alpha: psnr", 1, "+1.00 dB"),
    Claim("official clamp: alpha", "vae-tabd-official", "vae-render", "alpha: psnr", 1, "+1.00 dB"),
    Claim("TABD's latents: no holes", "dit-tabd", "dit-render", "no_holes", 1, "holes without"),
    Claim("mean shift: background alpha", "dit-tabd", "dit-tabd-0", "background alpha", -1, "clean with it"),
    Claim("mean shift: corners", "dit-tabd", "dit-tabd-0", "corners", 1, "clean with it"),
    Claim("mean shift: control in x", "dit-tabd", "dit-tabd-0", "ellipse x", 1, "G moves the object"),
    Claim("mean shift: control of size", "dit-tabd", "dit-tabd-0", "ellipse size", 1, "G shapes the object"),
    Claim("DoRA against LoRA, many clips: shape", "dit-tabd", "dit-lora", "shape", 1, "better quality"),
    Claim("DoRA against LoRA, few clips: shape", "dit-few-dora", "dit-few-lora", "shape", 1, "better quality"),
    Claim("DoRA against LoRA, few clips: error", "dit-few-dora", "dit-few-lora", "error", -1, "better quality"),
    Claim("mu of 2: tint", "dit-mean-2", "dit-tabd", "tint", 1, "mu 0.5 tints red"))
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}    # Student's t, two-sided, of n pairs


def words_of(line: str, run: Path, base: str) -> list[str]:
    """A command's words; of a flag that is given twice argparse takes the last."""
    out, name, seed = run.parents[1], run.parent.name, run.name
    data = out / ("few" if "-few-" in name else "many")
    return [word.format(run=run, out=out, seed=seed, base=base, data=data) for word in line.split()]


def make(run: Path, base: str) -> None:
    """Trains and evaluates. ValueError names the log of a run that failed."""
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    (train, score), (both, training, evaluation) = COMMANDS[run.parent.name[:3]], RUNS[run.parent.name]
    with open(run.with_suffix(".log"), "w") as log:
        for line in (f"{train} {LOOP} {training} {both}", f"{score} {evaluation} {both}"):
            command = [sys.executable, *words_of(line, run, base)]
            if subprocess.run(command, cwd=ROOT, stdout=log, stderr=log).returncode:
                said = re.search("the loss .*", run.with_suffix(".log").read_text())
                if not said:
                    raise ValueError(f"{run} failed, {log.name} says why; what is finished stays, call again")
                save_json(run / "eval.json", dict(diverged=said[0]))
                return


def numbers(run: Path, steps: str = "4") -> dict[str, float]:
    """Name -> number of a finished run; empty if it diverged."""
    said = read_json(run / "eval.json")
    if "diverged" in said:
        return {}
    if "scores" in said:
        ellipse = {f"ellipse {name}": value for name, value in said.get("ellipse", {}).items()}
        error = dict(error=read_json(run / "dit-rgba/summary.json")["held_out_mse"])
        return said["scores"][steps] | said["measures"][steps] | ellipse | error
    means = said["unseen clips"]["mean"].items()
    return {f"{name}: {kind}": value for name, kinds in means for kind, value in kinds.items()} | said["cells"]


def show(rows: dict[str, list[dict]], seeds: int) -> None:
    """A table of the mean and the deviation over the seeds."""
    found = [run for runs in rows.values() for run in runs if run]
    titles = [title for title in max(found, key=len, default={}) if all(run.get(title) is not None for run in found)]
    print("\n| run |", " | ".join(titles), "|\n" + "|---" * (len(titles) + 1) + "|")
    for name, runs in rows.items():
        whole_runs = [[run[title] for title in titles] for run in runs if run]
        if len(whole_runs) < 2:
            print(f"| {name} | diverged {seeds - len(whole_runs)} of {seeds} |")
            continue
        table = np.array(whole_runs, dtype=float)
        cells = [f"{mean:.3f} ± {spread:.3f}" for mean, spread in zip(table.mean(0), table.std(0, ddof=1))]
        print(f"| {name} |", " | ".join(cells), "|")


def judge(differences, sign: int) -> tuple[float, float, str]:
    """Mean difference of pairs, half of its 95 % interval, and what that says of a claim of this sign."""
    d = np.array(differences, dtype=float)
    mean, half = d.mean(), T95[len(d)] * d.std(ddof=1) / len(d) ** 0.5
    if abs(mean) <= half:
        return mean, half, "cannot tell"
    return mean, half, "same direction" if mean * sign > 0 else "opposite"


def show_claims(rows: dict[str, list[dict]]) -> None:
    print("\n| claim | number | here | 95 % interval | paper | verdict |\n|---|---|---|---|---|---|")
    for claim in CLAIMS:
        both = zip(rows.get(claim.run, []), rows.get(claim.against, []))
        pairs = [(a[claim.number], b[claim.number]) for a, b in both if a and b]
        if len(pairs) > 1:
            mean, half, verdict = judge([a - b for a, b in pairs], claim.sign)
            print(f"| {claim.text} | {claim.number} | {mean:+.3f} | {mean - half:+.3f} to {mean + half:+.3f} | "
                  f"{claim.paper} | {verdict} |")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m kit.ablate", description="The paper's ablations at small size.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/ablations"), help="[runs/ablations]")
    parser.add_argument("--base", default=str(TINY), metavar="DIR", help="folder with the frozen base [tiny/]")
    parser.add_argument("--jobs", type=positive, default=2, metavar="N", help="runs at a time [2]")
    parser.add_argument("--seeds", type=whole, nargs="+", default=[0, 1, 2, 3, 4], metavar="N", help="[0 1 2 3 4]")
    parser.add_argument("--only", nargs="+", metavar="RUN", choices=RUNS, default=list(RUNS), help="some of the runs")
    args = parser.parse_args(argv)
    if not 2 <= len(args.seeds) <= max(T95):
        raise ValueError(f"--seeds wants 2 to {max(T95)} of them: an interval is estimated")
    out, base, rows = args.folder.resolve(), str(Path(args.base).resolve()), {}
    frames = str(read_section(base).get("frames", 17))
    for name, count in CLIPS.items():
        if not (out / name / "metadata.jsonl").is_file():
            clips.main([str(out / name), "--clips", str(count), "--frames", frames])
    for kind in COMMANDS:                       # the transformers' runs read what the autoencoders' have made
        runs = {name: [out / name / str(seed) for seed in args.seeds] for name in args.only if name.startswith(kind)}
        missing = [runs[name][i] for i in range(len(args.seeds)) for name in runs]
        with ThreadPoolExecutor(args.jobs) as pool:                       # stops at the first that fails
            list(pool.map(lambda run: make(run, base), [r for r in missing if not (r / "eval.json").is_file()]))
        if runs:
            rows |= (found := {name: [numbers(run) for run in seeds] for name, seeds in runs.items()})
            show(found, len(args.seeds))
    if "dit-tabd" in rows:
        folders = [out / "dit-tabd" / str(seed) for seed in args.seeds]
        steps = {f"dit-tabd, {n} steps": [numbers(run, n) for run in folders] for n in ("1", "2", "4", "8", "20")}
        show(steps, len(args.seeds))
    show_claims(rows)


if __name__ == "__main__":
    sys.exit(run_command(main, "kit.ablate"))
