"""A tokenizer for text that nobody trained: one token per byte, and bytes behind every id of the vocabulary.

Byte-level BPE without merges, in the files that transformers' fast tokenizers read. The vocabulary is the 256 single
bytes, then all pairs in order, then triples, until it is full: encoding uses single bytes only, but any id a random
model picks decodes to something.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["tokenizer_files"]

#: The published ids of BERT's special tokens.
_BERT_SPECIALS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}


def tokenizer_files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """File name to JSON content for a text model's configuration; empty for a model without a vocabulary."""
    if "vocab_size" not in config:
        return {}
    specials, named = _specials(config)
    bert = config["model_type"] == "bert"
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True,
            }
            for token, number in specials.items()
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": _bert_post_processor() if bert else byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": _vocabulary(config["vocab_size"], specials),
            "merges": [],
        },
    }  # fmt: skip
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.get("max_position_embeddings", config.get("n_positions")),
        "clean_up_tokenization_spaces": False,
        "padding_side": "right" if bert else "left",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]
        if bert
        else ["input_ids", "attention_mask"],
        **named,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def _specials(config: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, str]]:
    """Ids by special token, and the token for each role."""
    if config["model_type"] == "bert":
        return _BERT_SPECIALS, {f"{token[1:-1].lower()}_token": token for token in _BERT_SPECIALS}
    bos, eos = config["bos_token_id"], config["eos_token_id"]
    if bos == eos:
        end = "<|endoftext|>"
        return {end: eos}, {"bos_token": end, "eos_token": end, "pad_token": end}
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    return {begin: bos, end: eos}, {"bos_token": begin, "eos_token": end, "pad_token": end}


def _vocabulary(vocab_size: int, specials: Mapping[str, int]) -> dict[str, int]:
    """Every id from 0 to `vocab_size`: specials at their own, byte strings in order at the rest."""
    taken = {number: token for token, number in specials.items()}
    strings = _byte_strings()
    return {taken.get(number) or next(strings): number for number in range(vocab_size)}


def _byte_strings() -> Iterator[str]:
    alphabet = _byte_characters()
    for length in itertools.count(1):
        yield from map("".join, itertools.product(alphabet, repeat=length))


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where it is printable, else the next character from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = itertools.count(256)
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def _bert_post_processor() -> dict[str, Any]:
    def special(token: str, segment: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": segment}}

    def text(which: str, segment: int) -> dict[str, Any]:
        return {"Sequence": {"id": which, "type_id": segment}}

    single = [special("[CLS]", 0), text("A", 0), special("[SEP]", 0)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, text("B", 1), special("[SEP]", 1)],
        "special_tokens": {
            token: {"id": token, "ids": [_BERT_SPECIALS[token]], "tokens": [token]} for token in ("[CLS]", "[SEP]")
        },
    }
