"""What transformers and PEFT are known to do wrong by themselves, with the reports of it where there are any."""

from __future__ import annotations

ISSUES: dict[str, str] = {
    "reformer": "[transformers#10922](https://github.com/huggingface/transformers/issues/10922)",
}
"""By type, the report of what transformers fails with."""

_TRANSFORMERS = "https://github.com/huggingface/transformers/issues"

NOTES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("bart", "blenderbot", "marian", "mbart", "mvp", "pegasus", "plbart"),
        (
            "Published encoder-decoders share one embedding, whose name `AutoModelForCausalLM` does not look for: its "
            "rows and the head stay random, without an error "
            f"([transformers#17375]({_TRANSFORMERS}/17375) is about the head). "
            "A decoder that is saved by itself loads and trains."
        ),
    ),
    (
        ("emu3", "moshi"),
        (
            "`AutoModelForCausalLM` takes the text model out of the published wrapper, and does not know its names "
            "there: all of it stays random, without an error."
        ),
    ),
    (
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "Drafters that read the keys and values of another model; 5.23 cannot make them, since all their layers share.",
    ),
    (("gemma3n",), "Its tower for images is timm's, which is not among the trainer's packages."),
    (
        ("musicgen", "musicgen_melody"),
        "`AutoModelForCausalLM` hands the decoder the configuration of the whole. They continue sound, not text.",
    ),
    (
        ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"),
        (
            "PEFT refuses `out_proj`, whose weights Mamba's kernels read directly "
            f"([transformers#30316]({_TRANSFORMERS}/30316))."
        ),
    ),
    (
        ("doge",),
        (
            "Its experts (`is_moe: true`) are chosen with a look at later tokens; transformers keeps it so, by a "
            "comment in its code, for the sake of published checkpoints."
        ),
    ),
    (
        ("prophetnet",),
        "Padding changes the logits of a row, although it is masked.",
    ),
    (
        ("zamba", "zamba2"),
        (
            "Their attention blocks are the same weights at several depths. PEFT would merge an adapter into them once "
            "for each, so these layers get none."
        ),
    ),
    (("xlnet",), "With `attn_type: uni` it fails on rows that are padded to one length."),
)
"""Types, and what is to know about them."""
