"""Draws docs/top.svg and docs/top-wide.svg: `python docs/screenshots.py FILE SECONDS SECONDS`.

`morph top URL > FILE` records; SECONDS say which moment of the recording each shows.
"""

import asyncio
import sys
from pathlib import Path

from morphserve.morphcli.top.app import Top
from morphserve.morphcli.top.feeds import ReplayFeed
from morphserve.morphcli.top.recording import Recording

SIZES = {"top.svg": (80, 24), "top-wide.svg": (160, 50)}


async def draw(recording: Path, at_s: float, out: Path, size: tuple[int, int]) -> None:
    feed = ReplayFeed(Recording(recording))
    feed.recording.seek(at_s)
    app = Top(feed)
    async with app.run_test(size=size) as pilot:
        await pilot.press("space")
        await pilot.pause()
        out.write_text(app.export_screenshot(title="morph top", simplify=True), "utf-8")


def main() -> None:
    recording, moments = Path(sys.argv[1]), map(float, sys.argv[2:])
    for (name, size), at_s in zip(SIZES.items(), moments, strict=True):
        asyncio.run(draw(recording, at_s, Path(__file__).with_name(name), size))


if __name__ == "__main__":
    main()
