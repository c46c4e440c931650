"""A model folder's tokenizer, always one that knows which characters each token came from.

transformers loads most as such. Where it has a Python implementation only, that is rebuilt, and both are compared on
texts of all kinds: equal ids, or the tokenizer is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError, first_line

PROBES = (
    "Hello, world! It's 3.14 o'clock; don't panic.",
    "  two leading spaces,  doubled ones and a trailing one ",
    "tabs\tand\nnew lines\n\n\r\nof several kinds\u000b\u000c\u0085\u2028\u2029end",
    "Grüße aus Köln, naïve café, Ærøskøbing, Łódź, İstanbul, ǅ and ẞ",
    "combining: e\u0301 n\u0303 o\u0308\u0304 \u1100\u1161\u11a8",
    "北京欢迎你。東京タワー、서울 안녕하세요 ｶﾀｶﾅ ＦＵＬＬ",
    "Привет, мир! Γειά σου Κόσμε שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดี",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 ☃️ 𝔘𝔫𝔦 𐍈 \U000e0041",
    "ligature ﬁ, ½ ² ₂ Ⅳ ™ … “quoted” ‘single’ – — • № ﷺ",
    "no-break\u00a0space thin\u2009space zero\u200bwidth soft\u00adhyphen \ufeffmark ideographic\u3000space",
    "control\u0000\u0001\u0008\u001b\u007f\u0080\u009f characters \ufffd \ufffc",
    "def f(x):\n    return x[1:-1] ** 2  # \\n {'a': [1, 2]}\n\t\treturn None\n",
    "https://example.org/a?b=c&d=%20#e user@example.org #tag @name $5.00 100% <b>bold</b> [MASK_ME] <|x|>",
    "12345678901234567890 1,000,000.00 2024-01-31 +49 30 901820 0x1F",
    "UPPER lower MiXeD camelCase snake_case kebab-case antidisestablishmentarianism aaaaaaaaaaaaaaaaaaaa",
    "",
    " ",
    "\n",
    "▁already marked▁ ##piece @@ </w>",
)
"""Texts that tokenizers are known to disagree about."""


_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')


def load_fast_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer in `folder` as transformers' class over the tokenizers library.

    Raises:
        JobError: ModelUnsupported, there is none, or none that can be had in this form.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with unloadable(folder):
        _check_merges(folder / "tokenizer.json")
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except ImportError:
            # A Python implementation wants a package, which a tokenizer.json makes needless.
            if not (folder / "tokenizer.json").is_file():
                raise
            tokenizer = None
        published = (folder / "tokenizer.json").is_file()
        if (folder / "tekken.json").is_file() and not published:
            return _from_tekken(folder)
        if getattr(tokenizer, "is_fast", False):
            return tokenizer
        if published:
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        fast = rebuild(tokenizer)
    if fast is None:
        raise JobError(
            Reason.MODEL_UNSUPPORTED,
            f"The tokenizer of {folder} ({type(tokenizer).__name__}) has no fast implementation, which is needed to "
            "know which tokens belong to the answer, and none can be made that gives the same ids: add a "
            "tokenizer.json to the model.",
        )
    return fast


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a fast `tokenizer` so that transformers 4 reads it as well as 5: everything is in its tokenizer.json."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    # How it was loaded here is nobody else's business.
    content = {key: value for key, value in content.items() if key not in ("local_files_only", "is_local")}
    if "auto_map" not in content:
        # Names of version 5 alone would be refused; a tokenizer that brings code keeps its class.
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def unloadable(folder: Path) -> Iterator[None]:
    """Whatever a foreign folder makes transformers raise means the same to the user.

    Raises:
        JobError: ModelUnsupported.
    """
    try:
        yield
    except BaseException as error:
        # A panic of the tokenizers library is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, JobError | MemoryError):
            raise
        text = first_line(error)
        advice = "add a tokenizer.json to the model" if isinstance(error, ImportError) else "check that it has one"
        raise JobError(
            Reason.MODEL_UNSUPPORTED, f"The tokenizer of {folder} cannot be loaded ({text}): {advice}."
        ) from error


def _check_merges(file: Path) -> None:
    """Refuse merges of pieces that lack the prefix of pieces: the tokenizers library would end the process.

    Raises:
        ValueError: there are such.
    """
    if not file.is_file() or not _PREFIX.search(data := file.read_bytes()):
        return
    model = json.loads(data)["model"]
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not prefix or not merges:
        return
    seconds = (merge.partition(" ")[2] if isinstance(merge, str) else merge[1] for merge in merges)
    odd = next((piece for piece in seconds if not piece.startswith(prefix)), None)
    if odd is not None:
        raise ValueError(f"its merges have {odd!r}, which does not begin with {prefix!r} as its pieces do")


def _from_tekken(folder: Path) -> Any:
    """Mistral's own format, which says what its control tokens are called but not what they are for."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if fast.bos_token is None:
        fast.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"})
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=["<s>", "$A"], special_tokens=[("<s>", fast.bos_token_id)]
        )
    return fast


def rebuild(slow: Any) -> Any | None:
    """A fast tokenizer that gives `slow`'s ids for every probe, or None."""
    from transformers.convert_slow_tokenizer import SLOW_TO_FAST_CONVERTERS

    makers: list[Callable[[Any], tokenizers.Tokenizer]] = [
        _from_wordpieces if hasattr(slow, "wordpiece_tokenizer") else _from_sentencepiece
    ]
    if converter := SLOW_TO_FAST_CONVERTERS.get(type(slow).__name__):
        makers.insert(0, lambda tokenizer: converter(tokenizer).converted())
    for make in makers:
        try:
            fast = _wrap(slow, make(slow))
        except Exception:  # noqa: S112 - it was an attempt; the probes decide, and the refusal names the class.
            continue
        if agrees(slow, fast):
            return fast
    return None


