"""`hermes pack` and `hermes unpack`: the same weights in fewer bytes, and back; or about the same, where asked for.

`checkpoint.pack` and `checkpoint.quantize` do it.
"""

import time
from pathlib import Path
from typing import Annotated

import typer

from hermes.checkpoint.hub import resolve_model
from hermes.checkpoint.open import open_checkpoint
from hermes.checkpoint.pack import pack as pack_model
from hermes.checkpoint.quantized import BITS
from hermes.checkpoint.unpack import unpack as unpack_model
from hermes.checkpoint.unpack import verify as verify_model
from hermes.errors import InputError
from hermes.report.deviation import weight_error
from hermes.report.progress import byte_progress
from hermes.tasks.detect import read_config
from hermes.units import format_bytes, format_seconds

__all__ = ["pack", "unpack"]

Model = Annotated[str, typer.Argument(help="A directory in Hugging Face layout, a weight file, or a Hub id.")]


def pack(
    model: Model,
    out: Annotated[Path | None, typer.Argument(help="Made; must not exist, be empty, or hold this same pack.")] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Then unpack OUT and compare; without OUT, check a packed MODEL."),
    ] = False,
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize", metavar="int8|int4", help="Lossy: matrices of linear layers in 8 or 4 bits a weight."
        ),
    ] = None,
) -> None:
    """Write a packed copy of a model, bit for bit the same weights, usable by every command. Or a quantised one."""
    source = resolve_model(model)
    if quantize is not None:
        _quantize(source, out, quantize, verify=verify)
        return
    if out is None and not verify:
        raise InputError(f"hermes pack {model}: where to? give a directory as OUT, or --verify to check a packed MODEL")
    start = time.perf_counter()
    if out is not None:
        with byte_progress("packing") as progress:
            pack_model(source, out, progress=progress)
        before, after = _weights(source), _weights(out)
        print(
            f"{out}: {format_bytes(after)} of weights, {after / max(1, before):.1%} of {format_bytes(before)}, "
            f"{format_seconds(time.perf_counter() - start)}"
        )
    if verify:
        start = time.perf_counter()
        with byte_progress("verifying") as progress:
            nbytes = verify_model(out or source, source if out is not None else None, progress=progress)
        what = "every checksum is right" if out is None else "every byte is the same"
        print(
            f"{out or source}: {format_bytes(nbytes)} unpacked, {what}, {format_seconds(time.perf_counter() - start)}"
        )


def _quantize(source: Path, out: Path | None, scheme: str, *, verify: bool) -> None:
    if scheme not in BITS:
        raise InputError(f"--quantize {scheme}: unknown; choose from {', '.join(BITS)}")
    if out is None or verify:
        raise InputError("--quantize makes a directory, which is not the same as MODEL: give OUT, and no --verify")
    start = time.perf_counter()
    if open_checkpoint(source).quantized:
        raise InputError(f"{source} is quantised already; give the model that it was made from")
    read_config(source)  # a broken one is said at once
    from hermes.checkpoint.quantize import quantize
    from hermes.session.quantizable import find_quantizable

    found = find_quantizable(source)
    with byte_progress("quantising") as progress:
        quantize(source, out, scheme, found.matrices, progress=progress)
    before, after = _weights(source), _weights(out)
    left = ", ".join(f"{count} ({reason})" for reason, count in found.left.items())
    kept = f", linear layers in full precision: {left}" if left else ""
    print(
        f"{out}: {format_bytes(after)} of weights, {after / max(1, before):.1%} of {format_bytes(before)}, "
        f"{format_seconds(time.perf_counter() - start)}"
    )
    print(f"{len(found.matrices)} matrices in {scheme}{kept}; {weight_error(open_checkpoint(out))}")


def unpack(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Made; must not exist, be empty, or hold this same copy.")],
) -> None:
    """Write what a packed model was made from: safetensors files byte for byte."""
    start = time.perf_counter()
    with byte_progress("unpacking") as progress:
        unpack_model(resolve_model(model), out, progress=progress)
    print(f"{out}: {format_bytes(_weights(out))} of weights, {format_seconds(time.perf_counter() - start)}")


def _weights(path: Path) -> int:
    return sum(stamp.nbytes for stamp in open_checkpoint(path).files)
