"""The paper's ablations at small size: procedural clips, the embedded base tiny/, this folder's commands.

    OMP_NUM_THREADS=1 python -m kit.ablate [FOLDER] [--jobs 2] [--seeds 0 1 2]

Prints REPORT.md's tables. A run is a training and its evaluation; one that has its eval.json is not made again.
"""
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kit import clips
from kit.command import Parser, positive, run_command, whole
from kit.files import read_json

ROOT = Path(__file__).parent.parent
LOOP = "{out}/data --muon --bf16 --warmup 50 --workers 1 --save-every 10000 --seed {seed} --device cpu --out {run}"
COMMANDS = {                                    # a training, but for its loop, and its evaluation
    "vae": ("train_vae.py --perceptual 0 --rank 16 --lr 1e-3 --lora-plus 16 --size 64 "
            "--schedule 250:1:48:16,150:5:48:6",
            "-m kit.evaluate vae --clips 24 --device cpu --out {run} --vae-adapter {run}/Wan-Alpha-v2-VAE.safetensors"),
    "dit": ("train_dit.py --cache {out}/cache --rank 24 --lr 2e-3 --lora-plus 4 --unweighted --steps 600 --batch 16",
            "-m kit.evaluate dit --prompts 60 --brief --device cpu --out {run} --dora {run}/t2v.safetensors --steps")}
RUNS = {                                        # flags of both, of the training, of the evaluation
    "vae-naive": ("--naive", "--tabd 0", ""),
    "vae-render": ("", "--tabd 0", ""),
    "vae-tabd": ("", "--tabd 0.1", ""),
    "vae-tabd-official": ("", "--tabd 0.1 --tabd-clamp 0 1", ""),
    "dit-dora": ("", "", "1 2 8 20"),           # steps of the sampler, beside 4
    "dit-lora": ("", "--lora", ""),
    **{f"dit-mean-{mean}": (f"--mean {mean}", "", "") for mean in (0, 0.03, 0.1)},
    "dit-latent-render": ("--vae-adapter {out}/vae-render/{seed}/Wan-Alpha-v2-VAE.safetensors", "", ""),
    "dit-latent-tabd": ("--vae-adapter {out}/vae-tabd/{seed}/Wan-Alpha-v2-VAE.safetensors", "", "")}


def make(run: Path) -> None:
    """Trains and evaluates. ValueError names the log of a run that failed."""
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    (train, score), (both, training, evaluation) = COMMANDS[run.parent.name[:3]], RUNS[run.parent.name]
    with open(run.with_suffix(".log"), "w") as log:
        for line in (f"{train} {LOOP} {training} {both}", f"{score} {evaluation} {both}"):
            words = [word.format(run=run, out=run.parents[1], seed=run.name) for word in line.split()]
            if subprocess.run([sys.executable, *words], cwd=ROOT, stdout=log, stderr=log).returncode:
                raise ValueError(f"{run} failed, {log.name} says why; what is finished stays, call again")


def numbers(run: Path, steps: str = "4") -> dict[str, float]:
    said = read_json(run / "eval.json")
    if "scores" in said:
        return said["scores"][steps] | dict(error=read_json(run / "dit-rgba/summary.json")["held_out_mse"])
    means = said["unseen clips"]["mean"].items()
    return {f"{name}: {kind}": mean[kind] for name, mean in means for kind in ("psnr", "ssim")} | said["cells"]


def show(rows: dict[str, list[dict]]) -> None:
    """A table of the mean and the deviation over the seeds."""
    titles = list(rows.values())[0][0]
    print("\n| run |", " | ".join(titles), "|\n" + "|---" * (len(titles) + 1) + "|")
    for name, runs in rows.items():
        table = np.array([list(run.values()) for run in runs], dtype=float)
        cells = [f"{mean:.3f} ± {spread:.3f}" for mean, spread in zip(table.mean(0), table.std(0, ddof=1))]
        print(f"| {name} |", " | ".join(cells), "|")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m kit.ablate", description="The paper's ablations at small size.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/ablations"), help="[runs/ablations]")
    parser.add_argument("--jobs", type=positive, default=2, metavar="N", help="runs at a time [2]")
    parser.add_argument("--seeds", type=whole, nargs="+", default=[0, 1, 2], metavar="N", help="[0 1 2]")
    args = parser.parse_args(argv)
    out = args.folder.resolve()
    if not (out / "data/metadata.jsonl").is_file():
        clips.main([str(out / "data"), "--clips", "1000"])
    for kind in COMMANDS:                       # the transformers' runs read what the autoencoders' have made
        runs = {name: [out / name / str(seed) for seed in args.seeds] for name in RUNS if name.startswith(kind)}
        missing = [run for run in sum(runs.values(), []) if not (run / "eval.json").is_file()]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(make, missing))       # stops at the first that fails
        show({name: [numbers(run) for run in seeds] for name, seeds in runs.items()})
    show({f"dit-dora, {n} steps": [numbers(run, n) for run in runs["dit-dora"]] for n in ("1", "2", "8", "20")})


if __name__ == "__main__":
    sys.exit(run_command(main, "kit.ablate"))