def agrees(slow: Any, fast: Any) -> bool:
    """Whether both give the same ids, with and without the tokens that they add by themselves."""
    specials = {*_special_tokens(slow).values(), *(token.content for token in slow.added_tokens_decoder.values())}
    probes = [*PROBES, *(f"a {token}b {token} c" for token in specials), "".join(sorted(specials))]
    return all(
        list(slow(text, add_special_tokens=added)["input_ids"])
        == list(fast(text, add_special_tokens=added)["input_ids"])
        for text in probes
        for added in (False, True)
    )


def _wrap(slow: Any, backend: tokenizers.Tokenizer) -> Any:
    """transformers' class around `backend`, with `slow`'s special and added tokens, template and settings."""
    from transformers import PreTrainedTokenizerFast

    special = {index: AddedToken(name, normalized=False, special=True) for index, name in _special_tokens(slow).items()}
    for index, token in sorted((special | slow.added_tokens_decoder).items()):
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != index:
            raise ValueError(f"{token.content} has another id")
    size = backend.get_vocab_size()
    around = slow.build_inputs_with_special_tokens([size])
    place = around.index(size)
    names = slow.convert_ids_to_tokens([index for index in around if index != size])
    backend.post_processor = processors.TemplateProcessing(
        single=[*names[:place], "$A", *names[place:]],
        special_tokens=list({name: slow.convert_tokens_to_ids(name) for name in names}.items()),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=slow.model_max_length,
        padding_side=slow.padding_side,
        chat_template=slow.chat_template,
        clean_up_tokenization_spaces=False,
        **slow.special_tokens_map,
    )


def _special_tokens(slow: Any) -> dict[int, str]:
    """Special tokens by id; some classes keep them out of `added_tokens_decoder`."""
    return {slow.convert_tokens_to_ids(str(token)): str(token) for token in slow.all_special_tokens}


def _from_wordpieces(slow: Any) -> tokenizers.Tokenizer:
    """BERT's words and pieces."""
    words = slow.basic_tokenizer
    backend = tokenizers.Tokenizer(models.WordPiece(dict(slow.vocab), unk_token=str(slow.unk_token)))
    backend.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=words.tokenize_chinese_chars,
        strip_accents=words.strip_accents,
        lowercase=words.do_lower_case,
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _from_sentencepiece(slow: Any) -> tokenizers.Tokenizer:
    """The sentencepiece model of a class that may number the pieces in its own way and clean texts before.

    Raises:
        AttributeError: `slow` has none.
    """
    from transformers.convert_slow_tokenizer import import_protobuf
    from transformers.tokenization_utils_base import generate_merges

    proto = import_protobuf().ModelProto.FromString(slow.sp_model.serialized_model_proto())
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    ids = {piece.piece: slow.convert_tokens_to_ids(piece.piece) for piece in proto.pieces}
    unknown = str(slow.unk_token)
    # A class may have no use for some of the model's pieces.
    scores = {piece.piece: piece.score for piece in proto.pieces if ids[piece.piece] != slow.unk_token_id}
    scores[unknown], ids[unknown] = 0.0, slow.unk_token_id
    if trainer.model_type == trainer.UNIGRAM:
        names = {ids[name]: name for name in scores} | _special_tokens(slow)
        least = min(scores.values())
        # An id without a piece keeps its place, under a name that no text has: U+FDD0 is no character.
        named = [names.get(index, f"\ufdd0{index}\ufdd0") for index in range(max(names) + 1)]
        rows = [(name, scores.get(name, least)) for name in named]
        backend = tokenizers.Tokenizer(
            models.Unigram(rows, unk_id=slow.unk_token_id, byte_fallback=trainer.byte_fallback)
        )
    else:
        ids = {name: ids[name] for name in scores}
        merges = generate_merges(ids, scores)
        backend = tokenizers.Tokenizer(
            models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback)
        )
    before = _own_normalizers(slow)
    if rules.precompiled_charsmap:
        # The library looks at one character with its accents at a time, and only at the first rule that fits.
        before += [normalizers.NFC()] if "nfkc" in rules.name else []
        before += [normalizers.Precompiled(rules.precompiled_charsmap)]
    if rules.remove_extra_whitespaces:
        before += [
            normalizers.Replace(tokenizers.Regex(pattern), to) for pattern, to in ((r"\A +| +\z", ""), (" +", " "))
        ]
    before += [normalizers.Prepend("▁")] if rules.add_dummy_prefix else []
    before += [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(before)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts if rules.add_dummy_prefix else parts[:-1])
    return backend


def _own_normalizers(slow: Any) -> list[Any]:
    """What GPT-SW3 does to a text before sentencepiece sees it."""
    if not hasattr(slow, "non_printing_characters_re"):
        return []
    spaces = "".join(sorted(slow.whitespaces))
    return [
        normalizers.Replace(tokenizers.Regex(slow.non_printing_characters_re.pattern), ""),
        normalizers.Replace(tokenizers.Regex(f"[{spaces}]"), " "),
        normalizers.NFC(),
    ]
