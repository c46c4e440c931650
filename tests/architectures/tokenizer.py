"""A tokenizer of a few hundred ids: byte-level, so that it takes any text, with a ChatML chat template."""

from __future__ import annotations

from pathlib import Path

from tests.architectures.sizes import SPECIAL_TOKENS

PAD, BOS, END, START = "<|pad|>", "<|bos|>", "<|im_end|>", "<|im_start|>"

_IDS = 400
"""The 256 bytes, the special tokens, and the most frequent pairs of the text below."""

_TEXT = (
    "<|im_start|>system Be brief. Answer with one word. <|im_start|>user What is the colour of the sky? How many legs "
    "does a spider have? Please say which of the two numbers is larger. Are you sure? <|im_start|>assistant It is "
    "blue. The answer is eight. Yes, I am sure of that."
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer's files into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_IDS,
        special_tokens=[PAD, BOS, END, START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=END)
    found = {"pad_token_id": fast.pad_token_id, "bos_token_id": fast.bos_token_id, "eos_token_id": fast.eos_token_id}
    assert found == SPECIAL_TOKENS, found
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
