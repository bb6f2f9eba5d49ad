"""Makes the pictures of docs/ anew from a demo: the contact sheet, and the pages of a comparison and of `lowvram
serve` as Chromium shows them.

python docs/screenshots.py [--demo demo-out]     (after `make demo`; needs chromium and the extra ui)
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parent
SIZE = (1200, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=DOCS.parent / "demo-out", help="what `make demo` wrote")
    demo = parser.parse_args().demo.resolve()
    for name in ("contact-sheet.png", "compare.html"):
        if not (demo / name).is_file():
            sys.exit(f"{demo / name} is not there; run `make demo` first")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no chromium is here to show the page; install one")
    shutil.copyfile(demo / "contact-sheet.png", DOCS / "contact-sheet.png")
    picture = DOCS / "compare-page.png"
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", f"--window-size={SIZE[0]},{SIZE[1]}", "--virtual-time-budget=8000"]
        subprocess.run([*command, f"--screenshot={picture}", (demo / "compare.html").as_uri()], check=True, timeout=120)
    Image.open(picture).convert("RGB").save(picture, optimize=True)
    served = DOCS / "serve-page.png"
    check = DOCS.parent / "tests" / "browser" / "check_page.py"
    model = demo / "artifact-int8"
    subprocess.run([sys.executable, check, "--model", model, "--picture", served], check=True, timeout=600)
    print(f"{DOCS / 'contact-sheet.png'}\n{picture}\n{served}")


if __name__ == "__main__":
    main()
