"""The trainer: runs in the pod or on a laptop, and knows nothing of Kubernetes."""

import logging

# Where PEFT imports it, it warns on some processors of a kernel that it has not downloaded.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
