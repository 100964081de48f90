"""Train the tiny byte-level BPE tokenizer that goes with ToolWorld, from its train conversations only.

    python -m torchtune_agent.toolworld.train_tokenizer

It is deterministic: running it again writes identical files. A small vocabulary keeps the embedding of a model of a
million parameters small, and every byte is in the alphabet, so any text can be encoded and comes back unchanged.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from torchtune_agent.toolworld import TOKENIZER_DIR, ToolWorld

VOCAB_SIZE = 2048
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MODEL_MAX_LENGTH = 2048
# Worlds of (number of tools, number of conversations): names of many tools, and the default world's well covered.
CORPUS = ((2500, 3000), (200, 1000))

# ChatML; calls are written as ToolWorld writes them; tool results are one user turn, as for the Qwen2.5 models.
CHAT_TEMPLATE = """\
{%- if tools -%}
    {{- '<|im_start|>system\\n' -}}
    {%- if messages[0].role == 'system' -%}
        {{- messages[0].content + '\\n' -}}
    {%- endif -%}
    {{- 'You can call these tools:' -}}
    {%- for tool in tools -%}
        {{- '\\n' + (tool | tojson) -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if tools and loop.first and message.role == 'system' -%}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or loop.previtem.role != 'tool' -%}
            {{- '<|im_start|>user' -}}
        {%- endif -%}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
        {%- if loop.last or loop.nextitem.role != 'tool' -%}
            {{- '<|im_end|>\\n' -}}
        {%- endif -%}
    {%- else -%}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') -}}
        {%- for call in message.tool_calls or [] -%}
            {%- if message.content or not loop.first -%}
                {{- '\\n' -}}
            {%- endif -%}
            {{- '<function=' + call.function.name + '>\\n' -}}
            {%- for name, value in call.function.arguments.items() -%}
                {{- '<parameter=' + name + '>\\n' + (value if value is string else value | tojson) -}}
                {{- '\\n</parameter>\\n' -}}
            {%- endfor -%}
            {{- '</function>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def corpus() -> Iterator[str]:
    for num_tools, num_tasks in CORPUS:
        world = ToolWorld(num_tools)
        for index in range(num_tasks):
            record = world.task("train", index).conversation()
            yield "\n".join(f"{message['role']}\n{message['content']}" for message in record["messages"])
    # What the chat template adds around a tool's result.
    yield "\n<tool_response>\n\n</tool_response>\n" * 1000


def config() -> dict[str, object]:
    end_of_text, _, end_of_turn = SPECIAL_TOKENS
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": end_of_turn,
        "pad_token": end_of_text,
        "model_max_length": MODEL_MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    train().save(str(folder / "tokenizer.json"))
    text = json.dumps(config(), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train ToolWorld's tiny tokenizer.")
    parser.add_argument("--output", type=Path, default=TOKENIZER_DIR, help="folder to write the two files to")
    write(parser.parse_args().output)
