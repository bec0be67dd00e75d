"""A page to look at clips: index.html beside them, which opens from the disk and asks no network.

    python -m kit.view out/a-red-glass-ball-bouncing-0 [MORE ...] [--page out/index.html]

generate.py writes one into each clip's folder and, for several, one that shows them side by side. view.html draws
frames over a checkerboard, a colour or a picture of one's own; colour and alpha alone; frame by frame.
"""
import json
import os
import sys
from pathlib import Path

from kit.command import Parser, run_command
from kit.files import read_json, save_text
from kit.result import FILES
from sampler import CENTERED, parse_ellipse

TEMPLATE = Path(__file__).with_name("view.html")


def ellipse_keys(asked: dict) -> list | None:
    """Keys (time, x, y, a, b, angle) of the ellipse that a clip was asked for; None if the mask was another one."""
    if not asked.get("mean"):
        return None
    try:
        return [*map(list, CENTERED if asked["mask"] is None else parse_ellipse(asked["mask"]))]
    except ValueError:
        return None


def describe(folder: Path, page: Path) -> dict:
    """What view.html is told of the clip in a folder: ValueError if it is none."""
    run = read_json(folder / "run.json") if (folder / "run.json").is_file() else None
    try:
        asked = run["arguments"]
        size = "{} x {}".format(*asked["size"])
        files = [name for name in FILES if (folder / name).is_file() and name != page.name]
        facts = f"seed {run['seed']}, {asked['steps']} steps, {size}, {asked['fps']} fps"
        return dict(folder=Path(os.path.relpath(folder, page.parent)).as_posix(), prompt=asked["prompt"], facts=facts,
                    size=asked["size"], fps=asked["fps"], frames=asked["frames"], stages=run["stages"],
                    ellipse=ellipse_keys(asked), files=files)
    except (KeyError, TypeError, IndexError):
        raise ValueError(f"{folder} is no clip of generate.py: its run.json is missing or another's") from None


def is_free(page: Path) -> bool:
    """Whether there is no such file, or one that was written here."""
    return not page.exists() or page.read_bytes().startswith(TEMPLATE.read_bytes()[:100])


def write_page(page: Path, folders: list[Path]) -> None:
    """An HTML page that shows the clips in these folders, by links relative to it."""
    clips = json.dumps([describe(folder, page) for folder in folders], ensure_ascii=False).replace("</", "<\\/")
    save_text(page, TEMPLATE.read_text(encoding="utf-8").replace("/*CLIPS*/[]", clips))


def main(argv=None) -> None:
    parser = Parser(prog="kit.view", description="Write a page that shows clips.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a clip that generate.py wrote")
    parser.add_argument("--page", type=Path, metavar="FILE", help="[index.html in the first folder]")
    args = parser.parse_args(argv)
    page = args.page or args.folders[0] / "index.html"
    if not is_free(page):
        raise ValueError(f"{page} is there and no page of clips; give another --page")
    write_page(page, args.folders)
    print(page)


if __name__ == "__main__":
    sys.exit(run_command(main, "kit.view"))
