"""ONNX Runtime with prepacking off: weights stay in the mapped file, and the kernel keeps of them what the cap allows.

    python onnx_run.py MODEL [--export]

`--export` writes MODEL.onnx/ (not timed), checks its output against transformers', and ends. Encoders of text only. The
run itself imports neither torch nor transformers. Graph rewrites that would make new weights are off, as is the arena.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
from work import ENCODER_TOKENS, FORWARDS, Work, report


def open_graph(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.enable_cpu_mem_arena = False
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def token_ids() -> np.ndarray:
    return np.arange(1000, 1000 + ENCODER_TOKENS, dtype=np.int64)[None]


def export(model: Path, folder: Path) -> None:
    """Through torch's exporter; nothing is left behind if the outputs are not close."""
    import shutil

    import torch
    import transformers

    class Hidden(torch.nn.Module):
        def __init__(self, encoder: torch.nn.Module) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.encoder(input_ids=input_ids)[0]

    module = Hidden(transformers.AutoModel.from_pretrained(model, dtype="auto")).eval()
    ids = torch.from_numpy(token_ids())
    folder.mkdir(exist_ok=True)
    try:
        with torch.no_grad():
            wanted = module(ids).numpy()
            torch.onnx.export(module, (ids,), folder / "model.onnx", input_names=["input_ids"], external_data=True)
        made = open_graph(folder).run(None, {"input_ids": ids.numpy()})[0]
        assert np.abs(made - wanted).max() < 1e-3, f"differs by {np.abs(made - wanted).max()}"
    except BaseException:
        shutil.rmtree(folder)
        raise


def main() -> None:
    model = Path(sys.argv[1])
    folder = model.with_name(f"{model.name}.onnx")
    if "--export" in sys.argv:
        export(model, folder)
        return
    work = Work(model)
    start = time.perf_counter()
    session = open_graph(folder)
    load_seconds = time.perf_counter() - start
    pass_seconds = []
    for _ in range(FORWARDS):
        begun = time.perf_counter()
        session.run(None, {"input_ids": token_ids()})
        pass_seconds.append(time.perf_counter() - begun)
    report(work, load_seconds=load_seconds, pass_seconds=pass_seconds)


main()
