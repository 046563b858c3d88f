"""The cost of many machines, on paper: from the measured time of a batch and the bytes that ranks exchange.

One outer step of R ranks, each with the tasks of a measured case, takes

    C  +  2 (R - 1) / R  P b / B  +  2 ceil(log2 R) L

C: measured seconds of the case's batch on one machine, from bench/results/meta.json (two threads).
P: number of parameters, of b = 4 bytes. Every rank sends and receives 2 (R - 1) / R of the gradient, by halving and doubling.
B, L: assumed bandwidth and latency of the network, below.

Nothing overlaps, because the gradient is ready only when the sweep ends. Every rank keeps a whole batch: fewer tasks would
not be faster in proportion, because tasks are not split among threads and small networks' tasks share lanes. If the numbers
of ranks and tasks are powers of two, halving and doubling adds tasks in the order of csrc/README.md's global tree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bench.cases import CASES
from fastmaml.benchmark.peers.fastmaml_engine import NAME as ENGINE
from fastmaml.benchmark.text import markdown, number, share

RANKS = (1, 8, 64, 1024)
MODELLED = ("sinusoid-k5", "mlp-k5", "omniglot-t8-k5", "mini-s5-t2-k1")
NETWORKS = {"10 Gbit/s Ethernet": (1.25e9, 30e-6), "200 Gbit/s InfiniBand": (25e9, 2e-6)}  # bytes and seconds

# A LoRA adapter of a language model with the sizes of Llama 3 8B: rank 16 on all seven matrices of a layer.
LAYERS, WIDTH, KEYS, HIDDEN, RANK = 32, 4096, 1024, 14336, 16
ADAPTER = LAYERS * RANK * (2 * (WIDTH + WIDTH) + 2 * (WIDTH + KEYS) + 3 * (WIDTH + HIDDEN))
FROZEN = 8.0e9
TOKENS, STEPS = 10 * 512, 5  # tokens of a support set and of a query set; inner steps
RATE = 400e12  # operations per second of a large GPU in bfloat16


def exchange_s(ranks: int, parameters: float, network: str) -> float:
    """Seconds until all ranks have the sum of their gradients."""
    bandwidth, latency = NETWORKS[network]
    return 2 * (ranks - 1) / ranks * 4 * parameters / bandwidth + 2 * math.ceil(math.log2(ranks)) * latency


def parameters_of(name: str) -> int:
    return sum(p.numel() for p in CASES[name].model().parameters())


def table(content: Mapping[str, Any]) -> str:
    """Tasks per second of R ranks, and their share of R times one rank's, for the measured cases."""
    lines = []
    for name in (name for name in MODELLED if name in content["entries"]):
        entry = content["entries"][name]
        ours = next((row for row in entry["rows"] if row["name"] == ENGINE), None)
        if ours is None:
            continue
        seconds, tasks, size = ours["median_ms"] / 1e3, entry["tasks"], parameters_of(name)
        for network in NETWORKS:
            cells = []
            for ranks in RANKS:
                alone = seconds / (seconds + exchange_s(ranks, size, network))
                cells.append(f"{number(ranks * tasks / seconds * alone, 3)} ({share(alone)})")
            lines.append([name, f"{size:,}", str(tasks), f"{1e3 * seconds:.3g}", network, *cells])
    head = ["case", "P", "tasks a rank", "ms", "network", *(f"{r:,} ranks" for r in RANKS)]
    return f"{markdown(head, lines)}\n\n{adapter()}"


def adapter() -> str:
    """The adapter case as text."""
    # A frozen matrix has no weight gradient and no tangent: forward F, backward F, and both again for the tangents.
    forward = 2 * FROZEN * TOKENS
    task = STEPS * (2 + 4) * forward + 2 * forward
    seconds = task / RATE
    cells = []
    for ranks in RANKS[1:]:
        exchanges = [exchange_s(ranks, ADAPTER, network) for network in NETWORKS]
        cells.append(
            [
                f"{ranks:,}",
                *(f"{1e3 * s:.3g} ms" for s in exchanges),
                *(f"{100 * seconds / (seconds + s):.1f} %" for s in exchanges),
            ]
        )
    text = (
        f"A LoRA adapter of an 8-billion-parameter model (rank {RANK} on every matrix of {LAYERS} layers: {ADAPTER / 1e6:.1f} million "
        f"numbers, {4 * ADAPTER / 1e6:.0f} MB), K = {STEPS}, {TOKENS:,} support and as many query tokens a task, nothing measured: "
        f"forward F = {forward / 1e12:.0f} TFLOP; the frozen matrices have neither weight gradients nor tangents of their own, "
        f"so a gradient is 2F, "
        f"an inner step's Hessian product with recomputation 4F, a task {task / 1e15:.2f} PFLOP, {seconds:.1f} s at {RATE / 1e12:.0f} "
        f"TFLOP/s (the quadratic part of attention is left out). An engine that left the frozen matrices out of its vectors, as this one "
        f"does not yet, would hold {FROZEN * 2 / 1e9:.0f} GB of frozen weights in bfloat16, {STEPS + 1} adapters phi[k] "
        f"({(STEPS + 1) * 4 * ADAPTER / 1e9:.1f} GB) and one step's activations; unrolled autograd holds {STEPS}. One task a rank:"
    )
    names = list(NETWORKS)
    head = ["ranks", *(f"exchange, {n}" for n in names), *(f"of perfect, {n}" for n in names)]
    return f"{text}\n\n{markdown(head, cells)}"
