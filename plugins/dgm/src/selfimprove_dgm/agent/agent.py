"""The entry: repairs the functions that it is given, or proposes a change of itself.

By hand: `python agent.py FILE.py FUNCTION` prints the file with the function repaired.
"""

import json
import os
import sys

import improve
import search

CHANNEL = 3


def send(message):
    """Send a request to the host; its reply, or None where it is refused."""
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[os.write(CHANNEL, line) :]
    data = b""
    while not data.endswith(b"\n"):
        data += os.read(CHANNEL, 1 << 16)
    return json.loads(data).get("reply")


def main():
    with open("config.json", encoding="utf-8") as f:
        config = json.load(f)
    if len(sys.argv) == 3:
        with open(sys.argv[1], encoding="utf-8") as f:
            sys.stdout.write(search.repair(f.read(), sys.argv[2], config).source + "\n")
        return
    with open("input.json", encoding="utf-8") as f:
        job = json.load(f)
    if job["mode"] == "improve":
        send({"call": "answer", "value": improve.proposal(job, config, send)})
        return
    repaired = {}
    for task in job["tasks"]:
        found = search.repair(task["source"], task["entry"], config)
        repaired[task["id"]] = {"source": found.source, "log": found.log}
        send({"call": "answer", "value": repaired})


if __name__ == "__main__":
    main()
