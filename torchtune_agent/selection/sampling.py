"""What the model would answer: several drawn answers to every prompt, and how unsure it was of each token.

Every answer draws its tokens with numbers of its own, which follow from the seed, the prompt and the answer alone. So
answers are the same on any number of ranks. There is no cache of keys: each token costs a pass over its text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from torchtune_agent.data.collate import Collator
from torchtune_agent.data.dataset import IGNORE_INDEX
from torchtune_agent.distributed import World
from torchtune_agent.losses import head
from torchtune_agent.losses.output import at_output

_CHUNKING = head.Chunking()


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn: `number` of them to a prompt, each of at most `max_tokens`."""

    number: int = 4
    max_tokens: int = 64
    temperature: float = 1.0
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    tokens: list[int]  # without the one that ended it
    entropy: float  # mean over its tokens, and the one that ended it, in nats


def draw_answers(
    model: TransformerDecoder,
    prompts: Sequence[np.ndarray],
    collator: Collator,
    stops: frozenset[int],
    world: World,
    drawing: Drawing,
) -> list[list[Answer]]:
    """`drawing.number` answers to every prompt, on every rank. Every rank calls it."""
    wanted = [(prompt, answer) for prompt in range(len(prompts)) for answer in range(drawing.number)]
    batches = [wanted[i : i + drawing.batch_size] for i in range(0, len(wanted), drawing.batch_size)]
    own: dict[tuple[int, int], Answer] = {}
    bar = tqdm(total=len(batches), desc="Answering", unit="batch", disable=not world.is_main)
    was_training = model.training
    model.eval()
    for first in range(0, len(batches), world.dp_size):
        mine = batches[first + world.dp_rank] if first + world.dp_rank < len(batches) else []
        own |= dict(zip(mine, _answers(model, prompts, mine, collator, stops, world, drawing), strict=True))
        bar.update(min(world.dp_size, len(batches) - first))
    bar.close()
    model.train(was_training)
    found = {place: answer for part in world.gather(own) for place, answer in part.items()}
    return [[found[prompt, answer] for answer in range(drawing.number)] for prompt in range(len(prompts))]


@torch.no_grad()
def _answers(
    model: TransformerDecoder,
    prompts: Sequence[np.ndarray],
    places: Sequence[tuple[int, int]],
    collator: Collator,
    stops: frozenset[int],
    world: World,
    drawing: Drawing,
) -> list[Answer]:
    texts = [list(map(int, prompts[prompt])) for prompt, _ in places]
    numbers = [np.random.default_rng([drawing.seed, *place]).random(drawing.max_tokens) for place in places]
    entropies: list[list[float]] = [[] for _ in places]
    going = [True] * len(places)
    for step in range(drawing.max_tokens):
        if not world.any(any(going)):  # all ranks take part in every pass of a model in shards
            break
        rows = [row for row, is_going in enumerate(going) if is_going]
        tokens, entropy = _next_tokens(
            model, [texts[row] for row in rows], [numbers[row][step] for row in rows], collator, world, drawing
        )
        for row, token, own in zip(rows, tokens, entropy, strict=True):
            entropies[row].append(own)
            going[row] = token not in stops
            if going[row]:
                texts[row].append(token)
    return [
        Answer(text[len(prompts[prompt]) :], float(np.mean(own)))
        for text, (prompt, _), own in zip(texts, places, entropies, strict=True)
    ]


def _next_tokens(
    model: TransformerDecoder,
    texts: Sequence[list[int]],
    numbers: Sequence[float],
    collator: Collator,
    world: World,
    drawing: Drawing,
) -> tuple[list[int], list[float]]:
    """The next token of every text, and the entropy it was drawn with."""
    # A label, whichever, behind the last token has that position's logits made, and no others.
    samples = [{"tokens": [*text, 0], "labels": [IGNORE_INDEX] * len(text) + [0]} for text in texts]
    batch = collator([[sample] for sample in samples]).to(world.device)
    drawn = torch.tensor(np.array(numbers), dtype=torch.float64, device=world.device)

    def measure(at: head.Projection) -> tuple[torch.Tensor | None, ...]:
        tokens, entropies = [], []
        for rows, logits in _CHUNKING.logits(at):
            log_p = torch.log_softmax(logits.double() / drawing.temperature, 1)
            p = log_p.exp()
            entropies.append(-(p * log_p).sum(1))
            tokens.append(torch.searchsorted(p.cumsum(1), drawn[rows, None])[:, 0].clamp(max=logits.shape[1] - 1))
        if not tokens:
            return None, None
        return torch.cat(tokens), torch.cat(entropies)

    tokens, entropies = at_output(model, batch, measure)
    if tokens is None or entropies is None:
        return [], []
    return tokens.tolist(), entropies.tolist()
