import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import hermes
from hermes.errors import InputError, ModelError
from hermes.tasks.streaming import BatchStreamer
from hermes.tasks.text import load_tokenizer
from hermes.tasks.text_generation import (
    PROMPT_LOOKUP,
    GenerateOptions,
    check_blocks,
    check_context,
    generate_text,
    load_draft,
)

PROMPTS = ["Hello there", "A longer prompt than the first: é"]


@pytest.mark.parametrize("arch", ["tiny-gpt2", "tiny-llama"])
@pytest.mark.parametrize(
    "options",
    [
        GenerateOptions(max_new_tokens=10),
        GenerateOptions(max_new_tokens=10, do_sample=True, temperature=1.5, top_k=40, top_p=0.9, seed=3),
        GenerateOptions(max_new_tokens=10, repetition_penalty=1.3),
    ],
    ids=["greedy", "sampled", "penalised"],
)
def test_streamed_text_is_resident_text(tiny, arch, options):
    directory = tiny(arch)
    tokenizer = load_tokenizer(directory)
    resident = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    expected = generate_text(resident, tokenizer, PROMPTS, options)
    with hermes.load(directory, budget="8GiB", batch_size=2, max_new_tokens=10, resident_bytes=0) as model:
        assert generate_text(model, tokenizer, PROMPTS, options) == expected
    assert [output.prompt for output in expected] == PROMPTS
    assert all(0 < len(output.token_ids) <= 10 for output in expected)


@pytest.mark.parametrize("arch", ["tiny-gpt2", "tiny-llama"])
@pytest.mark.parametrize("by_model", [False, True], ids=["prompt-lookup", "model"])
def test_a_draft_saves_sweeps_and_changes_no_token(tiny, arch, by_model):
    directory = tiny(arch)
    tokenizer = load_tokenizer(directory)
    prompt = ["one two three four one two three four one two three"]
    options = {"max_new_tokens": 24}
    draft = load_draft(directory, {"vocab_size": 512}, trust_remote_code=False) if by_model else None
    said: list[str] = []
    with hermes.load(directory, budget="8GiB", max_new_tokens=24, resident_bytes=0) as model:
        plain = generate_text(model, tokenizer, prompt, GenerateOptions(**options))
        sweeps = model.hermes.stats.passes
        drafted = generate_text(
            model,
            tokenizer,
            prompt,
            GenerateOptions(**options, draft=str(directory) if by_model else PROMPT_LOOKUP),
            on_token=lambda _, text: said.append(text),
            draft_model=draft,
        )
        drafted_sweeps = model.hermes.stats.passes - sweeps
        assert drafted_sweeps < sweeps if by_model else drafted_sweeps <= sweeps  # random weights need not repeat
    assert drafted == plain
    assert "".join(said) == plain[0].text


def test_a_draft_of_another_vocabulary_is_refused(tiny):
    with pytest.raises(InputError, match="a vocabulary of 512, the model one of 99"):
        load_draft(tiny("tiny-gpt2"), {"vocab_size": 99}, trust_remote_code=False)


def test_a_draft_that_is_no_decoder_is_refused(tiny):
    with pytest.raises(InputError, match="is a model for feature-extraction; give one for text-generation"):
        load_draft(tiny("tiny-bert"), {"vocab_size": 512}, trust_remote_code=False)


def test_only_whole_blocks_must_not_be_missing(tiny):
    directory = tiny("tiny-gpt2")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    check_blocks(directory, model, ["lm_head.weight", "transformer.h.1.attn.c_attn.bias", "transformer.ln_f.weight"])
    block = [f"transformer.h.1.{name}" for name, _ in model.transformer.h[1].named_parameters()]
    with pytest.raises(ModelError, match=f"lack {len(block)} parameters"):
        check_blocks(directory, model, block)


