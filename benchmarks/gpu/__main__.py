"""`python -m benchmarks.gpu`: what a training step of ours takes on the GPU that is there.

The report is Markdown on standard output; what is going on is told on standard error.
"""

from __future__ import annotations

import argparse
import os
import sys

from benchmarks.console import numbers, words

_LLAMA_3_8B = "32,4096,14336,32,8,128256"


def main(arguments: list[str] | None = None) -> int:
    """Measure and print the report; 0, 1 after a first contact with faults, 2 where it cannot be done."""
    options = vars(_options(arguments))
    kind, first = options.pop("device"), options.pop("first_contact")
    if kind != "cpu":
        # Of several GPUs transformers would use all at once, which no job does. Read when CUDA is first asked.
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    from benchmarks.gpu.devices import NotMeasurableError, chosen_device

    try:
        device = chosen_device(kind)
        if first:
            from benchmarks.gpu.first_contact import first_contact

            return 0 if first_contact(device) else 1
        from benchmarks.gpu.measure import Settings, measure

        measure(Settings(device=device, **options))
    except NotMeasurableError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--first-contact", action="store_true", help="check in five minutes what was never run on a GPU, and no more"
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="a folder or a name on the Hugging Face Hub (default: SmolLM2-135M-Instruct)")
    model.add_argument(
        "--random",
        type=numbers,
        metavar="LAYERS,HIDDEN,INTERMEDIATE,HEADS,KV_HEADS,VOCAB",
        help="a Llama of this size instead, with random bfloat16 weights in a temporary folder and SmolLM2's "
        f"tokenizer; Llama-3-8B is {_LLAMA_3_8B} (16 GB of disk and of main memory)",
    )
    parser.add_argument(
        "--shapes", type=words, default="guard,tools,chat,short", help="of the data (default: %(default)s)"
    )
    parser.add_argument("--rows", type=int, default=32, help="rows a step, a multiple of 8 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="steps that are measured (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them, at least 1 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        help="default: cuda; cpu only tries the command's logic. CUDA_VISIBLE_DEVICES says which GPU",
    )
    parser.add_argument(
        "--peak-tflops", type=float, help="the GPU's dense bfloat16 peak, for MFU (default: known for some GPUs)"
    )
    parser.add_argument(
        "--compare", choices=["padded"], help="run the same rows through our padded layout too, in turn with ours"
    )
    parser.add_argument("--padded-rows", type=int, default=8, help="rows of a padded batch (default: %(default)s)")
    parser.add_argument(
        "--kernels", action="store_true", help="time FlexAttention beside masked attention on one pack, and compare"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
