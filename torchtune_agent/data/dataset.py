"""AgentSFTDataset: conversations in, tokens with a class on every one out.

Everything is tokenized when the dataset is made for the first time, so that what cannot be trained is found, counted
and listed before the first step, and the number of steps is known. The tokens are kept on disk.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset
from torchtune.data import Message

from torchtune_agent.config import component, instantiate
from torchtune_agent.data import fingerprint
from torchtune_agent.data.cache import cache_folder, fetch
from torchtune_agent.data.control_tokens import Spelled
from torchtune_agent.data.conversation import Conversation
from torchtune_agent.data.encode import (
    ChatTemplateEncoder,
    Classifier,
    Encoded,
    MaskEncoder,
    TorchtuneEncoder,
    scale_classes,
)
from torchtune_agent.data.formats import FORMATS, convert, detect, rename_columns
from torchtune_agent.data.joined import SampleInfo
from torchtune_agent.data.quarantine import DataReport
from torchtune_agent.data.reasons import BadRecord
from torchtune_agent.data.served import TrainOn
from torchtune_agent.data.sources import Source, place
from torchtune_agent.data.spelled import SpelledTokens
from torchtune_agent.data.store import TokenStore
from torchtune_agent.data.tagging import CallMarkers, call_styles
from torchtune_agent.data.templates import ChatTemplateTokenizer
from torchtune_agent.data.token_class import REASONING_CLASSES, TOOL_CALL_CLASSES, TokenClass
from torchtune_agent.data.token_text import vocabulary
from torchtune_agent.data.tokenizing import tokenize_source
from torchtune_agent.data.validate import check
from torchtune_agent.data.windows import windows
from torchtune_agent.distributed import rank_from_environment
from torchtune_agent.errors import UserError, did_you_mean

IGNORE_INDEX = -100
OverLong = Literal["right", "drop", "turns"]


class AgentSFTTransform:
    """One record to its sample: `tokens`, `labels`, `mask`, `token_class`, `call_index`, `weights`, and the spec's
    `reasoning_mask` and `tool_call_mask`.

    Args:
        tokenizer: any torchtune tokenizer, or `chat_template_tokenizer`.
        format: how records are written: a name of `FORMATS`, "auto", or the dotted path of a function.
        column_map: renames columns before they are read: {the format's name: the file's name}.
        message_transform: a torchtune message transform, or its config, instead of a format.
        enable_token_classification: tell calls and reasoning apart.
        train_on: "all" assistant turns, the "last", or only those with `train: true` ("explicit").
        train_on_tool_calls_only: train only the tokens of tool calls (and the end of turns that have one).
        train_on_reasoning_only: train only the tokens outside of tool calls (and the end of turns that have one).
        class_weights: {class: weight} of the loss, for example {arg_value: 2.0}.
        control_tokens: what to do with data that spells a control token: encode it as "text", or "refuse" the record.
            By default what `chat_template_tokenizer` was told, and "text" with other tokenizers.
        call_style: how calls are written in the assistant's text: a name of `tagging.STYLES`, "auto", or a dotted path.
        tool_call_start_token, tool_call_end_token: the texts that open and close a call, instead of a style.
        max_seq_len: the most tokens in a sample; the tokenizer's `max_seq_len` holds as well.
        over_long: what becomes of longer ones: cut on the "right", "drop", or windows of whole "turns".
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        format: str = "auto",
        column_map: Mapping[str, str] | None = None,
        message_transform: Any = None,
        enable_token_classification: bool = True,
        train_on: TrainOn = "all",
        train_on_tool_calls_only: bool = False,
        train_on_reasoning_only: bool = False,
        class_weights: Mapping[str, float] | None = None,
        control_tokens: Spelled | None = None,
        call_style: str = "auto",
        tool_call_start_token: str | None = None,
        tool_call_end_token: str | None = None,
        max_seq_len: int | None = None,
        over_long: OverLong = "right",
    ) -> None:
        _one_of("train_on", train_on, ("all", "last", "explicit"))
        _one_of("over_long", over_long, ("right", "drop", "turns"))
        if control_tokens is not None:
            _one_of("control_tokens", control_tokens, ("text", "refuse"))
        if max_seq_len is not None and max_seq_len < 1:
            raise UserError(f"dataset.max_seq_len={max_seq_len}: must be at least 1.")
        limits = [limit for limit in (max_seq_len, tokenizer.max_seq_len) if limit is not None]
        self.max_seq_len: int | None = min(limits, default=None)
        self._over_long = over_long
        self._weights = _class_weights(
            class_weights, train_on_tool_calls_only, train_on_reasoning_only, enable_token_classification
        )
        self._format = format if format == "auto" or format in FORMATS else _format_of_user(format)
        self._column_map = dict(column_map or {})
        self._message_transform = (
            instantiate(message_transform, "dataset.message_transform")
            if isinstance(message_transform, Mapping)
            else message_transform
        )
        self._classified = enable_token_classification
        markers = _markers(tool_call_start_token, tool_call_end_token)
        style = "custom" if markers else call_style
        call_styles(style, markers)  # refuses an unknown one
        self._tokenizer = tokenizer
        self._options = {
            "format": self._format,
            "column_map": self._column_map,
            "message_transform": _with_component(message_transform),
            "classified": enable_token_classification,
            "train_on": train_on,
            "control_tokens": control_tokens,
            "weights": {kind.name: weight for kind, weight in self._weights.items()},
            "style": component(style, "dataset.call_style") if "." in style else style,
            "markers": markers and [markers.start, markers.end],
            "max_seq_len": self.max_seq_len,
            "over_long": over_long,
        }

        def encoder(limit: int | None) -> ChatTemplateEncoder | TorchtuneEncoder | MaskEncoder:
            chat = isinstance(tokenizer, ChatTemplateTokenizer) and self._message_transform is None
            if not self._classified and not chat:
                return MaskEncoder(tokenizer, _spelled(tokenizer, control_tokens), train_on, limit)
            classifier = Classifier(vocabulary(tokenizer), limit, style, markers)
            if chat:
                return ChatTemplateEncoder(tokenizer, classifier, train_on, control_tokens)
            return TorchtuneEncoder(tokenizer, classifier, train_on, control_tokens or "text")

        self._encoder = encoder(None)
        self._cutting_encoder = encoder(self.max_seq_len)

    @property
    def reads_conversations(self) -> bool:
        return self._message_transform is None

    def fingerprint(self) -> Any:
        """Of everything that samples depend on beside the record."""
        return [fingerprint.of_option(self._options), fingerprint.of_tokenizer(self._tokenizer)]

    def encode(self, record: Mapping[str, Any]) -> tuple[list[Encoded], str]:
        """The samples of one record and the format it was read as; BadRecord where there are none."""
        if self._message_transform is not None:
            assert not isinstance(self._cutting_encoder, ChatTemplateEncoder)
            messages = self._transformed(rename_columns(record, self._column_map))
            return self._finished(self._cutting_encoder.encode_messages(messages)), "messages"
        conversation, name = self.conversation(record)
        samples = self.encode_conversation(conversation)
        for sample in samples:
            sample.origin = str(conversation.metadata.get("source", ""))
        return samples, name

    def conversation(self, record: Mapping[str, Any]) -> tuple[Conversation, str]:
        """A record as a sound conversation, and the format it was read as. Not for records that a message transform
        reads."""
        record = rename_columns(record, self._column_map)
        name = detect(record) if self._format == "auto" else self._format
        conversation = convert(record, name)
        check(conversation)
        return conversation, name if isinstance(name, str) else name.__name__

    def _transformed(self, record: Mapping[str, Any]) -> list[Message]:
        """What the user's message transform makes of a record."""
        try:
            return self._message_transform(record)["messages"]
        except (KeyError, ValueError, TypeError, AttributeError, AssertionError) as error:
            name = type(self._message_transform).__name__
            raise BadRecord("wrong_type", f"{name} cannot read it ({type(error).__name__}: {error})") from error

    def encode_conversation(self, conversation: Conversation) -> list[Encoded]:
        """The samples of a conversation that is known to be sound; BadRecord where nothing in it can be trained."""
        return self._finished(self._samples(conversation))

    def _samples(self, conversation: Conversation) -> list[Encoded]:
        limit = self.max_seq_len
        if limit is None or self._over_long == "right":
            return self._cutting_encoder.encode(conversation)
        whole = self._encoder.encode(conversation)
        if all(len(sample.tokens) <= limit for sample in whole):
            return whole
        longest = max(len(sample.tokens) for sample in whole)
        if self._over_long == "drop":
            raise BadRecord("too_long", f"{longest:,} tokens, more than max_seq_len={limit:,}")

        def fits(part: Conversation) -> bool:
            return all(len(sample.tokens) <= limit for sample in self._encoder.encode(part))

        return [sample for part in windows(conversation, fits) for sample in self._cutting_encoder.encode(part)]

    def _finished(self, samples: list[Encoded]) -> list[Encoded]:
        """Samples with their class weights, without those that have nothing to train."""
        for sample in samples:
            if not self._classified:
                trained = np.isin(sample.token_class, REASONING_CLASSES + TOOL_CALL_CLASSES)
                sample.token_class[trained] = TokenClass.REASONING
                sample.call_index[:] = -1
            scale_classes(sample, self._weights)
            if self._weights:
                _drop_empty_ends(sample)
        kept = [sample for sample in samples if (sample.token_class[1:] != TokenClass.IGNORED).any()]
        if kept:
            return kept
        if any(sample.num_cut for sample in samples):
            raise BadRecord("too_long", f"no token to train within max_seq_len={self.max_seq_len}")
        raise BadRecord("nothing_to_train", "no token to train")

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        samples, _ = self.encode(record)
        if len(samples) > 1:
            raise UserError(f"this record makes {len(samples)} samples; use AgentSFTTransform.encode, which gives all.")
        return as_sample(samples[0])