def test_a_batch_says_what_each_prompt_alone_says(tiny):
    directory = tiny("tiny-gpt2")
    tokenizer = load_tokenizer(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    options = GenerateOptions(max_new_tokens=8)
    together = generate_text(model, tokenizer, PROMPTS, options)
    assert together == [generate_text(model, tokenizer, [prompt], options)[0] for prompt in PROMPTS]


def test_what_is_streamed_adds_up_to_the_text(tiny):
    directory = tiny("tiny-llama")
    tokenizer = load_tokenizer(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    heard: dict[int, list[str]] = {0: [], 1: []}
    options = GenerateOptions(max_new_tokens=12, do_sample=True, seed=1)
    outputs = generate_text(model, tokenizer, PROMPTS, options, lambda prompt, text: heard[prompt].append(text))
    assert ["".join(heard[0]), "".join(heard[1])] == [output.text for output in outputs]
    assert len(heard[0]) >= len(outputs[0].token_ids)


def test_encoder_decoder(tiny):
    config = T5Config(
        vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, n_positions=4
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    (output,) = generate_text(
        model, load_tokenizer(tiny("tiny-llama")), ["translate"], GenerateOptions(max_new_tokens=5)
    )
    assert 0 < len(output.token_ids) <= 5


def test_output_ends_with_the_end_token(tiny):
    directory = tiny("tiny-gpt2")
    tokenizer = load_tokenizer(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    options = GenerateOptions(max_new_tokens=6)
    (free,) = generate_text(model, tokenizer, ["stop"], options)
    end = free.token_ids[2]
    model.generation_config.eos_token_id = [end]
    heard = []
    (cut,) = generate_text(model, tokenizer, ["stop"], options, lambda _, text: heard.append(text))
    assert cut.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert "".join(heard) == cut.text


def test_too_long_for_the_context(tiny):
    directory = tiny("tiny-gpt2")
    tokenizer = load_tokenizer(directory)
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):  # no weights at all: nothing must be computed
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="100 tokens of prompt and 29 new ones exceed the model's context of 128"):
        generate_text(model, tokenizer, ["x" * 100], GenerateOptions(max_new_tokens=29))
    with pytest.raises(InputError, match="130 tokens long"):
        generate_text(model, tokenizer, ["x" * 130], GenerateOptions(max_new_tokens=1))


def test_context_of_an_encoder_decoder_counts_each_side():
    config = {"is_encoder_decoder": True, "max_position_embeddings": 16}
    check_context(config, prompt_tokens=16, max_new_tokens=15)
    with pytest.raises(InputError, match="17 tokens long, the model takes 16"):
        check_context(config, prompt_tokens=17, max_new_tokens=1)


@pytest.mark.parametrize("prompts", [[], [""], ["a", ""]])
def test_empty_prompts_are_refused(tiny, prompts):
    directory = tiny("tiny-gpt2")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    with pytest.raises(InputError, match=r"empty|nothing to read"):
        generate_text(model, load_tokenizer(directory), prompts, GenerateOptions(max_new_tokens=2))


def test_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match="no tokenizer that can be used"):
        load_tokenizer(tmp_path)


def test_characters_are_said_when_they_are_whole(tiny):
    tokenizer = load_tokenizer(tiny("tiny-gpt2"))
    heard: list[tuple[int, str]] = []
    streamer = BatchStreamer(tokenizer, {511}, lambda prompt, text: heard.append((prompt, text)))
    first, second = tokenizer("é!")["input_ids"][:2], tokenizer("ab")["input_ids"]
    streamer.put(torch.zeros(2, 3, dtype=torch.long))
    for pair in zip(first, second, strict=True):
        streamer.put(torch.tensor(pair))
    streamer.put(torch.tensor([511, second[0]]))
    streamer.put(torch.tensor([511, first[0]]))  # half a character at the very end
    streamer.end()
    assert [text for prompt, text in heard if prompt == 0] == ["", "é", ""]
    assert [text for prompt, text in heard if prompt == 1] == ["a", "b", "a", "", "\N{REPLACEMENT CHARACTER}"]
