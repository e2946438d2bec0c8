"""Products of the native module have the bits of torch's, with packed matrices and with plain ones."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch.nn import functional

import hermes
from hermes.checkpoint.chunks import ChunkRun, PackedFile, PackedTensor
from hermes.checkpoint.decoder import encode_chunk, native
from hermes.checkpoint.layout import CHUNK_ELEMENTS
from hermes.checkpoint.pack import pack
from hermes.errors import ReadError
from hermes.memory.probe import resident_bytes
from hermes.model import kernels, orders, product
from hermes.model.kernels import Sums
from hermes.model.orders import (
    FLOAT_TOKENS,
    MOST_TOKENS,
    order_of_columns,
    order_of_sums,
    order_of_token,
)
from hermes.model.product import PackedRows, can_stay_packed, finish
from hermes.model.units import MATRIX_ROWS
from hermes.pipeload import Place

pytestmark = pytest.mark.skipif(native() is None, reason="the native decoder was not built")
multiplies = pytest.mark.skipif(
    native() is None or not native().can_multiply(), reason="a processor without bf16 dot products"
)
multiplies_floats = pytest.mark.skipif(
    native() is None or not native().can_multiply_floats(), reason="a processor without AVX-512"
)
BF16 = torch.bfloat16


def packed_rows(
    weight: torch.Tensor, begin: int = 0, end: int | None = None, *, stays: bool = False, whole_rows: int | None = None
) -> PackedRows:
    """These rows of a matrix, bound to the chunks of it that hold them, as they stream or as they stay in memory."""
    rows, columns = weight.shape
    end = rows if end is None else end
    content = memoryview(weight.contiguous().view(torch.uint8).numpy().reshape(-1))  # type: ignore[arg-type]
    step = 2 * CHUNK_ELEMENTS
    chunks = [
        encode_chunk(content[i : i + step], "BF16", 2, number) for number, i in enumerate(range(0, len(content), step))
    ]
    places = np.cumsum([0, *map(len, chunks)], dtype=np.int64)
    tensor = PackedTensor(name="w", path=None, item_bytes=2, begin=0, nbytes=len(content), places=places)  # type: ignore[arg-type]
    run: ChunkRun = PackedFile(tensors=[tensor]).run(2 * begin * columns, 2 * (end - begin) * columns)
    found = PackedRows(run, 0, (end - begin, columns), whole_rows)
    whole = b"".join(chunks)
    content = memoryview(bytearray(b"." + whole[run.offset : run.offset + run.nbytes]))
    finish(run, (end - begin, columns), content[1:], stays)
    memory = torch.frombuffer(content, dtype=torch.uint8)
    found.bind(lambda _: memory.untyped_storage(), [Place(resident=False, offset=1)])
    return found


def weights(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator) / 50
    weight[0, :5] = torch.tensor([0.0, -0.0, 3e38, 1e-40, -7.0])  # escapes, and numbers that kernels may flush
    return weight.bfloat16()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.int16), b.view(torch.int16))


SHAPES = [(16, 64), (100, 128), (256, 1024), (640, 576), (1000, 2112), (257, 4096)]


@multiplies
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 9, MOST_TOKENS])
@pytest.mark.parametrize("stays", [False, True])
def test_few_tokens(shape: tuple[int, int], tokens: int, stays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedRows, "_unpack_and_multiply", None)  # is not what is tested here
    weight = weights(*shape)
    x = torch.randn(1, tokens, shape[1]).bfloat16()
    bias = torch.randn(shape[0]).bfloat16()
    for given in (None, bias):
        if not order_of_sums(BF16, tokens, *shape, given is not None, torch.get_num_threads()):
            pytest.skip("torch sums in another order here")
        got = packed_rows(weight, stays=stays).linear(x, given)
        assert got.shape == (1, tokens, shape[0])
        assert same(got, functional.linear(x, weight, given))


SCATTERED = {
    "part of each token": lambda x: x.repeat(1, 1, 2)[..., : x.shape[2]],
    "every other number": lambda x: x.repeat_interleave(2, dim=2)[..., ::2],
    "turned": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last of each sequence": lambda x: x.transpose(0, 1).repeat(1, 3, 1)[:, -1:],
    "one for all": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", SCATTERED)
@pytest.mark.parametrize("tokens", [1, 2, 4, MOST_TOKENS, 64])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_tokens_that_do_not_lie_side_by_side(dtype: torch.dtype, tokens: int, layout: str) -> None:
    """torch multiplies these another way, which rounds otherwise; and so do ranges of a head."""
    weight = weights(640, 576).to(dtype)
    x = SCATTERED[layout](torch.randn(1, tokens, 576).to(dtype))
    for bias in (None, torch.randn(640).to(dtype)):
        expected = functional.linear(x, weight, bias)
        assert same(product.linear(x, weight, bias), expected)
        if dtype == BF16:
            assert same(packed_rows(weight).linear(x, bias), expected)
        ranges = product.Ranges(x, 640)
        for begin in (0, 320):
            part = None if bias is None else bias[begin : begin + 320]
            product.multiply_range(ranges, begin, weight[begin : begin + 320], part, 640)
        assert same(ranges.output, expected) or x.is_contiguous()


@pytest.mark.parametrize("shape", [(1024, 512), (2304, 768), (1100, 4096), (512, 8192), (3072, 3072)])
@pytest.mark.parametrize("tokens", [1, 2, 8, MOST_TOKENS, 17, 40, 128, 300])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_ranges_of_rows_that_round_like_the_whole_matrix(
    shape: tuple[int, int], tokens: int, dtype: torch.dtype
) -> None:
    """What lets matrices stream in ranges (`session.prepare.RANGE_BYTES`)."""
    weight = weights(*shape).to(dtype)
    x = torch.randn(tokens, shape[1]).to(dtype)
    for bias in (None, torch.randn(shape[0]).to(dtype)):
        expected = functional.linear(x, weight, bias)
        for rows in (MATRIX_ROWS, 3 * MATRIX_ROWS):
            ranges = product.Ranges(x, shape[0])
            for begin, part in zip(range(0, shape[0], rows), weight.split(rows), strict=True):
                given = None if bias is None else bias[begin : begin + rows]
                product.multiply_range(ranges, begin, part, given, shape[0])
            is_known = product.knows_rows(dtype, tokens, shape, rows, bias is not None)
            assert same(ranges.output, expected) or not is_known


@pytest.mark.parametrize("tokens", [1, 16, 17, 40, 64, 81, 200, 256, 300])
@pytest.mark.parametrize("shape", [(768, 1024), (1024, 1088)])
def test_packed_ranges_round_like_the_whole_matrix(shape: tuple[int, int], tokens: int) -> None:
    weight, x = weights(*shape), torch.randn(tokens, shape[1]).bfloat16()
    ranges = product.Ranges(x, shape[0])
    for begin in range(0, shape[0], MATRIX_ROWS):
        part = packed_rows(weight, begin, begin + MATRIX_ROWS, whole_rows=shape[0])
        part.multiply_range(ranges, begin, None)
    is_known = product.knows_rows(BF16, tokens, shape, MATRIX_ROWS, False)
    assert same(ranges.output, functional.linear(x, weight)) or not is_known


@multiplies
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if not shape[0] % 16])
@pytest.mark.parametrize("tokens", [1, 3, 8, MOST_TOKENS])
def test_plain_matrices(shape: tuple[int, int], tokens: int) -> None:
    weight = weights(*shape)
    x = torch.randn(tokens, 2, shape[1]).bfloat16()[:, 0]  # not contiguous
    bias = torch.randn(shape[0]).bfloat16()
    for given in (None, bias):
        assert same(product.linear(x, weight, given), functional.linear(x, weight, given))


@multiplies
@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize(("begin", "end"), [(301, 577), (0, 512), (512, 600), (512, 1024), (3, 9)])
def test_some_rows(begin: int, end: int, stays: bool) -> None:
    weight = weights(1100, 192)
    for tokens in (3, 40):
        x = torch.randn(tokens, 192).bfloat16()
        got = packed_rows(weight, begin, end, stays=stays).linear(x, None)
        assert same(got, functional.linear(x, weight[begin:end]))


@multiplies
def test_rows_that_stay_are_put_in_another_order_and_take_no_byte_more() -> None:
    weight = weights(1024, 192)
    rows, kept = packed_rows(weight), packed_rows(weight, stays=True)
    assert rows._storage is not None
    assert kept._storage is not None
    chunks = torch.empty(0, dtype=torch.uint8).set_(rows._storage)
    interleaved = torch.empty(0, dtype=torch.uint8).set_(kept._storage)
    assert len(chunks) == len(interleaved)
    headers = [1 + int(place - rows._run.places[0]) for place in rows._run.places[:-1]]
    assert chunks[headers[0] + 8] == 1
    assert interleaved[headers[0] + 8] == 0x80


@multiplies
@pytest.mark.parametrize("stays", [False, True])
def test_chunks_that_were_not_packed(stays: bool) -> None:
    """Numbers of any exponent: no code is short enough, the chunk is stored as it is."""
    weight = weights(300, 512)
    weight[64:128] = torch.randint(-32000, 32000, (64, 512), dtype=torch.int16).view(torch.bfloat16).nan_to_num(1.0)
    weight[64:128].clamp_(-1e4, 1e4)
    x = torch.randn(1, 512).bfloat16()
    rows = packed_rows(weight, stays=stays)
    assert rows._run.nbytes < 2 * weight.numel()
    assert same(rows.linear(x, None), functional.linear(x, weight))


@multiplies
@pytest.mark.parametrize("damage", ["number", "escape", "payload"])
def test_a_damaged_chunk_is_not_multiplied(damage: str) -> None:
    weight = weights(512, 256)
    rows = packed_rows(weight)
    assert rows._storage is not None
    chunks = torch.empty(0, dtype=torch.uint8).set_(rows._storage)
    second = 1 + int(rows._run.places[1] - rows._run.places[0])
    if damage == "number":
        chunks[second + 12] += 1
    elif damage == "payload":
        chunks[second + 20 : second + 24] = 0
    else:
        codes = chunks[second + 24 : second + 24 + 512 * 24].view(512, 24)
        codes[5] = 0xFF  # 64 escapes more than there are
    with pytest.raises(ReadError, match="chunk 1"):
        rows.linear(torch.randn(1, 256).bfloat16(), None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stays", [False, True])
def test_many_tokens_and_unknown_orders(shape: tuple[int, int], stays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "order_of_sums", lambda *_: None)
    weight = weights(*shape)
    for tokens in (1, 40):
        x = torch.randn(tokens, shape[1]).bfloat16()
        assert same(packed_rows(weight, stays=stays).linear(x, None), functional.linear(x, weight))


@multiplies
@pytest.mark.parametrize("tokens", [1, 2, MOST_TOKENS])
@pytest.mark.parametrize("shape", [(8192, 3072), (3072, 8192), (4096, 16384), (50400, 1024), (16, 4096)])
def test_the_order_is_that_of_any_number_of_rows(shape: tuple[int, int], tokens: int) -> None:
    """Sums of which nothing but their rounding is left, over more rows than the order was tried with."""
    rows, columns = shape
    half = columns // 2
    weight, x = torch.randn(rows, columns).bfloat16(), torch.randn(tokens, columns).bfloat16()
    weight[:, half:], x[:, half:] = -weight[:, :half].roll(5, dims=1), x[:, :half].roll(5, dims=1)
    assert same(product.linear(x, weight, None), functional.linear(x, weight))


@multiplies
def test_an_order_that_is_not_among_the_known_ones_is_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "_half_sums", lambda *_: [Sums(block, 4096) for block in (32, 128, 768)])
    orders._try_order.cache_clear()
    assert order_of_sums(BF16, 1, 64, 4096, True, torch.get_num_threads()) is None
    orders._try_order.cache_clear()


FLOAT_SHAPES = [(1, 64), (24, 192), (25, 193), (100, 384), (256, 1024), (1030, 576), (7, 4100), (50, 13)]


@pytest.fixture
def by_native(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each product by the native module, the number of columns after which it began a new sum; 1 for one token."""
    blocks: list[int] = []

    def watch(name: str) -> None:
        inner = getattr(kernels, name)
        monkeypatch.setattr(
            product, name, lambda *what: blocks.append(what[3].block if name == "multiply" else 1) or inner(*what)
        )

    for name in ("multiply", "multiply_token", "multiply_turned"):
        watch(name)
    return blocks


