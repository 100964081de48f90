"""Naive truths: what the product's numbers and tags must be, written from the documents and without its code.

Slow and plain on purpose. The only thing taken from the package is the TokenClass enum.
"""

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import nn

from torchtune_agent.data.token_class import TokenClass

IGNORE_INDEX = -100
MAX_PERPLEXITY = 1e6

GROUPS = {
    "overall": {"REASONING", "THINK", "CALL_SYNTAX", "CALL_NAME", "ARG_NAME", "ARG_VALUE"},
    "reasoning": {"REASONING", "THINK"},
    "tool_call": {"CALL_SYNTAX", "CALL_NAME", "ARG_NAME", "ARG_VALUE"},
    "think": {"THINK"},
    "call_syntax": {"CALL_SYNTAX"},
    "call_name": {"CALL_NAME"},
    "arg_name": {"ARG_NAME"},
    "arg_value": {"ARG_VALUE"},
    "stop": {"SPECIAL"},
}

Tags = list[tuple[TokenClass, int]]  # class and call index of every character


def token_statistics(logits_row: Sequence[float], label: int, entropy_k: int) -> dict[str, float]:
    """Everything that is measured at one token."""
    highest = max(logits_row)
    weights = [math.exp(logit - highest) for logit in logits_row]
    total = math.fsum(weights)
    p = sorted((weight / total for weight in weights), reverse=True)
    return {
        "nll": highest + math.log(total) - logits_row[label],
        "entropy": sum(-x * math.log2(x) for x in (p[0], 1 - p[0]) if x > 0),
        "topk_entropy": _nats([*p[:entropy_k], math.fsum(p[entropy_k:])]),
        "exact_entropy": _nats(p),
        **{f"top{k}_prob": math.fsum(p[:k]) for k in (1, 2, 5, 10)},
        "correct": float(logits_row.index(highest) == label),
    }


def _nats(outcomes: list[float]) -> float:
    return math.fsum(-x * math.log(x) for x in outcomes if x > 0)


def logit_statistics(logits: torch.Tensor, labels: torch.Tensor, entropy_k: int = 10) -> dict[str, torch.Tensor]:
    """`token_statistics` of every row at once, from the whole softmax, for vocabularies that are too large for it."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    largest = p.topk(10).values
    mass = largest.cumsum(-1).clamp(max=1.0)
    rest = 1 - mass[:, entropy_k - 1]
    return {
        "nll": -log_p.gather(1, labels[:, None])[:, 0],
        "entropy": (torch.special.entr(largest[:, 0]) + torch.special.entr(1 - largest[:, 0])) / math.log(2),
        "topk_entropy": torch.special.entr(largest[:, :entropy_k]).sum(-1) + torch.special.entr(rest),
        "exact_entropy": torch.special.entr(p).sum(-1),
        **{f"top{k}_prob": mass[:, k - 1] for k in (1, 2, 5, 10)},
        "correct": (logits.argmax(-1) == labels).to(p.dtype),
    }


def class_means(
    tokens: Sequence[tuple[Sequence[float], int, TokenClass]], entropy_k: int = 10
) -> dict[str, dict[str, float]]:
    """Metrics per group over (logits row, label, class); a group without tokens is not there."""
    rows = [(token_statistics(list(row), label, entropy_k), kind.name) for row, label, kind in tokens]
    means = {}
    for group, names in GROUPS.items():
        own = [statistics for statistics, name in rows if name in names]
        if own:
            mean = {key: math.fsum(s[key] for s in own) / len(own) for key in own[0]}
            mean["accuracy"] = mean.pop("correct")
            mean["perplexity"] = min(math.exp(min(mean["nll"], 700)), MAX_PERPLEXITY)
            means[group] = {**mean, "num_tokens": float(len(own))}
    return means


def tag_text(
    text: str, truncated: bool, start: str = "<function=", end: str = "</function>", first_call: int = 0
) -> tuple[Tags, int]:
    """Class and call of every character of one assistant turn, and the index of the next call.

    A block is the specification's `<function=[^>]+>.*?</function>`, except that it also counts where the `>` of the
    name is missing, and that it may be open at the end of a truncated turn.
    """
    tags: Tags = [(TokenClass.REASONING, -1)] * len(text)
    opening = re.escape(start) + ("(?!>)" if start == "<function=" else "")
    closing = f"({re.escape(end)}|\\Z)" if truncated else f"({re.escape(end)})"
    call = first_call
    for block in re.finditer(f"{opening}.*?{closing}", text, re.DOTALL):
        classes = [TokenClass.CALL_SYNTAX] * len(text)
        _tag_block(text, block.start(), block.start(1), classes)
        for i in range(*block.span()):
            tags[i] = (classes[i], call)
        call += 1
    return tags, call


def _tag_block(text: str, begin: int, end: int, classes: list[TokenClass]) -> None:
    """Mark names and values of a block whose closing marker is at `end`; an unclosed one runs to there, or to the
    last </function> before it."""
    name = re.compile(r"<function=([^>]*)").search(text, begin, end)
    if name is not None:
        _mark(classes, name.span(1), TokenClass.CALL_NAME)
        begin = name.end()
    value = r"\n?(.*?)\n?</parameter>|\n?(.*(?=</function>)|.*)"
    for match in re.compile(f"<parameter=([^>]*)(?:>(?:{value}))?", re.DOTALL).finditer(text, begin, end):
        _mark(classes, match.span(1), TokenClass.ARG_NAME)
        _mark(classes, match.span(2), TokenClass.ARG_VALUE)
        _mark(classes, match.span(3), TokenClass.ARG_VALUE)


def _mark(classes: list[TokenClass], span: tuple[int, int], kind: TokenClass) -> None:
    for i in range(*span):
        classes[i] = kind


Conversation = tuple[Sequence[int], Sequence[int]]  # tokens and labels, one each; labels are not shifted


def train(
    model: nn.Module,
    steps: Sequence[Sequence[Conversation]],
    lr: float,
    weight_decay: float,
    max_norm: float | None = None,
    on_step: Callable[[int, list[torch.Tensor]], None] | None = None,
) -> list[float]:
    """Train `model` in place, one conversation at a time; the loss of every step.

    `on_step` is shown the step's number (from 1) and the logits [tokens, vocabulary] of each of its conversations.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    losses = []
    for number, conversations in enumerate(steps, start=1):
        num_tokens = sum(label != IGNORE_INDEX for _, labels in conversations for label in labels[1:])
        loss_sum, seen = 0.0, []
        for tokens, labels in conversations:
            logits = model(torch.tensor([list(tokens)]))[0].float()
            targets = torch.tensor(list(labels))[1:]
            loss = nn.functional.cross_entropy(logits[:-1], targets, ignore_index=IGNORE_INDEX, reduction="sum")
            (loss / num_tokens).backward()
            loss_sum += loss.item()
            seen.append(logits.detach())
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_sum / num_tokens)
        if on_step is not None:
            on_step(number, seen)
    return losses