def as_sample(encoded: Encoded) -> dict[str, Any]:
    """The sample torchtune's collators and ours take; labels are not shifted."""
    trained = encoded.token_class != TokenClass.IGNORED
    return {
        "tokens": encoded.tokens,
        "labels": np.where(trained, encoded.tokens, IGNORE_INDEX),
        "mask": ~trained,
        "token_class": encoded.token_class,
        "call_index": encoded.call_index,
        "weights": encoded.weights,
        "reasoning_mask": np.isin(encoded.token_class, REASONING_CLASSES),
        "tool_call_mask": np.isin(encoded.token_class, TOOL_CALL_CLASSES),
    }


def _one_of(key: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"dataset.{key}={value}: {did_you_mean(str(value), known)}")


def _format_of_user(path: str) -> Any:
    if "." not in path:
        raise UserError(f"dataset.format={path}: no such format. {did_you_mean(path, [*FORMATS, 'auto'])}")
    return component(path, "dataset.format")


def _spelled(tokenizer: Any, control_tokens: Spelled | None) -> SpelledTokens | None:
    """None where what this tokenizer makes of a text cannot be known."""
    try:
        return SpelledTokens(tokenizer, vocabulary(tokenizer), control_tokens or "text")
    except UserError:
        if control_tokens is None:
            return None
        raise


