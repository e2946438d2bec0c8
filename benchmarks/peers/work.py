"""What every comparator is asked to do, and how its result is reported: one JSON object on standard output.

Encoders make FORWARDS passes over 128 tokens or one image; decoders go on from 16 tokens with 8 more, greedily. Each is
given its checkpoint's directory, and starts its clock when its own packages are imported.
"""

import hashlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

FORWARDS = 5
ENCODER_TOKENS = 128
PROMPT_TOKENS = 16
NEW_TOKENS = 8


def memory_bytes(field: str) -> int:
    """VmHWM is the peak: what ru_maxrss is inherited into, exec makes anew. VmRSS is the present resident set."""
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024


def read_bytes() -> int:
    """That this process made the block layer fetch."""
    line = next(line for line in open("/proc/self/io") if line.startswith("read_bytes"))
    return int(line.split()[1])


class Work:
    """The job for one checkpoint; made when a peer's own packages are imported.

    Attributes:
        floor_bytes: the process before any weight.
    """

    def __init__(self, model: Path) -> None:
        self.model = model
        self.floor_bytes = memory_bytes("VmRSS")
        self.config = json.loads((model / "config.json").read_text())
        name = self.config["architectures"][0]
        self.generates = "CausalLM" in name or "LMHead" in name
        self.is_text = "ViT" not in name
        self.auto_class = (
            "AutoModelForCausalLM" if self.generates else "AutoModel" if self.is_text
            else "AutoModelForImageClassification"
        )  # fmt: skip

    @property
    def load_options(self) -> dict:
        """For `hermes.load`: the shapes that `perform` has."""
        return {
            "auto_class": self.auto_class,
            "sequence_length": PROMPT_TOKENS if self.generates else ENCODER_TOKENS,
            "max_new_tokens": NEW_TOKENS,
        }

    def perform(self, module) -> list:
        """Passes over the model; the tensors that come out."""
        import torch

        with torch.no_grad():
            if self.generates:
                ids = torch.arange(100, 100 + PROMPT_TOKENS).view(1, -1)
                tokens = module.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS,
                    min_new_tokens=NEW_TOKENS, do_sample=False, output_scores=True, return_dict_in_generate=True,
                    pad_token_id=0,
                )  # fmt: skip
                return [tokens.sequences, *tokens.scores]
            size = self.config.get("image_size", 224)
            inputs = (
                {"input_ids": torch.arange(1000, 1000 + ENCODER_TOKENS).view(1, -1)}
                if self.is_text
                else {"pixel_values": torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size)}
            )
            for _ in range(FORWARDS):
                outputs = [module(**inputs)[0]]
            return outputs


def clock_passes(module) -> list[float]:
    """Seconds of each forward of the whole model from now on, in a list that grows."""
    starts: list[float] = []
    seconds: list[float] = []
    module.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
    module.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - starts[-1]))
    return seconds


def digest(outputs) -> str:
    """Of every bit of the outputs."""
    import torch

    found = hashlib.sha256()
    for tensor in outputs:
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def report(work: Work, *, load_seconds: float, pass_seconds: list[float], outputs=None, **more: object) -> None:
    """Print the result and end. `first_seconds` are from the start of loading to the first output."""
    later = pass_seconds[1:] or pass_seconds
    result = {
        "load_seconds": load_seconds,
        "first_seconds": load_seconds + pass_seconds[0],
        "pass_seconds": pass_seconds,
        "steady_seconds": statistics.median(later),
        "floor_bytes": work.floor_bytes,
        "peak_bytes": memory_bytes("VmHWM"),
        "read_bytes": read_bytes(),
        "digest": None if outputs is None else digest(outputs),
        **more,
    }
    print(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # some peers take seconds to end, or end with an error