def floats(rows: int, columns: int, skip: int = 0) -> torch.Tensor:
    """That begin `skip` numbers behind a cache line."""
    weight = torch.empty(rows * columns + skip)[skip:].view(rows, columns)
    torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns), out=weight)
    weight[0, :5] = torch.tensor([0.0, -0.0, 3e38, 1e-40, -7.0])
    return weight


@multiplies_floats
@pytest.mark.parametrize("shape", FLOAT_SHAPES)
@pytest.mark.parametrize("tokens", [4, 15, 16, 17, 40, 64, 65, 128, 197, 256, 300, 512])
@pytest.mark.parametrize("threads", [1, 2])
def test_floats(shape: tuple[int, int], tokens: int, threads: int, by_native: list[int]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for bias in (None, torch.randn(shape[0])):
            weight, x = floats(*shape, skip=tokens % 5), torch.randn(2, tokens, shape[1])[:1]
            x[0, 0, :5] = torch.tensor([-0.0, 1.0, 3e38, 1e-40, 0.0])
            sums = order_of_sums(torch.float32, tokens, *shape, bias is not None, threads)
            by_native.clear()
            assert same(product.linear(x, weight, bias), functional.linear(x, weight, bias))
            if sums is None or tokens <= product.FASTER_TOKENS_ELSE:
                assert by_native == [sums.block for sums in [sums] if sums]
            if sums is not None:
                assert same(kernels.multiply(x, weight, bias, sums), functional.linear(x, weight, bias))
    finally:
        torch.set_num_threads(before)


@multiplies_floats
@pytest.mark.parametrize("tokens", [16, 128, 197])
@pytest.mark.parametrize("shape", [(1024, 1024), (4096, 1024), (1024, 4096), (3072, 768), (768, 3072), (30522, 768)])
def test_the_order_of_floats_is_that_of_any_number_of_rows(shape: tuple[int, int], tokens: int) -> None:
    weight, x = torch.randn(shape), torch.randn(tokens, shape[1])
    assert same(product.linear(x, weight, None), functional.linear(x, weight))


@multiplies_floats
def test_floats_in_any_order_that_is_asked_for() -> None:
    """Against the definition, in numbers of twice the precision: products of float32 are exact in it."""
    generator = torch.Generator().manual_seed(0)
    weight, x, bias = (torch.randn(shape, generator=generator) for shape in ((30, 100), (37, 100), (30,)))
    for block, part in ((1, 100), (16, 100), (33, 100), (33, 50), (96, 100), (16, 25), (100, 100), (512, 50)):
        expected = torch.zeros(37, 30)
        for first in range(0, 100, part):
            sums = torch.zeros(37, 30) if first else bias.expand(37, 30)
            for begin in range(first, min(first + part, 100), block):
                total = torch.zeros(37, 30)
                for column in range(begin, min(begin + block, first + part, 100)):
                    exact = x[:, None, column].double() * weight[None, :, column].double()
                    total = (total.double() + exact).float()
                sums = sums + total
            expected = expected + sums if first else sums
        assert same(kernels.multiply(x, weight, bias, Sums(block, part)), expected)


@multiplies_floats
def test_floats_that_the_native_product_is_not_for(by_native: list[int]) -> None:
    weight = floats(64, 192)

    def check(x: torch.Tensor, weight: torch.Tensor = weight) -> None:
        got = product.linear(x, weight, None)
        assert same(got.detach(), functional.linear(x, weight).detach())
        assert not by_native

    x = torch.randn(32, 192)
    check(x[: FLOAT_TOKENS.start - 1])
    check(torch.randn(FLOAT_TOKENS.stop, 192))
    check(x[:0])
    check(x.double(), weight.double())
    check(x, floats(192, 64).t())
    for some in (x, x[:1]):
        check(some.clone().requires_grad_())
        with torch.autocast("cpu", torch.bfloat16):
            check(some)
    torch.set_float32_matmul_precision("medium")
    try:
        check(x)
        check(x[:1])
    finally:
        torch.set_float32_matmul_precision("highest")


TOKEN_SHAPES = [(8, 4), (9, 8), (33, 64), (1000, 1020), (50, 2048), (3, 64), (16, 30), (4099, 768)]


@multiplies_floats
@pytest.mark.parametrize("shape", TOKEN_SHAPES)
@pytest.mark.parametrize("quarter", [0, 1, 2, 3])
def test_one_token_of_floats(shape: tuple[int, int], quarter: int, by_native: list[int]) -> None:
    memory = torch.randn(shape[0] * shape[1] + 8)
    weight = memory[(quarter - kernels.first_in_quad(memory)) % 4 :][: shape[0] * shape[1]].view(shape)
    for bias in (None, torch.randn(shape[0])):
        for x in (torch.randn(1, shape[1]), torch.randn(1, 1, shape[1] + 1)[..., 1:], torch.randn(shape[1])):
            order = order_of_token(*shape, bias is not None, quarter)
            by_native.clear()
            assert same(product.linear(x, weight, bias), functional.linear(x, weight, bias))
            assert by_native == [1] * (order == "quads")
            if order is not None:
                assert same(kernels.multiply_token(x, weight, bias, order), functional.linear(x, weight, bias))


@multiplies_floats
@pytest.mark.parametrize("shape", [(1, 1), (4, 8), (7, 33), (64, 1024), (1024, 16), (1025, 3072), (100, 5000)])
@pytest.mark.parametrize("skip", [0, 2, 5])
def test_one_token_of_floats_with_a_turned_matrix(shape: tuple[int, int], skip: int, by_native: list[int]) -> None:
    weight, bias = torch.randn(shape[0] * shape[1] + skip)[skip:].view(shape), torch.randn(shape[1])
    for x in (torch.randn(1, shape[0]), torch.randn(1, 1, shape[0])):
        at_once = order_of_columns(*shape)
        by_native.clear()
        got = product.turned(x, weight, bias)
        assert got.shape == (*x.shape[:-1], shape[1])
        assert same(got.view(1, -1), torch.addmm(bias, x.view(1, -1), weight))
        assert by_native == [1] * (at_once == 1)
        if at_once and not shape[0] % at_once:
            assert same(kernels.multiply_turned(x, weight, bias, at_once).view(1, -1), got.view(1, -1))


@multiplies_floats
def test_several_tokens_with_a_turned_matrix() -> None:
    weight, bias, x = torch.randn(64, 96), torch.randn(96), torch.randn(2, 5, 64)
    assert same(product.turned(x, weight, bias), torch.addmm(bias, x.view(10, 64), weight).view(2, 5, 96))


@multiplies_floats
def test_what_is_left_over_of_rows_is_torchs(by_native: list[int]) -> None:
    """GPT-2's vocabulary has 50257 rows, and a range of them 1105."""
    weight, x = torch.randn(1105, 1024), torch.randn(1, 1, 1024)
    assert same(product.linear(x, weight, None), functional.linear(x, weight))


@multiplies_floats
def test_an_order_of_floats_that_is_not_among_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "FLOAT_BLOCKS", (1, 5))
    orders._try_order.cache_clear()
    assert order_of_sums(torch.float32, 16, 64, 384, True, torch.get_num_threads()) is None
    orders._try_order.cache_clear()


