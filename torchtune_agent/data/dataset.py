"""AgentSFTDataset: conversations in, tokens with a class on every one out.

Everything is tokenized when the dataset is made, so that what cannot be trained is found, counted and
listed before the first step, and the number of steps is known.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from torchtune.data import Message
from tqdm import tqdm

from torchtune_agent.config import instantiate
from torchtune_agent.data.encode import ConversationEncoder, Encoded
from torchtune_agent.data.messages import read_messages, to_torchtune
from torchtune_agent.data.sources import read_records
from torchtune_agent.data.tagging import CallMarkers
from torchtune_agent.data.token_class import REASONING_CLASSES, TOOL_CALL_CLASSES, TokenClass
from torchtune_agent.data.token_text import vocabulary
from torchtune_agent.distributed import rank_from_environment
from torchtune_agent.errors import UserError

IGNORE_INDEX = -100
_NUM_LISTED = 5  # untrainable records named on screen; all are counted


class AgentSFTTransform:
    """One record to one sample: `tokens`, `labels`, `mask`, `token_class`, `call_index`, and the spec's two masks.

    Args:
        tokenizer: any torchtune tokenizer, or `chat_template_tokenizer`.
        message_transform: a torchtune message transform, or its config; by default `messages` in OpenAI form.
        enable_token_classification: tell calls and reasoning apart.
        train_on_tool_calls_only: train only the tokens of tool calls (and the end of turns that have one).
        train_on_reasoning_only: train only the tokens outside of tool calls (and the end of turns that have one).
        tool_call_start_token: the text that opens a tool call.
        tool_call_end_token: the text that closes it.
        max_seq_len: cut conversations to this many tokens; the tokenizer's `max_seq_len` holds as well.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        message_transform: Any = None,
        enable_token_classification: bool = True,
        train_on_tool_calls_only: bool = False,
        train_on_reasoning_only: bool = False,
        tool_call_start_token: str = "<function=",
        tool_call_end_token: str = "</function>",
        max_seq_len: int | None = None,
    ) -> None:
        only = [
            ("train_on_tool_calls_only", train_on_tool_calls_only),
            ("train_on_reasoning_only", train_on_reasoning_only),
        ]
        chosen = [name for name, on in only if on]
        if len(chosen) == 2:
            raise UserError(
                "dataset: train_on_tool_calls_only and train_on_reasoning_only leave nothing. Set one of them."
            )
        if chosen and not enable_token_classification:
            raise UserError(f"dataset.{chosen[0]}: needs enable_token_classification=True.")
        if max_seq_len is not None and max_seq_len < 1:
            raise UserError(f"dataset.max_seq_len={max_seq_len}: must be at least 1.")
        limits = [limit for limit in (max_seq_len, tokenizer.max_seq_len) if limit is not None]
        self._tokenizer = tokenizer
        self._max_seq_len = min(limits, default=None)
        self._message_transform = (
            instantiate(message_transform, "dataset.message_transform")
            if isinstance(message_transform, Mapping)
            else message_transform
        )
        markers = CallMarkers(tool_call_start_token, tool_call_end_token)
        self._encoder: ConversationEncoder | None = None
        if enable_token_classification:
            self._encoder = ConversationEncoder(tokenizer, vocabulary(tokenizer), self._max_seq_len, markers)
        self._dropped: tuple[TokenClass, ...] = ()
        if train_on_tool_calls_only:
            self._dropped = REASONING_CLASSES
        elif train_on_reasoning_only:
            self._dropped = TOOL_CALL_CLASSES

    def encode(self, record: Mapping[str, Any]) -> Encoded:
        """The tokens of one record and the class of each."""
        messages = self._messages(record)
        if self._encoder is None:
            return _encode_without_classes(messages, self._tokenizer, self._max_seq_len)
        encoded = self._encoder.encode(messages)
        if self._dropped:
            _drop_classes(encoded, self._dropped)
        return encoded

    def _messages(self, record: Mapping[str, Any]) -> list[Message]:
        if self._message_transform is not None:
            return self._message_transform(record)["messages"]
        return to_torchtune(read_messages(record), self._tokenizer)

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return as_sample(self.encode(record))


def as_sample(encoded: Encoded) -> dict[str, Any]:
    """The sample torchtune's collators and ours take; labels are not shifted."""
    trained = encoded.token_class != TokenClass.IGNORED
    return {
        "tokens": encoded.tokens,
        "labels": np.where(trained, encoded.tokens, IGNORE_INDEX),
        "mask": ~trained,
        "token_class": encoded.token_class,
        "call_index": encoded.call_index,
        "reasoning_mask": np.isin(encoded.token_class, REASONING_CLASSES),
        "tool_call_mask": np.isin(encoded.token_class, TOOL_CALL_CLASSES),
    }


def _encode_without_classes(messages: list[Message], tokenizer: Any, max_seq_len: int | None) -> Encoded:
    """Torchtune's own mask, every trained token in one class."""
    tokens, mask = tokenizer.tokenize_messages(messages)
    kept = len(tokens) if max_seq_len is None else min(len(tokens), max_seq_len)
    classes = np.where(np.asarray(mask[:kept]), TokenClass.IGNORED, TokenClass.REASONING).astype(np.uint8)
    return Encoded(np.asarray(tokens[:kept], np.int32), classes, np.full(kept, -1, np.int32), len(tokens) - kept)


