"""Pools of samples that differ in everything."""

import numpy as np

from torchtune_agent.selection import Pool

NUM, WIDTH = 83, 7
TOOLS = ("add", "find", "send", "né")


def pool(seed: int = 0, number: int = NUM, width: int = WIDTH) -> Pool:
    rng = np.random.default_rng(seed)
    call_loss = rng.gamma(2.0, size=number)
    call_loss[rng.random(number) < 0.3] = np.nan  # samples without a call
    return Pool(
        ids=[f"d.jsonl:{i + 1}" for i in range(number)],
        num_tokens=rng.integers(5, 500, number),
        losses={"overall": rng.gamma(2.0, size=number), "tool_call": call_loss},
        entropy=rng.gamma(2.0, size=number),
        error=rng.random(number),
        embeddings=(rng.standard_normal((number, width)) * rng.gamma(3.0, size=(number, 1))).astype(np.float32),
        tools=[tuple(rng.choice(TOOLS, rng.integers(0, 3), p=[0.7, 0.2, 0.08, 0.02])) for _ in range(number)],
        sources=list(rng.choice(["web", "lab", "log"], number, p=[0.8, 0.15, 0.05])),
    )
