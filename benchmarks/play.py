"""How fast the page of `ministeer play` answers: one person's sliders, then a classroom.

    python -m benchmarks.play       (about two minutes; needs the extra "test" and Chromium)

Sliders: the time from a move of the layer slider to the new map, in a real browser, median and 95th
percentile. Classroom: clients without a browser, each of which moves a slider three times, a second apart on
average, then draws completions, and begins again. A client whose text changes counts as an error.
"""

import argparse
import asyncio
import json
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

import httpx
from playwright.sync_api import expect, sync_playwright

from ministeer.play.engine import PRESETS

MOVE = """async ([layer, pause]) => {
  const map = document.getElementById("map"), slider = document.getElementById("layer-slide");
  const seen = () => map.querySelector(".outlined")?.dataset.row === String(layer);
  await new Promise((resolve) => setTimeout(resolve, pause));
  const start = performance.now();
  slider.value = layer;
  slider.dispatchEvent(new Event("input", { bubbles: true }));
  await new Promise((resolve) => new MutationObserver((_, observer) => {
    if (seen()) { observer.disconnect(); requestAnimationFrame(resolve); }
  }).observe(map, { childList: true }));
  return performance.now() - start;
}"""
GIVEN = {**PRESETS["weddings"], "n": 2, "max_new_tokens": 20, "temperature": 1, "top_p": 0.3,
         "freq_penalty": 1, "seed": 0}


def sliders(address, moves):
    """-> milliseconds of each move of the layer slider"""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        expect(page.locator("#next tbody tr").first.locator(".dot")).to_have_count(5, timeout=60_000)
        layers = [i for i in range(moves + 1) if i % 30 != 1]
        times = [page.evaluate(MOVE, [layer % 30, 100]) for layer in layers]
        browser.close()
    return times


async def person(http, number, until, looks, draws, errors):
    """One client of the classroom, with a prompt of its own, until the time is over."""
    given = {**GIVEN, "prompt": f"I am number {number} and", "client": f"client {number}".replace(" ", "-")}
    first, generator = None, random.Random(number)
    while time.monotonic() < until:
        for _ in range(3):
            start = time.monotonic()
            answer = await http.post("/look", json={**given, "layer": generator.randrange(30)})
            if answer.status_code != 200:
                errors.append(answer.text[:100])
            looks.append(time.monotonic() - start)
            await asyncio.sleep(generator.uniform(0.5, 1.5))
        start, texts = time.monotonic(), {}
        async with http.stream("POST", "/complete", json=given) as answer:
            async for line in answer.aiter_lines():
                event = json.loads(line.removeprefix("data: ")) if line else {}
                if "message" in event:
                    errors.append(event["message"])
                for column, i, text, _ in event.get("step", []):
                    texts[column, i] = texts.get((column, i), "") + text
        first = first or texts
        if not texts or texts != first:
            errors.append(f"client {number} got another text")
        draws.append(time.monotonic() - start)


async def classroom(address, clients, seconds):
    looks, draws, errors = [], [], []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as http:
        until = time.monotonic() + seconds
        await asyncio.gather(*(person(http, i, until, looks, draws, errors) for i in range(clients)))
    return looks, draws, errors


def memory(process):
    """The most memory that a process has held, in MiB."""
    with open(f"/proc/{process.pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) // 1024 for line in file if line.startswith("VmHWM"))


def row(name, seconds):
    ordered = sorted(seconds)
    p95 = ordered[int(0.95 * (len(ordered) - 1))]
    print(f"| {name} | {len(ordered)} | {statistics.median(ordered):.3f} s | {p95:.3f} s |", flush=True)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.play", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=100)
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    command = [sys.executable, "-m", "ministeer", "play", "--no-browser", "--port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://\S+", process.stdout.readline())[0]
        print("| what | answers | median | 95th percentile |\n|---|---|---|---|")
        row("move of the layer slider, one browser", [ms / 1000 for ms in sliders(address, args.moves)])
        alone = memory(process)
        looks, draws, errors = asyncio.run(classroom(address, args.clients, args.seconds))
        row(f"move of a slider, {args.clients} clients", looks)
        row(f"2 completions in each column, {args.clients} clients", draws)
        print(f"\nErrors: {len(errors)}. Memory of the server: {alone} MiB after one browser, "
              f"{memory(process)} MiB after {args.clients} clients.")
        print(*dict.fromkeys(errors), sep="\n")
    finally:
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait()
        print(f"Ctrl-C ended the server after {time.monotonic() - start:.1f} s.")


if __name__ == "__main__":
    main()
