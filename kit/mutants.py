"""Planted bugs: each must make a test fail.

    python -m kit.mutants [--jobs 2] [WORD ...]     # all, or those whose line holds a WORD

Each bug is planted in a copy of the folder. The test that should kill it runs first; if it does not, all tests run, and
a bug that survives them is named. The table that is printed stands in REPORT.md.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kit.command import Parser, positive, run_command

ROOT = Path(__file__).parents[1]

MUTANTS = [     # file, text that stands there once, what it becomes, the test that should fail
    ("vae.py", "0, 0, 0, 0, past, 0)) if history", "0, 0, 0, 0, 0, past)) if history", "vae_is_causal"),
    ("vae.py", "x[:, :, -past:].clone()", "x[:, :, -past:]", "memory_does_not_grow"),
    ("vae.py", "self.weight[:, :, -1]", "self.weight[:, :, 0]", "any_chunks"),
    ("vae.py", "if start and not self.up:", "if start:", "vae_is_causal"),
    ("vae.py", "return (raw - mean) / std", "return (raw - mean) * std", "official_numbers"),
    ("vae.py", "nn.ZeroPad2d((0, 1, 0, 1))", "nn.ZeroPad2d((1, 0, 1, 0))", "official_numbers"),
    ("vae.py", "t % 4 != 1):", "t % 4 == 3):", "wrong"),
    ("merge.py", "rgb, alpha = self.vae_fgr.decode(z, chunk), self.vae_pha.decode(z, chunk)",
     "alpha, rgb = self.vae_fgr.decode(z, chunk), self.vae_pha.decode(z, chunk)", "official_numbers"),
    ("merge.py", "self.to_alpha(alpha.clamp(-1, 1))", "self.to_alpha(alpha)", "clamped"),
    ("merge.py", "zip((rgb, alpha), caches)", "zip((alpha, rgb), caches)", "official_numbers"),
    ("merge.py", "lora, scale=1 / rank)", "lora, scale=1.0)", "official_numbers"),
    ("merge.py", "(2 * alpha - 1).expand_as(rgb)", "alpha.expand_as(rgb)", "embedded_autoencoder"),
    ("dit.py", "shift1, scale1, gate1, shift2", "scale1, shift1, gate1, shift2", "official_numbers"),
    ("dit.py", "torch.cat([angles.cos(), angles.sin()], dim=1)", "torch.cat([angles.sin(), angles.cos()], dim=1)",
     "official_numbers"),
    ("dit.py", "pairs = (head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6)",
     "pairs = (head_dim // 6, head_dim // 6, head_dim // 2 - 2 * (head_dim // 6))", "rope"),
    ("dit.py", "F.pad(c, (0, 0, 0, self", "F.pad(c, (0, 0, self", "official_numbers"),
    ("dit.py", "(p q r c) -> b c", "(c p q r) -> b c", "official_numbers"),
    ("dit.py", 'FLOAT32 = ("time_", ', 'FLOAT32 = (', "float32"),
    ("dit.py", "for adapter, deltas in changes:", "for adapter, deltas in changes[::-1]:", "official_numbers"),
    ("dora.py", "torch.linalg.vector_norm(weight.flatten(1).float(), dim=1)",
     "torch.linalg.vector_norm(weight.flatten(1).float(), dim=0)", "magnitude"),
    ("dora.py", "/ row_norm(weight.detach())", "/ row_norm(weight)", "constant"),
    ("dora.py", "layer.lora_scale = alpha / rank", "layer.lora_scale = alpha", "merged_equals_unmerged"),
    ("dora.py", "    return merged.to(weight.dtype)", "    return merged", "magnitude"),
    ("dora.py", "self.strength * (1.0 if", "(1.0 if", "official_numbers"),
    ("losses.py", "return rgb * alpha + c * (1 - alpha)", "return rgb + c * (1 - alpha)", "render"),
    ("losses.py", "(alpha > 0).to(rgb)", "(alpha > 0.5).to(rgb)", "render"),
    ("losses.py", "clamp: tuple[float, float] = (-1, 1)", "clamp: tuple[float, float] = (0, 1)", "tabd_pulls"),
    ("losses.py", "    transparent[:, :, :1] = ~opaque[:, :, :1]\n", "", "official_masks"),
    ("losses.py", "(v + 1) / 2,", "v,", "vgg"),
    ("losses.py", "alpha_hat if own_alpha else alpha, hard", "alpha_hat, hard", "rgba_loss"),
    ("losses.py", "alpha_hat if own_alpha else alpha, hard", "alpha, hard", "rgba_loss"),
    ("losses.py", "    if strict:\n        transparent = ~opaque\n", "", "tabd_pulls"),
    ("sampler.py", "21 * 60 * 104 / cells", "cells / (21 * 60 * 104)", "mu_counts"),
    ("train_dit.py", "torch.where(u < still,", "torch.where(u > still,", "ellipse_follows"),
    ("kit/media.py", "if not bled:", "if bled:", "bleeding"),
    ("kit/pretrain.py", "(view < 0.75) | opaque", "view < 0.75", "renders_of_one"),
    ("kit/ablate.py", "mean * sign > 0", "mean > 0", "verdict"),
    ("sampler.py", "noise + mean * (1 - resize", "noise - mean * (1 - resize", "official_numbers"),
    ("sampler.py", "(1 - resize_mask(mask.to(noise), *noise.shape[-3:]).unsqueeze(-4))",
     "resize_mask(mask.to(noise), *noise.shape[-3:]).unsqueeze(-4)", "official_numbers"),
    ("sampler.py", "return noise - z\n", "return z - noise\n", "flow"),
    ("sampler.py", "sigma * noise + (1 - sigma) * z", "sigma * z + (1 - sigma) * noise", "flow"),
    ("sampler.py", "model(z, (1000 * sigmas[i])", "model(z, (sigmas[i])", "official_numbers"),
    ("sampler.py", "order=min(i, 2))", "order=1)", "official_numbers"),
    ("sampler.py", "(1000 * sigmas).floor()", "(1000 * sigmas).round()", "model_times"),
    ("sampler.py", "half * 1.12 ** len(covered)", "half * 1.3 ** len(covered)", "official_masks"),
    ("sampler.py", "return (w - w.min()) / (w - w.min()).mean()", "return w / w.mean()", "official_numbers"),
    ("text.py", "(q @ k.mT).float() + bias", "(q @ k.mT).float() / 4 + bias", "official_numbers"),
    ("text.py", "half * (distance > 0)", "half * (distance < 0)", "official_numbers"),
    ("text.py", ".ids + [end]\n", ".ids\n", "ends_prompts"),
    ("train_vae.py", "loss = loss + tabd * parts", "loss = loss - tabd * parts", "tenth_of_tabd"),
    ("train_vae.py", "None if naive else color, chunk", "color, chunk", "naive"),
    ("train_dit.py", "dit(interpolate(z, noise, sigma), 1000 * sigma", "dit(interpolate(z, noise, sigma), sigma",
     "shifted_noise"),
    ("train_dit.py", "+ [read_text_len(args.base), args.bf16, ", "+ [args.bf16, ", "cached_context"),
    ("train_dit.py", "    dataset.release()\n", "", "cached_context"),
    ("generate.py", "(255 * x).round()", "(255 * x).floor()", "rounded"),
    ("generate.py", "    if mask is not None:\n        noise = ", "    if mask is None:\n        noise = ", "argument"),
    ("generate.py", "guide(v, v_negative, turn", "guide(v_negative, v, turn", "experts"),
    ("kit/media.py", "np.asarray(background, np.float32) * (1 - alpha) + 0.5",
     "np.asarray(background, np.float32) * (1 - alpha)", "over"),
    ("kit/media.py", "x[:, :3] * x[:, 3:], x[:, 3:]", "x[:, :3], x[:, 3:]", "weighs_colour"),
    ("kit/run.py", "            optimizer.load_state_dict(state)", "            pass", "resume"),
    ("kit/run.py", "(seed * 1_000_003 + step) * 10_007 + index", "(seed * 1_000_003 + step) * 10_007", "own"),
    ("kit/run.py", "self.model.zero_grad() ", "[o.zero_grad() for o in self.optimizers] ", "trainings_resume"),
    ("kit/command.py", "(together / processes()).split", "together.split", "processes_and_passes"),
    ("kit/command.py", 'NO_MEMORY = "out of memory|allocate memory|not enough memory"', 'NO_MEMORY = "memory"',
     "right_words"),
    ("kit/run.py", "if count > 1:", "if count > 9:", "second_signal"),
    ("kit/adapter.py", "row_norm(weight) / row_norm(low_rank_sum", "row_norm(low_rank_sum", "merges_to_the_same"),
    ("dora.py", "math.sqrt(rank) if", "rank if", "scale_of_an_adapter"),
    ("kit/export.py", "+ 127) // 255", ") // 256", "exported"),
    ("kit/view.html", "10; i++) g.drawImage(canvas", "1; i++) g.drawImage(canvas", "page_of_clips"),
    ("kit/data.py", "2 * len(opaque) > len(rows)", "len(opaque) > len(rows)", "no_alpha"),
    ("kit/media.py", "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709",
     "setparams=range=tv:colorspace=bt709", "colour_tags"),
    ("kit/scale.py", ".abs().amax(dim=1, keepdim=True)", ".abs().amax(dim=0, keepdim=True)", "float8"),
    ("kit/files.py", "weights_only=True", "weights_only=False", "plain_tensors"),
    ("kit/files.py", "if expected.get(name) != found.get(name)]",
     "if name in found and expected.get(name) != found[name]]", "do_not_fit")]


def plant(folder: Path, file: str, text: str, replacement: str) -> None:
    source = (folder / file).read_text()
    if source.count(text) != 1:
        raise ValueError(f"{file} holds {text!r} {source.count(text)} times; a bug's text must stand there once")
    (folder / file).write_text(source.replace(text, replacement))


def killer(folder: Path, *flags: str) -> str | None:
    """The first test that fails in that folder; None if all pass."""
    command = [sys.executable, "-m", "pytest", "test_all.py", "-qx", "-p", "no:cacheprovider", "--no-header", *flags]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    said = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True).stdout
    found = re.search(r"^(?:FAILED|ERROR) \S+?(?:::(\S+))?(?: |$)", said, re.M)
    return (found[1] or "does not even import") if found else None


def try_one(mutant: tuple) -> str | None:
    file, text, replacement, expected = mutant
    with tempfile.TemporaryDirectory() as name:
        folder, others = Path(name) / "copy", (".git", ".venv", "out", "runs", "data", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*others))
        plant(folder, file, text, replacement)
        return killer(folder, "-k", expected) or killer(folder)


def main(argv=None) -> None:
    parser = Parser(prog="kit.mutants", description="Plant bugs and see which test kills which.")
    parser.add_argument("words", nargs="*", help="only bugs whose file or text holds one of these words")
    parser.add_argument("--jobs", type=positive, default=2, help="bugs at a time [2]")
    args = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if not args.words or any(word in " ".join(m) for word in args.words)]
    print("| file | planted | instead of | killed by |\n|---|---|---|---|")
    survivors = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for (file, text, replacement, _), test in zip(chosen, pool.map(try_one, chosen)):
            cells = [file, *(f"`{' '.join(code.split())}`" for code in (replacement, text)), test or "NOTHING"]
            print("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |", flush=True)
            survivors += test is None
    print(f"\n{len(chosen) - survivors} of {len(chosen)} planted bugs are killed.")
    if survivors:
        raise ValueError(f"{survivors} planted bugs survive: a test is missing for each")


if __name__ == "__main__":
    sys.exit(run_command(main, "kit.mutants"))
