"""Tokens as `generate` makes them, turned into text piece by piece, for a whole batch of prompts."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

__all__ = ["BatchStreamer"]

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass(kw_only=True)
class _Stream:
    """One prompt's output: what has been said, and the tokens that may still belong to one character."""

    ids: list[int] = field(default_factory=list)
    start: int = 0  # tokens before this one are settled
    said: int = 0  # tokens of ids[start:] whose text has been handed on
    is_done: bool = False


class BatchStreamer(BaseStreamer):  # type: ignore[misc]
    """Hands on each prompt's text as soon as its last character is whole.

    Guarantees: `on_token(prompt, text)` is called once for each new token of each prompt (text may be ""), never after
    that prompt's end token but for one last call with what was still held back; it runs on the thread that generates.
    """

    def __init__(self, tokenizer: Any, end_ids: Collection[int], on_token: Callable[[int, str], None]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._on_token = on_token
        self._streams: list[_Stream] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompts [prompt, token] first, then a new token for each [prompt], or several for one [1, token]."""
        if not self._streams:
            self._streams = [_Stream() for _ in range(value.shape[0])]
            return
        if value.ndim > 1:
            for column in value.unbind(1):
                self.put(column)
            return
        for prompt, (stream, token) in enumerate(zip(self._streams, value.tolist(), strict=True)):
            if stream.is_done:
                continue
            stream.ids.append(token)
            stream.is_done = token in self._end_ids
            self._on_token(prompt, self._new_text(stream, is_last=stream.is_done))

    def end(self) -> None:
        """Hand on what was held back."""
        for prompt, stream in enumerate(self._streams):
            if not stream.is_done and (text := self._new_text(stream, is_last=True)):
                self._on_token(prompt, text)
        self._streams = []

    def _new_text(self, stream: _Stream, *, is_last: bool) -> str:
        """The text that the latest tokens add; decoded with those before, as spaces may hang on neighbours."""
        window = stream.ids[stream.start :]
        before, after = self._decode(window[: stream.said]), self._decode(window)
        if after.endswith(_INCOMPLETE) and not is_last:
            return ""
        stream.start, stream.said = stream.start + stream.said, len(window) - stream.said
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
