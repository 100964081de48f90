"""Chat templates against `transformers`: the same tokens, and the same contexts."""

import re
from collections import Counter

import numpy as np
import pytest

from tests.templates import Oracle, conversations, needs_shared, oracle_for, ours, refusal, sources
from tests.templates import the_day as the_day  # noqa
from torchtune_agent.data.chat_template import RenderError
from torchtune_agent.data.conversation import Conversation, Role
from torchtune_agent.data.templates import Sample

# What ends a turn, read off each template by hand. Mistral's is the eos token, which these tokenizers call <|im_end|>.
ENDS = {
    "deepseek": ["<｜end▁of▁sentence｜>"],
    "google-gemma": ["<end_of_turn>"],
    "meta-llama": ["<|eot_id|>"],
    "microsoft-Phi": ["<|end|>"],
    "openai-gpt-oss": ["<|return|>", "<|call|>"],
    "": ["<|im_end|>"],
}


NUM_PAIRS: Counter[str] = Counter()


@needs_shared
@pytest.mark.parametrize(("model", "name"), sources())
def test_tokens_equal_those_of_transformers(model, name):
    tokenizer, oracle = ours(model, name), oracle_for(model, name)
    for conversation in conversations():
        expected, said = refusal(oracle, conversation, tokenize=True)
        found, we_said = refusal(tokenizer.tokenize, conversation)
        assert (found, we_said) == (expected, said)
        NUM_PAIRS["refused" if said else "equal"] += 1


@needs_shared
def test_there_are_at_least_2000_pairs():
    assert len(conversations()) * len(sources()) >= 2000
    assert not NUM_PAIRS or NUM_PAIRS["equal"] > 1000 or NUM_PAIRS.total() < 2000


@needs_shared
@pytest.mark.parametrize(("model", "name"), sources())
def test_every_turn_is_trained_once_in_the_context_a_server_shows(model, name):
    tokenizer, oracle = ours(model, name), oracle_for(model, name)
    ends = next(ends for prefix, ends in ENDS.items() if (name or "").startswith(prefix))
    num_checked = 0
    for conversation in conversations():
        try:
            samples = tokenizer.samples(conversation)
        except RenderError as error:
            assert error.reason in ("template", "left_out")
            continue
        check_samples(samples, conversation, oracle, ends, name or "")
        num_checked += 1
    assert num_checked


def check_samples(
    samples: list[Sample], conversation: Conversation, oracle: Oracle, ends: list[str], name: str
) -> None:
    turns = [i for i, m in enumerate(conversation.messages) if m.role is Role.ASSISTANT]
    assert [turn.message for sample in samples for turn in sample.turns] == turns
    num_samples, before = 0, None
    for sample in samples:
        encoding = oracle.tokenizer.backend_tokenizer.encode(sample.text, add_special_tokens=False)
        assert sample.tokens == encoding.ids
        starts, stops = np.array(encoding.offsets).T
        for turn in sample.turns:
            context, through = oracle(conversation, turn.message, prompt=True), oracle(conversation, turn.message + 1)
            before_thinking = context.removesuffix("<think>\n")  # of a prompt that opens it: turns are rendered without
            thought = (conversation.messages[turn.message].reasoning or "").strip("\n")
            thinks = context != before_thinking and bool(thought.strip())
            assert turn.thinking == thinks and turn.as_served == (thinks or context == before_thinking)
            context = context if thinks else before_thinking
            assert sample.text[: turn.start] == context
            own = sample.text[turn.start : turn.stop]
            if thinks:
                rest = oracle.own_text(through, len(before_thinking), ends)
                assert through.startswith(before_thinking) and own == f"{thought}\n</think>\n\n{rest}"
            elif through.startswith(context):
                assert own == oracle.own_text(through, len(context), ends)
            else:  # the turn changes what stands before it
                assert any(m in name for m in ("istral", "gpt-oss", "Hermes")) or "Qwen3" in name or not name
                assert oracle.own_text(through, 0, ends).endswith(own) and own.endswith(tuple(ends))
                assert not re.match(r"\S*<\|im_start\|>|<\|start\|>", own)
            assert own.endswith(tuple(ends))
            assert (num_samples > 0 and context.startswith(before or "")) == (turn is not sample.turns[0])
            num_samples, before = num_samples + (turn is sample.turns[0]), context + own
            inside = np.flatnonzero((starts >= turn.start) & (stops <= turn.stop))
            assert inside.tolist() == list(range(turn.first_token, turn.stop_token))
    assert num_samples == len(samples)


@needs_shared
def test_a_template_that_keeps_history_gives_one_sample_with_the_tokens_of_the_whole():
    tokenizer = ours("qwen2_5", None)
    for conversation in conversations():
        ends = max(i for i, m in enumerate(conversation.messages) if m.role is Role.ASSISTANT)
        (sample,) = tokenizer.samples(conversation)
        assert sample.tokens == tokenizer.tokenize(Conversation(conversation.messages[: ends + 1], conversation.tools))


@needs_shared
@pytest.mark.parametrize(("model", "name"), sources())
def test_one_text_trains_the_same_turns(model, name):
    tokenizer = ours(model, name)
    for conversation in conversations()[::5]:
        try:
            samples = tokenizer.samples(conversation, history="single")
        except RenderError:
            continue
        (sample,) = samples
        assert sample.text == tokenizer.render(conversation)
        spans = [(turn.start, turn.end, turn.stop) for turn in sample.turns]
        assert spans == sorted(spans) and all(a[2] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
        for turn in sample.turns:
            message = conversation.messages[turn.message]
            own = sample.text[turn.start : turn.stop]
            assert "content" in turn.left_out or message.content.strip() in own
            assert all(call.name in own for call in message.tool_calls)
            assert not any(header in own for header in ("<|im_start|>", "[INST]", "<tool_response>"))
