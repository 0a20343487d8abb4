"""Serves a run on loopback and asks it from many clients at once.

    python benchmarks/serving.py runs/quickstart/transformer_softmax \
        --out benchmarks/results/serving.json

Every client asks again as soon as it has its answer: half of the requests are chats of the bridge,
a quarter the same as a stream, a quarter completions of the LLM alone. Prints requests per second,
seconds by percentile, replies by status, and the server's memory.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parent.parent
CLIENTS, SECONDS = 64, 120
TOKENS = 16  # of a completion
WARM = 90  # seconds of the same load before the clock starts: every shape is compiled there


@contextmanager
def server(workdir: Path, *flags: str):
    """The process of `serve.py` on a free port, and its address; stopped by SIGTERM."""
    process = subprocess.Popen(
        [sys.executable, "serve.py", "--workdir", str(workdir), "--port=0", *flags], cwd=ROOT,
        stderr=subprocess.PIPE, text=True)
    try:
        yield process, _address(process)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _address(process: subprocess.Popen) -> str:
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"serving .* on (http://\S+)", line):
            return found[1]
    raise RuntimeError("the server did not start: " + "".join(lines[-5:]))


async def ask_for(base: str, clients: int, seconds: float) -> list[tuple[str, int, float]]:
    """What all clients got: (kind, status, seconds) of every request; 0 is a broken connection."""
    end, found = time.monotonic() + seconds, []
    async with httpx.AsyncClient(base_url=base, timeout=120, limits=httpx.Limits(
            max_connections=clients)) as client:
        about = (await client.get("/api/about")).json()
        await asyncio.gather(*(_client(client, about, random.Random(i), end, found)
                               for i in range(clients)))
    return found


async def _client(client, about, rng: random.Random, end: float, found: list) -> None:
    while time.monotonic() < end:
        kind = rng.choice(("chat", "chat", "stream", "llm"))
        texts = dict(zip(about["columns"], rng.choice(about["examples"])["columns"], strict=True))
        text = about["prompt"].format(**texts)
        begun = time.monotonic()
        try:
            status = await _ask(client, kind, about["model"], text)
        except httpx.HTTPError:
            status = 0
        found.append((kind, status, time.monotonic() - begun))
        if status != 200:
            await asyncio.sleep(1)


async def _ask(client, kind: str, model: str, text: str) -> int:
    if kind == "llm":
        body = {"model": "llm", "prompt": text, "max_tokens": TOKENS}
        return (await client.post("/v1/completions", json=body)).status_code
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    if kind == "chat":
        return (await client.post("/v1/chat/completions", json=body)).status_code
    async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as reply:
        lines = [line async for line in reply.aiter_lines()]
        whole = reply.status_code != 200 or lines[-2:] == ["data: [DONE]", ""] or (
            lines[-1:] == ["data: [DONE]"])
        return reply.status_code if whole else 0


async def watch(process: subprocess.Popen, seconds: float, every: float = 5) -> list[float]:
    """The server's resident memory in MiB, every few seconds."""
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        found.append(psutil.Process(process.pid).memory_info().rss / 2**20)
        await asyncio.sleep(min(every, max(0.0, end - time.monotonic())))
    return found


async def measure(process, base: str, clients: int, seconds: float, warm: float) -> dict[str, Any]:
    """Figures of a load: requests, seconds by percentile, statuses, memory."""
    at_start = psutil.Process(process.pid).memory_info().rss / 2**20
    await ask_for(base, clients, warm)
    found, memory = await asyncio.gather(ask_for(base, clients, seconds), watch(process, seconds))
    statuses = Counter(str(status) for _, status, _ in found)
    result = {"clients": clients, "seconds": seconds, "requests": len(found),
              "requests_per_second": len(found) / seconds, "statuses": dict(statuses),
              "memory_mib": {"at_start": at_start, "before": memory[0], "after": memory[-1],
                             "samples": memory}}
    for kind in ("all", "chat", "stream", "llm"):
        times = [x for name, status, x in found if status == 200 and kind in ("all", name)]
        cuts = statistics.quantiles(times, n=100)
        result[kind] = {"requests": len(times), "p50": cuts[49], "p99": cuts[98]}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from timing import machine

    about = machine()
    with server(args.workdir.resolve()) as (process, base):
        result = asyncio.run(measure(process, base, args.clients, args.seconds, WARM))
    text = json.dumps({**result, "model": args.workdir.name, "machine": about}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", "utf-8")
        write_page(json.loads(text))


def write_page(r: dict[str, Any]) -> None:
    """Puts the figures between their marks in docs/serving.md."""
    names = {"all": "all", "chat": "bridge, whole", "stream": "bridge, streamed",
             "llm": f"LLM alone, {TOKENS} tokens"}
    rows = ["| {} | {:,} | {:.2f} s | {:.2f} s |".format(
        name, *(r[kind][x] for x in ("requests", "p50", "p99"))) for kind, name in names.items()]
    replies = ", ".join(f"{count:,} with status {status}" if status != "0" else f"{count:,} broken"
                        for status, count in sorted(r["statuses"].items()))
    memory, m = r["memory_mib"], r["machine"]
    lines = [
        f"`benchmarks/serving.py`: {r['clients']} clients ask the quickstart's bridge "
        f"`{r['model']}` over loopback for {r['seconds']:.0f} s, each again as soon as it has its "
        "answer, after the programs were compiled under the same load. The clients share the "
        "machine with the server.", "",
        "| requests | number | p50 | p99 |", "| --- | --- | --- | --- |", *rows, "",
        f"{r['requests_per_second']:.0f} requests/s; replies: {replies}. The server's memory: "
        f"{memory['at_start']:.0f} MiB at its start, {memory['before']:.0f} before, "
        f"{memory['after']:.0f} after. Machine: {m['cores']} cores of {m['cpu']}, no accelerator; "
        f"Python {m['python']}, jax {m['jax']}. Load average at the start: "
        f"{m['load_average']:.1f}.", ""]
    wrapped = [x if x.startswith("|") else fill(x, 100) for x in lines]
    page, start, end = ROOT / "docs" / "serving.md", "<!-- serving -->\n", "<!-- /serving -->\n"
    head, rest = page.read_text("utf-8").split(start)
    page.write_text(head + start + "\n".join(wrapped) + end + rest.split(end)[1], "utf-8")


if __name__ == "__main__":
    main()
