"""MoEdge's bundles beside PyTorch, onnxruntime-genai and llama.cpp: one run in which every engine takes its turn.

    python tests/benchmarks/side_by_side.py --threads 1 --rounds 8 \\
        --engine "dense torch=moedge:DENSE" --engine "dense int4=moedge:BUNDLES/dense/ort-cpu-int4" \\
        --engine "moe int4=moedge:BUNDLES/moe/ort-cpu-int4" --ratio "moe int4/dense int4" \\
        --engine "genai=genai:GENAI" --genai-python .venv-interop/bin/python \\
        --engine "llama.cpp=llama:MODEL.gguf" --node-modules FOLDER --tokenizer DENSE

Each engine is a process of its own and waits for its turn, so the programs need not share an environment:

* ``moedge`` a bundle, a checkpoint or a Hugging Face folder in `moedge.runtime.engines`; ``moedge@2`` runs 2 experts;
* ``genai`` a folder that onnxruntime-genai opens: a bundle, or what its own builder wrote (``python -m
  onnxruntime_genai.models.builder -i DENSE -o GENAI -p int4 -e cpu --extra_options int4_accuracy_level=4``);
* ``llama`` a GGUF file, by llama.cpp as node-llama-cpp carries it (``npm install node-llama-cpp`` in FOLDER).

Batch 1, greedy, end of text ignored; the choice of the token is timed. Every engine gets the same tokens of real text.
Wall-clock and CPU time of each process are recorded; with one thread CPU time is the fair clock of a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Turns = Callable[[list[int]], Iterator[list[float]]]
"""prompt -> [wall ms, CPU ms] of the first token, then of one token after the other, for as long as it is asked."""
CHUNK = 4
"""Decode steps in a row: all but the first find the caches as their own last step left them."""
LONGEST = 256
"""Most tokens after a prompt: genai wants to know before it starts."""


class Clock:
    """Wall-clock and CPU milliseconds since it was made or read last."""

    def __init__(self) -> None:
        self.last = (time.perf_counter(), time.process_time())

    def lap(self) -> list[float]:
        now = (time.perf_counter(), time.process_time())
        spent = [1e3 * (new - old) for new, old in zip(now, self.last, strict=True)]
        self.last = now
        return spent


def own(path: str, threads: int, top_k: int | None) -> Turns:
    """A bundle or a checkpoint in MoEdge's own engine, with ``top_k`` experts a layer instead of its own number."""
    import numpy as np

    from moedge.runtime.engines import open_engine

    engine = open_engine(path, threads=threads, last_logits=True, **({"top_k": top_k} if top_k else {}))

    def turns(ids: list[int]) -> Iterator[list[float]]:
        clock = Clock()
        step = engine.prefill(np.array([ids], dtype=np.int64))
        while True:
            token = int(step.logits[0, -1].argmax())
            yield clock.lap()
            clock = Clock()
            step = engine.decode(np.array([[token]], dtype=np.int64), step.cache)

    return turns


def genai(path: str, threads: int) -> Turns:
    """A folder in onnxruntime-genai."""
    import onnxruntime_genai as og

    config = og.Config(path)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def turns(ids: list[int]) -> Iterator[list[float]]:
        parameters = og.GeneratorParams(model)
        length = len(ids) + LONGEST
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        clock = Clock()
        generator = og.Generator(model, parameters)
        generator.append_tokens(ids)
        while True:
            generator.generate_next_token()
            yield clock.lap()
            clock = Clock()

    return turns


def serve(kind: str, path: str, threads: int) -> None:
    """Answer requests, a line each, until stdin ends: {"ids": a new prompt or none, "steps": tokens to time}."""
    top_k = int(kind.partition("@")[2] or 0) or None
    begin = genai(path, threads) if kind == "genai" else own(path, threads, top_k)
    print(json.dumps("ready"), flush=True)
    turns: Iterator[list[float]] = iter(())
    for line in sys.stdin:
        request = json.loads(line)
        if "ids" in request:
            turns = begin(request["ids"])
        print(json.dumps([next(turns) for _ in range(request["steps"])]), flush=True)


