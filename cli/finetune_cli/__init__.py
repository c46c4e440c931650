"""The front door: `finetune run`, `validate`, `preview` and `chat`."""