def _drop_classes(encoded: Encoded, dropped: tuple[TokenClass, ...]) -> None:
    """Stop training `dropped`, and the end of every turn that has nothing else left to train."""
    classes = encoded.token_class
    classes[np.isin(classes, dropped)] = TokenClass.IGNORED
    encoded.call_index[classes == TokenClass.IGNORED] = -1
    alive = False
    for i, kind in enumerate(classes):
        if kind == TokenClass.SPECIAL:
            if not alive:
                classes[i] = TokenClass.IGNORED
            alive = alive and i + 1 < len(classes) and classes[i + 1] == TokenClass.SPECIAL
        elif kind != TokenClass.IGNORED:
            alive = True


@dataclass
class DataReport:
    """What became of the records read: every one is trained, or counted here with its reason."""

    num_read: int = 0
    num_trained: int = 0
    num_cut: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def leave_out(self, where: str, reason: str) -> None:
        self.left_out[reason] += 1
        if len(self.examples) < _NUM_LISTED:
            self.examples.append(f"{where}: {reason}")

    def __add__(self, other: "DataReport") -> "DataReport":
        return DataReport(
            self.num_read + other.num_read,
            self.num_trained + other.num_trained,
            self.num_cut + other.num_cut,
            self.num_tokens + other.num_tokens,
            self.num_supervised + other.num_supervised,
            self.left_out + other.left_out,
            (self.examples + other.examples)[:_NUM_LISTED],
        )

    def lines(self) -> list[str]:
        share = self.num_supervised / max(1, self.num_tokens)
        lines = [
            f"{self.num_trained:,} conversations, {self.num_tokens:,} tokens, "
            f"{self.num_supervised:,} of them trained ({share:.0%})"
        ]
        if self.num_cut:
            lines.append(f"{self.num_cut:,} conversations cut to max_seq_len")
        lines += [f"{count:,} of {self.num_read:,} records left out: {why}" for why, count in self.left_out.items()]
        return lines + [f"  {example}" for example in self.examples]


class AgentSFTDataset(Dataset):
    """Conversations for supervised fine-tuning, every token tagged as reasoning or tool call.

    Args:
        tokenizer: any torchtune tokenizer, or `chat_template_tokenizer`.
        source: "json" (JSON Lines or a JSON list in `data_files`), records in memory, or a name for
            `datasets.load_dataset`.
        data_files: path, glob, or list of them.
        split: which split, for named sources.
        packed: read by the recipe, whose loader packs conversations into sequences of the tokenizer's max_seq_len.
        column_map: {"messages": name of the column that holds them}.
        load_dataset_kwargs: further arguments of `datasets.load_dataset`.

    The other arguments are those of `AgentSFTTransform`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        source: str | Sequence[Mapping[str, Any]] = "json",
        data_files: str | Sequence[str] | None = None,
        split: str = "train",
        packed: bool = False,
        message_transform: Any = None,
        column_map: Mapping[str, str] | None = None,
        enable_token_classification: bool = True,
        train_on_tool_calls_only: bool = False,
        train_on_reasoning_only: bool = False,
        tool_call_start_token: str = "<function=",
        tool_call_end_token: str = "</function>",
        max_seq_len: int | None = None,
        load_dataset_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.report = DataReport()
        self._transform = AgentSFTTransform(
            tokenizer,
            message_transform=message_transform,
            enable_token_classification=enable_token_classification,
            train_on_tool_calls_only=train_on_tool_calls_only,
            train_on_reasoning_only=train_on_reasoning_only,
            tool_call_start_token=tool_call_start_token,
            tool_call_end_token=tool_call_end_token,
            max_seq_len=max_seq_len,
        )
        column = dict(column_map or {}).get("messages", "messages")
        records = read_records(source, data_files, split, **dict(load_dataset_kwargs or {}))
        self._samples = self._encode_all(records, column)

    def _encode_all(self, records: Any, column: str) -> list[Encoded]:
        samples: list[Encoded] = []
        quiet = rank_from_environment() != 0
        for record in tqdm(records, desc="Tokenizing", unit=" records", disable=quiet, leave=False, delay=1):
            self.report.num_read += 1
            data = record.data if column == "messages" else {**record.data, "messages": record.data.get(column)}
            try:
                encoded = self._transform.encode(data)
            except UserError as error:
                raise UserError(f"{record.where}: {str(error).rstrip('.')}.") from error
            num_supervised = int((encoded.token_class[1:] != TokenClass.IGNORED).sum())
            if num_supervised == 0:
                self.report.leave_out(
                    record.where, "no token to train" + (" within max_seq_len" if encoded.num_cut else "")
                )
                continue
            samples.append(encoded)
            self.report.num_trained += 1
            self.report.num_cut += encoded.num_cut > 0
            self.report.num_tokens += len(encoded.tokens)
            self.report.num_supervised += num_supervised
        return samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return as_sample(self._samples[index])

    @property
    def lengths(self) -> list[int]:
        """Tokens in every sample."""
        return [len(sample.tokens) for sample in self._samples]

    @property
    def largest_token(self) -> int:
        return max(int(sample.tokens.max()) for sample in self._samples)