def test_what_cannot_stay_packed() -> None:
    assert can_stay_packed(torch.bfloat16, (10, 64))
    assert not can_stay_packed(torch.float32, (10, 64))
    assert not can_stay_packed(torch.bfloat16, (10, 96))
    assert not can_stay_packed(torch.bfloat16, (64,))


def test_rows_that_are_not_there_are_not_multiplied() -> None:
    rows = packed_rows(weights(16, 64))
    rows.unbind()
    with pytest.raises(RuntimeError, match="not in memory"):
        rows.linear(torch.zeros(1, 64, dtype=torch.bfloat16), None)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that generates, as it is and packed."""
    root = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=192, intermediate_size=576, num_hidden_layers=2, num_attention_heads=4, vocab_size=9000,
        max_position_embeddings=128, attention_bias=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(root / "plain")
    pack(root / "plain", root / "packed")
    return root / "plain", root / "packed"


@pytest.mark.parametrize("resident", [0, None])
@pytest.mark.parametrize("length", [7, 40])
def test_generation_keeps_matrices_packed(pair: Any, resident: int | None, length: int) -> None:
    plain, packed = pair
    ids = torch.arange(3, 3 + length)[None]
    expected = hf.LlamaForCausalLM.from_pretrained(plain).generate(ids, max_new_tokens=12, do_sample=False)
    with hermes.load(
        packed, budget=resident_bytes() + 600 * 2**20, sequence_length=length, resident_bytes=resident
    ) as model:
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)
        prepared = model.hermes.prepared
    blocks, _ = prepared.blocks(prepared.factory(4096, 2**20), "leaf")
    kept = [name for block in blocks for name, rows in block.matrices.items() if isinstance(rows, PackedRows)]
    assert len(set(kept)) == 2 * 7 + 1


def test_a_packed_matrix_that_is_used_elsewhere_is_unpacked(pair: Any) -> None:
    plain, packed = pair
    expected = hf.LlamaForCausalLM.from_pretrained(plain).model.layers[0].mlp.up_proj.weight
    with hermes.load(packed, budget=resident_bytes() + 600 * 2**20, sequence_length=8) as model:
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight * 1, expected)