def _with_component(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return config
    return {key: component(value, "") if key == "_component_" else value for key, value in config.items()}


def _markers(start: str | None, end: str | None) -> CallMarkers | None:
    if start is None and end is None:
        return None
    return CallMarkers(start or "<function=", end or "</function>")


def _class_weights(
    weights: Mapping[str, float] | None, calls_only: bool, reasoning_only: bool, classified: bool
) -> dict[TokenClass, float]:
    """The weight of every class that does not weigh 1; "only" means that the other classes weigh nothing."""
    names = {kind.name.lower(): kind for kind in TokenClass if kind is not TokenClass.IGNORED}
    result: dict[TokenClass, float] = {}
    for name, weight in (weights or {}).items():
        if name not in names:
            raise UserError(f"dataset.class_weights.{name}: no such class. {did_you_mean(name, names)}")
        if weight < 0:
            raise UserError(f"dataset.class_weights.{name}={weight}: must be 0 or more.")
        result[names[name]] = float(weight)
    if calls_only and reasoning_only:
        raise UserError("dataset: train_on_tool_calls_only and train_on_reasoning_only leave nothing. Set one of them.")
    if calls_only or reasoning_only:
        result |= dict.fromkeys(REASONING_CLASSES if calls_only else TOOL_CALL_CLASSES, 0.0)
    if result and not classified:
        raise UserError("dataset: weights and choices of classes need enable_token_classification=True.")
    return result


def _drop_empty_ends(encoded: Encoded) -> None:
    """Stop training the end of every turn that has nothing else left to train."""
    classes = encoded.token_class
    alive = False
    for i, kind in enumerate(classes):
        if kind == TokenClass.SPECIAL:
            if not alive:
                classes[i], encoded.weights[i] = TokenClass.IGNORED, 0.0
            alive = alive and i + 1 < len(classes) and classes[i + 1] == TokenClass.SPECIAL
        elif kind != TokenClass.IGNORED:
            alive = True


class AgentSFTDataset(Dataset):
    """Conversations for supervised fine-tuning, every token tagged as reasoning or part of a tool call.

    Args:
        tokenizer: any torchtune tokenizer, or `chat_template_tokenizer`.
        source: "json" (the files in `data_files`), records in memory, or a name for `datasets.load_dataset`.
        data_files: files (JSON Lines, JSON, Parquet; also gzip and zstd), globs, folders, or a list of them.
        split: which split, for named sources.
        packed: read by the recipe, whose loader packs samples into sequences of the tokenizer's max_seq_len.
        max_bad_fraction: stop where more than this share of the records cannot be trained on.
        load_dataset_kwargs: further arguments of `datasets.load_dataset`.
        cache_dir: where tokens are kept ($TORCHTUNE_AGENT_CACHE, else ~/.cache/torchtune_agent). They are mapped from
            there, not loaded, and made again only where the data, the tokenizer or an option is no longer the same.

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
        format: str = "auto",
        column_map: Mapping[str, str] | None = None,
        message_transform: Any = None,
        enable_token_classification: bool = True,
        train_on: TrainOn = "all",
        train_on_tool_calls_only: bool = False,
        train_on_reasoning_only: bool = False,
        class_weights: Mapping[str, float] | None = None,
        control_tokens: Spelled | None = None,
        call_style: str = "auto",
        tool_call_start_token: str | None = None,
        tool_call_end_token: str | None = None,
        max_seq_len: int | None = None,
        over_long: OverLong = "right",
        max_bad_fraction: float = 0.01,
        load_dataset_kwargs: Mapping[str, Any] | None = None,
        cache_dir: str | None = None,
    ) -> None:
        self.has_token_classes = enable_token_classification
        self.transform = AgentSFTTransform(
            tokenizer,
            format=format,
            column_map=column_map,
            message_transform=message_transform,
            enable_token_classification=enable_token_classification,
            train_on=train_on,
            train_on_tool_calls_only=train_on_tool_calls_only,
            train_on_reasoning_only=train_on_reasoning_only,
            class_weights=class_weights,
            control_tokens=control_tokens,
            call_style=call_style,
            tool_call_start_token=tool_call_start_token,
            tool_call_end_token=tool_call_end_token,
            max_seq_len=max_seq_len,
            over_long=over_long,
        )
        self._records = Source(source, data_files, split, load_dataset_kwargs or {})
        self._store = _tokens(self._records, self.transform, cache_folder(cache_dir))
        self.report = DataReport.from_json(self._store.summary["report"])
        self.report.check(max_bad_fraction)

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return as_sample(self._store[index])

    def fingerprint(self) -> str:
        """Of all samples: equal ones mean equal samples, whatever file they are from."""
        return self._store.fingerprint()

    def conversations(self) -> Iterator[tuple[str, Conversation]]:
        """The sound conversations, read once more, and where their records stand. None where a message transform reads
        the records."""
        if not self.transform.reads_conversations:
            return
        for record in self._records.records():
            try:
                if record.problem is None:
                    yield record.where, self.transform.conversation(record.data)[0]
            except BadRecord:  # listed in the report
                continue

    @property
    def folder(self) -> Path | None:
        """Where the tokens are kept; None where they are in memory only."""
        return self._store.folder

    def where(self, index: int) -> str:
        """The record a sample was made of: file:line, or source[index]."""
        source, number = self._store.record_of(index)
        name, is_line = self._store.summary["sources"][source]
        return place(name, number, is_line)

    def info(self, index: int) -> SampleInfo:
        where = self.where(index)
        names = self._store.summary["names"]
        source = names[self._store.origin(index)] or where.rpartition(":")[0] or where.partition("[")[0]
        return SampleInfo(where, source, tuple(names[call] for call in self._store.calls(index)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in every sample."""
        return self._store.lengths

    @property
    def largest_token(self) -> int:
        return self._store.summary["largest_token"]


def _tokens(records: Source, transform: AgentSFTTransform, folder: Path) -> TokenStore:
    """The samples of all records, found in `folder` or put there; in memory where there is no telling whether they
    would be the same the next time."""
    summary: dict[str, Any] = {}
    try:
        parts = [fingerprint.of_code(), records.fingerprint(folder / "files"), transform.fingerprint()]
    except fingerprint.Unknown:
        quiet = rank_from_environment() != 0
        return TokenStore.in_memory(tokenize_source(records, transform, summary, quiet=quiet), summary)

    def write(place: Path) -> None:
        TokenStore.write(place, tokenize_source(records, transform, summary), summary)

    return fetch(folder, fingerprint.combine(parts), write)