def tag_by_decoding_every_token(
    tokens: Sequence[int],
    decode: Callable[[list[int]], str],
    blocks_of: Callable[[str], list[tuple[int, int, TokenClass]]],
) -> list[TokenClass]:
    """The slow way to class tokens: decode each alone, add up lengths, look through all blocks for every token.

    Wrong, too, where a token holds part of a character: it is here to compare speeds with.
    """
    pieces = [decode([token]) for token in tokens]
    blocks = blocks_of("".join(pieces))
    classes, position = [], 0
    for piece in pieces:
        kind = TokenClass.REASONING
        for start, end, block_kind in blocks:
            if start < position + len(piece) and position < end:
                kind = max(kind, block_kind)
        classes.append(kind)
        position += len(piece)
    return classes


def call_blocks(text: str) -> list[tuple[int, int, TokenClass]]:
    """Every call, name and value of the usual marked styles, by regular expressions."""
    patterns = [
        (r"<think>.*?</think>", 0, TokenClass.THINK),
        (r"<function=[^>]+>.*?</function>", 0, TokenClass.CALL_SYNTAX),
        (r"<tool_call>.*?</tool_call>", 0, TokenClass.CALL_SYNTAX),
        (r"<function=([^>]+)>", 1, TokenClass.CALL_NAME),
        (r"<parameter=([^>]+)>", 1, TokenClass.ARG_NAME),
        (r"<parameter=[^>]+>\n?(.*?)\n?</parameter>", 1, TokenClass.ARG_VALUE),
        (r'\{"name": "([^"]*)"', 1, TokenClass.CALL_NAME),
    ]
    return [
        (*match.span(group), kind)
        for pattern, group, kind in patterns
        for match in re.finditer(pattern, text, re.DOTALL)
    ]


def routed_feed_forward(
    x: torch.Tensor,
    router: torch.Tensor,
    gate: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    per_token: int,
    normalized: bool,
) -> tuple[torch.Tensor, list[int]]:
    """A mixture of experts, token by token, and how many tokens each expert had; stacks are [experts, out, in]."""
    num_tokens = [0] * len(router)
    outputs = []
    for token in x.reshape(-1, x.shape[-1]):
        scores = torch.softmax(router @ token, 0)
        best = sorted(range(len(router)), key=scores.tolist().__getitem__, reverse=True)[:per_token]
        total = sum(scores[expert] for expert in best) if normalized else 1.0
        output = torch.zeros_like(token)
        for expert in best:
            num_tokens[expert] += 1
            gated = gate[expert] @ token
            output = output + scores[expert] / total * (
                down[expert] @ (gated * torch.sigmoid(gated) * (up[expert] @ token))
            )
        outputs.append(output)
    return torch.stack(outputs).reshape(x.shape), num_tokens