class Worker:
    """One engine in its own process."""

    def __init__(self, label: str, kind: str, path: str, options: argparse.Namespace) -> None:
        self.label = label
        here = Path(__file__).resolve()
        if kind == "llama":
            command = ["node", str(here.with_name("llama_cpp.mjs")), path, str(options.threads)]
        else:
            python = str(options.genai_python) if kind == "genai" else sys.executable
            command = [python, str(here), "--serve", kind, path, "--threads", str(options.threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        if options.node_modules:
            environment["MOEDGE_NODE_MODULES"] = str(options.node_modules.resolve())
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        if self.answer() != "ready":
            raise SystemExit(f"{label}: the worker did not start")

    def answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                return json.loads(line)
            except ValueError:  # some programs write notes to stdout
                print(f"{self.label}: {line.rstrip()}", file=sys.stderr)
        raise SystemExit(f"{self.label}: the worker ended with exit code {self.process.wait()}")

    def ask(self, steps: int, ids: list[int] | None = None) -> list[list[float]]:
        """Time ``steps`` tokens, after a new prompt if ``ids`` gives one (its first token included)."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"steps": steps} | ({"ids": ids} if ids else {})) + "\n")
        self.process.stdin.flush()
        return list(self.answer())

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def summarise(samples: dict[str, list[Any]], ratios: list[str], prompt: int, clock: int) -> dict[str, Any]:
    """Medians, tokens per second, and ratios of medians with 95 % intervals paired by round."""
    import numpy as np

    from moedge.runtime.bench.stats import bootstrap_ci

    first = {label: np.array([turn[0][clock] for turn in turns]) for label, turns in samples.items()}
    steps = {label: np.array([[lap[clock] for lap in turn[1:]] for turn in turns]) for label, turns in samples.items()}
    rows = {
        label: {
            "prefill_ms": float(np.median(first[label])),
            "decode_ms": float(np.median(steps[label])),
            "prefill_tokens_per_s": 1e3 * prompt / float(np.median(first[label])),
            "decode_tokens_per_s": 1e3 / float(np.median(steps[label])),
        }
        for label in samples
    }
    found = []
    for ratio in ratios:
        label, baseline = ratio.split("/")
        entry: dict[str, Any] = {"label": label, "baseline": baseline}
        for name, values in (("prefill", first), ("decode", steps)):
            fast, slow = values[label], values[baseline]

            def speedup(drawn: Any, fast: Any = fast, slow: Any = slow) -> Any:
                one, two = (np.median(values[drawn].reshape(len(drawn), -1), axis=1) for values in (slow, fast))
                return one / two

            entry[name] = float(np.median(slow) / np.median(fast))
            entry[f"{name}_ci95"] = bootstrap_ci(len(slow), speedup, seed=0)
        found.append(entry)
    return {"rows": rows, "ratios": found}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every comparison of engines takes."""
    parser.add_argument("--engine", action="append", default=[], metavar="LABEL=KIND:PATH")
    parser.add_argument("--ratio", action="append", default=[], metavar="LABEL/BASELINE")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further round begins")
    parser.add_argument("--genai-python", type=Path, help="Python of the environment that has onnxruntime-genai")
    parser.add_argument("--node-modules", type=Path, help="folder in which npm installed node-llama-cpp")
    parser.add_argument("--json", type=Path, help="also write every sample here")
    parser.add_argument("--serve", nargs=2, metavar=("KIND", "PATH"), help=argparse.SUPPRESS)


def main() -> None:
    """Start the workers, let them take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer cuts the text; random tokens without")
    parser.add_argument("--text", default="asset:wiki")
    add_options(parser)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve, options.threads)
        return
    if options.tokenizer:
        from moedge.runtime.text.windows import token_windows

        ids = token_windows(options.tokenizer, options.text, options.prompt, 1)[1][0].tolist()
    else:
        import numpy as np

        ids = np.random.default_rng(0).integers(0, 1000, options.prompt).tolist()
    result = compare(options.engine, options.ratio, ids, options)
    print_tables(result, options)


def compare(engines: list[str], ratios: list[str], ids: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """Let ``LABEL=KIND:PATH`` take turns; medians and ratios on both clocks, with every sample (written to --json)."""
    began = time.monotonic()
    workers: dict[str, Worker] = {}
    samples: dict[str, list[Any]] = {}
    try:
        for entry in engines:
            label, _, rest = entry.partition("=")
            kind, _, path = rest.partition(":")
            workers[label] = Worker(label, kind, path, options)
            workers[label].ask(3, ids)  # warms up; does not count
        labels = list(workers)
        samples = {label: [] for label in labels}
        print(f"{len(labels)} engines ready after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        for number in range(options.rounds):
            if time.monotonic() - began > options.budget:
                break
            shift = number % len(labels)
            order = labels[shift:] + labels[:shift]
            laps: dict[str, list[list[float]]] = {}
            for label in order:
                time.sleep(0.02)  # worker threads of the last one go to sleep
                laps[label] = workers[label].ask(1, ids)
            for past in range(0, options.decode, CHUNK):  # a slow second of the machine meets every engine
                for label in order:
                    time.sleep(0.03)  # other programs spin on for a while when they have answered
                    laps[label] += workers[label].ask(min(CHUNK, options.decode - past))
            for label in labels:
                samples[label].append(laps[label])
    finally:
        for worker in workers.values():
            worker.close()
    done = min(len(turns) for turns in samples.values())
    samples = {label: turns[:done] for label, turns in samples.items()}
    facts = {"engines": engines, "threads": options.threads, "prompt": len(ids), "rounds": done}
    clocks = {name: summarise(samples, ratios, len(ids), i) for i, name in enumerate(("wall", "cpu"))}
    result = {**facts, **clocks, "samples": samples}
    if options.json:
        options.json.write_text(json.dumps(result), encoding="utf-8")
    return result


def print_tables(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Both clocks' medians and ratios."""
    for name in ("wall", "cpu"):
        found = result[name]
        print(f"\n{name} time, {options.threads} threads, prompt {result['prompt']}, {result['rounds']} rounds")
        print(f"{'engine':24s} {'prefill ms':>10s} {'tokens/s':>9s} {'decode ms':>10s} {'tokens/s':>9s}")
        for label, row in found["rows"].items():
            print(
                f"{label:24s} {row['prefill_ms']:10.1f} {row['prefill_tokens_per_s']:9.1f} "
                f"{row['decode_ms']:10.2f} {row['decode_tokens_per_s']:9.1f}"
            )
        for ratio in found["ratios"]:
            said = [
                f"{part} x{ratio[part]:.2f} ({ratio[f'{part}_ci95'][0]:.2f} to {ratio[f'{part}_ci95'][1]:.2f})"
                for part in ("prefill", "decode")
            ]
            print(f"{ratio['label']} against {ratio['baseline']}: {', '.join(said)}")


if __name__ == "__main__":
    main()
