"""Check the page of ``lowvram serve`` in a headless Chromium, from the upload to a comparison.

python tests/browser/check_page.py [--model demo-out/artifact-int8] [--picture docs/serve-page.png]

A portrait and a voice are uploaded; the video plays while it is made; one is cancelled; settings of an earlier one are
taken up; two are compared. No request may leave this machine. Needs chromium and the extra `ui`; `make demo` makes the
model.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from chromium import Page, chromium

from lowvram.media.samples import draw_portrait, synth_voice, write_wav

ROOT = Path(__file__).parents[2]
PROMPT = "A person speaks to the camera, friendly and calm"
SECONDS = 8.0
TIME = "document.querySelector('#lv-video').currentTime"
STATE = "document.querySelector('#lv-progress .lv-progress')?.dataset.state"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "demo-out" / "artifact-int8", help="a tiny artifact")
    parser.add_argument("--picture", type=Path, help="PNG to make of the page while a video is made")
    asked = parser.parse_args()
    if not asked.model.is_dir():
        sys.exit(f"{asked.model} is not there; run `make demo` first, or name another with --model")
    with tempfile.TemporaryDirectory() as folder, chromium() as page:
        process = served(asked.model.resolve(), Path(folder))
        try:
            assert process.stdout
            check(page, process.stdout.readline().strip(), Path(folder), asked.picture)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def served(model: Path, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lowvram", "serve", "--model", str(model), "--dir", str(folder / "served")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["--port", "0", "--device", "cpu"]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def check(page: Page, url: str, folder: Path, picture: Path | None) -> None:
    draw_portrait(256, 256).save(folder / "portrait.png")
    write_wav(folder / "voice.wav", synth_voice(SECONDS), 16000)
    page.open(url)
    page.until("document.querySelector('#lv-make')")
    says("the page is there")
    begin(page, folder)
    plays_while_it_is_made(page)
    page.until(f"{STATE} === 'done'", 300)
    says("the video is done")
    cancel(page)
    take_up(page)
    if picture:
        page.until("document.querySelector('#lv-video')", 120)
        take_picture(page, picture)
    page.until(f"{STATE} === 'done'", 300)
    says("another was made of them")
    compare(page)
    if elsewhere := page.asked_elsewhere("127.0.0.1"):
        sys.exit(f"{len(elsewhere)} requests left this machine: {elsewhere[:5]}")
    if page.errors:
        sys.exit(f"scripts of the page failed: {page.errors[:5]}")
    says(f"{len(page.requests)} requests, all of them to 127.0.0.1")


def begin(page: Page, folder: Path) -> None:
    page.upload("#lv-image input[type=file]", folder / "portrait.png")
    page.until("document.querySelector('#lv-image img')")
    page.upload("#lv-audio input[type=file]", folder / "voice.wav")
    page.until("document.querySelector('#lv-audio .waveform-container, #lv-audio #waveform')")
    page.write("#lv-prompt textarea", PROMPT)
    page.write("#lv-size input", "128*128")
    page.press("Enter", 13)
    page.click("#lv-make")
    page.until(f"{STATE} === 'making'")
    says("the job is being made")


def plays_while_it_is_made(page: Page) -> None:
    page.until("document.querySelector('#lv-video')", 120)
    first = page.until(f"{TIME} > 0 && {TIME}")
    second = page.until(f"{TIME} > {first} + 0.4 && {TIME}")
    if page.value(STATE) != "making":
        sys.exit("the video was done before it played; give it a longer voice")
    says(f"it plays while it is made: from {first:.2f} to {second:.2f} s")
    page.until("document.querySelector('#lv-progress p').innerText.includes('left')")
    page.until("document.querySelector('#lv-memory img')")


def take_picture(page: Page, picture: Path) -> None:
    """Of the page as far as the history, while a video plays."""
    page.call("Emulation.setDeviceMetricsOverride", width=1280, height=1130, deviceScaleFactor=1, mobile=False)
    page.value("window.scrollTo(0, 0)")
    page.until(f"{TIME} > 1")
    page.until("document.querySelectorAll('.lv-history tr').length >= 4")
    page.picture(picture)
    Image.open(picture).convert("RGB").quantize(256).save(picture, optimize=True)
    says(str(picture))


def cancel(page: Page) -> None:
    page.write("#lv-prompt textarea", "Another, which is cancelled")
    page.write("#lv-seed input", "7")
    page.click("#lv-make")
    page.until(f"{STATE} === 'making'")
    page.until("!document.querySelector('#lv-cancel').disabled")
    page.click("#lv-cancel")
    page.until(f"{STATE} === 'cancelled'", 120)
    says("one was cancelled")


def choose(page: Page, name: str, words: str) -> None:
    """In a list, the first whose text has these words."""
    page.click(f"#{name} input")
    listed = "[...document.querySelectorAll('li[role=option]')]"
    page.until(
        f"(found => found && (found.id = 'lv-found'))({listed}.find(each => each.innerText.includes({words!r})))"
    )
    page.click("#lv-found")
    page.until(f"document.querySelector('#{name} input').value.includes({words!r})")
    page.until("!document.querySelector('li[role=option]')")  # else the next would be found in this list


def take_up(page: Page) -> None:
    choose(page, "lv-chosen", "A person")
    page.click("#lv-take")
    page.until(f"document.querySelector('#lv-prompt textarea').value === {PROMPT!r}")
    page.until("document.querySelector('#lv-seed input').value === '420'")
    page.until("document.querySelector('#lv-size input').value === '128*128'")
    says("settings were taken up")
    page.write("#lv-seed input", "421")
    page.click("#lv-make")
    page.until(f"{STATE} === 'making'")


def compare(page: Page) -> None:
    for name in ("lv-a", "lv-b"):
        choose(page, name, "A person")
    page.click("#lv-compare")
    place = page.until("document.querySelector('#lv-compared a')?.href", 120)
    time.sleep(1)
    page.open(place)
    page.until("document.body?.innerText.includes('PSNR')")
    says("two were compared")


def says(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    main()
