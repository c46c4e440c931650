"""Small vocabularies for transformers' tokenizer classes that have a Python implementation only."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import transformers

CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "grüße aus köln, naïve café",
    "北京 欢迎 你 東京",
    "привет мир",
    "def f(x): return x[1:-1] ** 2",
    "1 2 3 4 5 6 7 8 9 0",
    "hello world hello there",
    "don't panic: it's fine!",
)


def _spm(path: Path, **settings: Any) -> str:
    """Train a sentencepiece model at `path` (*.model); returns it."""
    corpus = path.with_suffix(".txt")
    corpus.write_text("\n".join(CORPUS * 20))
    settings = {"vocab_size": 130, "hard_vocab_limit": False, "minloglevel": 2, **settings}
    sentencepiece.SentencePieceTrainer.train(input=str(corpus), model_prefix=str(path.with_suffix("")), **settings)
    corpus.unlink()
    return str(path.with_suffix(".model").rename(path))


def _words(path: Path, *more: str) -> str:
    """Write a WordPiece vocabulary; returns its path."""
    characters = sorted(set("".join(CORPUS)) - {" "})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *more, *characters, *(f"##{c}" for c in characters)]
    path.write_text("\n".join([*pieces, "hello", "world", "##llo", "fox"]))
    return str(path)


def _json(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def _bert_generation(folder: Path) -> Any:
    model = _spm(folder / "spiece.model", normalization_rule_name="nmt_nfkc", pad_id=3)
    return transformers.BertGenerationTokenizer(model)


def _gpt_sw3(folder: Path) -> Any:
    model = _spm(
        folder / "spiece.model", model_type="bpe", byte_fallback=True, vocab_size=420, pad_id=3, pad_piece="<pad>",
        normalization_rule_name="identity", user_defined_symbols=["<|endoftext|>"],
    )  # fmt: skip
    return transformers.GPTSw3Tokenizer(model)


def _plbart(folder: Path) -> Any:
    model = _spm(folder / "sentencepiece.bpe.model")
    return transformers.PLBartTokenizer(model, language_codes="base")


def _marian(folder: Path) -> Any:
    model = _spm(folder / "source.spm")
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    pieces = ["</s>", "<unk>", *(piece for piece in pieces if piece not in ("<s>", "</s>", "<unk>")), "<pad>"]
    vocabulary = _json(folder / "vocab.json", {piece: index for index, piece in enumerate(pieces)})
    with warnings.catch_warnings():
        # It recommends sacremoses, with which it changes punctuation before it looks at a text.
        warnings.simplefilter("ignore")
        return transformers.MarianTokenizer(model, model, vocabulary)


def _prophetnet(folder: Path) -> Any:
    return transformers.ProphetNetTokenizer(_words(folder / "prophetnet.tokenizer", "[X_SEP]"))


def _roc_bert(folder: Path) -> Any:
    words = _words(folder / "vocab.txt")
    numbers = dict.fromkeys(Path(words).read_text().split("\n"), 1)
    shape, sound = _json(folder / "word_shape.json", numbers), _json(folder / "word_pronunciation.json", numbers)
    return transformers.RoCBertTokenizer(words, shape, sound)


def _ctrl(folder: Path) -> Any:
    characters = sorted(set("".join(CORPUS)) - {" "})
    pieces = ["<unk>", *characters, *(f"{c}@@" for c in characters), "he@@", "hell@@", "hello"]
    merges = folder / "merges.txt"
    merges.write_text("#version: 0.2\nh e\nl l\nhe ll\nhell o</w>\n")
    return transformers.CTRLTokenizer(
        _json(folder / "vocab.json", {piece: index for index, piece in enumerate(pieces)}), str(merges)
    )


def _blenderbot_small(folder: Path) -> Any:
    characters = sorted(set("".join(CORPUS)) - {" "})
    pieces = ["__null__", "__start__", "__end__", "__unk__", *characters, *(f"{c}@@" for c in characters), "he@@"]
    merges = folder / "merges.txt"
    merges.write_text("#version: 0.2\nh e\n")
    return transformers.BlenderbotSmallTokenizer(
        _json(folder / "vocab.json", {piece: index for index, piece in enumerate(pieces)}), str(merges)
    )


def _gpt_neox_japanese(folder: Path) -> Any:
    pieces = ["<SP>", "<BR>", "<TAB>", "<|emoji1|>", "<|startoftext|>", "<|endoftext|>", *sorted(set("".join(CORPUS)))]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join([*pieces, *(f"<|byte{number}|>" for number in range(256))]))
    emoji = _json(folder / "emoji.json", {"emoji": {"👍": "<|emoji1|>"}, "emoji_inv": {"<|emoji1|>": "👍"}})
    return transformers.GPTNeoXJapaneseTokenizer(str(vocabulary), emoji)


MAKERS: dict[str, Callable[[Path], Any]] = {
    "BertGenerationTokenizer": _bert_generation,
    "BlenderbotSmallTokenizer": _blenderbot_small,
    "CTRLTokenizer": _ctrl,
    "GPTNeoXJapaneseTokenizer": _gpt_neox_japanese,
    "GPTSw3Tokenizer": _gpt_sw3,
    "MarianTokenizer": _marian,
    "PLBartTokenizer": _plbart,
    "ProphetNetTokenizer": _prophetnet,
    "RoCBertTokenizer": _roc_bert,
}
"""Class name -> makes one with a small vocabulary, its files in a folder."""
