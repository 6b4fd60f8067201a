"""Off a terminal: one JSON line per look, which is also what a recording is made of."""

import sys
import time
from typing import TextIO

import msgspec

from morphserve.configs.errors import MorphError
from morphserve.morphcli.top.look import clean
from morphserve.morphcli.top.recording import Recording
from morphserve.morphcli.top.source import Away, Server, WantsKey


def write_states(server: Server, interval_s: float, out: TextIO) -> None:
    """Until it is interrupted or nobody reads; a server that is away is waited for.

    Raises MorphError if the server refuses the key.
    """
    said = ""
    while True:
        started = time.monotonic()
        try:
            state = msgspec.json.encode(clean(msgspec.json.decode(server.state())))
        except WantsKey as error:
            raise MorphError(str(error)) from error
        except (Away, msgspec.DecodeError) as error:
            if str(error) != said:
                print(f"{error}; trying again", file=sys.stderr, flush=True)
            said = str(error)
        else:
            said = ""
            print(state.decode(), file=out, flush=True)
        time.sleep(max(0.0, started + interval_s - time.monotonic()))


def write_recording(recording: Recording, out: TextIO) -> None:
    for line in recording.lines():
        print(line.decode(), file=out)
    out.flush()
