"""LLM end to end on a tiny random model: inputs, outputs, order, streaming, sampling, stops, saving."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from pathlib import Path

import pytest
import torch
from tests.support.text_models import live_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer

from lamella import LLM, BatchError, KvCacheConfig, RequestError, RequestOutput, SamplingParams
from lamella_core.errors import ConfigError, EngineDeadError

PROMPTS = ["Once upon a time", "The fox", "3 drops, 14 drops", "It's late"]


@pytest.fixture(scope="module")
def reference(model_dir: Path):
    """Returns a function: prompt, count -> greedy ids and text by transformers."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def generate(prompt: str, count: int) -> tuple[list[int], str]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, do_sample=False, max_new_tokens=count)[0, ids.shape[1] :].tolist()
        kept = out[: out.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in out else out
        return kept, tokenizer.decode(kept, skip_special_tokens=True)

    return generate


def test_text_equals_transformers(llm: LLM, reference):
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=24))
    assert [o.prompt for o in outputs] == PROMPTS
    for prompt, output in zip(PROMPTS, outputs):
        ids, text = reference(prompt, 24)
        assert output.outputs[0].token_ids == ids
        assert output.outputs[0].text == text
        assert output.finished and output.error is None
        assert output.prompt_token_ids == llm.tokenizer.encode(prompt)


def test_one_in_one_out(llm: LLM):
    params = SamplingParams(max_tokens=4)
    one = llm.generate("The fox", params)
    assert isinstance(one, RequestOutput) and one.text
    (listed,) = llm.generate(["The fox"], params)
    assert listed.text == one.text
    ids = llm.generate(one.prompt_token_ids, params)
    assert ids.token_ids == one.token_ids
    assert ids.text == "" and ids.prompt is None
    (of_list,) = llm.generate([one.prompt_token_ids], params)
    assert of_list.token_ids == one.token_ids
    tensor = llm.generate(torch.tensor(one.prompt_token_ids), params)
    assert tensor.token_ids == one.token_ids
    assert llm.generate([]) == []


def test_dict_prompts(llm: LLM):
    params = SamplingParams(max_tokens=4)
    text = llm.generate("The fox", params)
    for prompt in ({"prompt": "The fox"}, {"prompt": "The fox", "prompt_token_ids": text.prompt_token_ids}):
        assert llm.generate(prompt, params).text == text.text
    assert llm.generate({"prompt_token_ids": text.prompt_token_ids}, params).text == ""
    mixed = llm.generate(["The fox", text.prompt_token_ids, {"prompt": "The fox"}], params)
    assert [o.token_ids for o in mixed] == [text.token_ids] * 3


def test_params_per_prompt(llm: LLM):
    outputs = llm.generate(PROMPTS[:2], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=5)])
    assert [len(o.token_ids) for o in outputs] == [2, 5]
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "length"]


def test_many_prompts_keep_their_order(llm: LLM):
    prompts = [f"{i} drops" for i in range(40)]
    params = [SamplingParams(max_tokens=1 + i % 7) for i in range(40)]
    outputs = llm.generate(prompts, params)
    assert [o.prompt for o in outputs] == prompts
    assert [len(o.token_ids) for o in outputs] == [1 + i % 7 for i in range(40)]


def test_chat(llm: LLM):
    text = llm.tokenizer.apply_chat_template([{"role": "user", "content": "The fox"}])
    output = llm.generate(text, SamplingParams(max_tokens=3, add_special_tokens=False))
    assert output.prompt_token_ids.count(llm.tokenizer.bos_token_id) == 1
    assert output.prompt_token_ids == llm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "The fox"}], tokenize=True
    )


def test_special_tokens_in_the_output(llm: LLM):
    bias = torch.zeros(llm.engine.spec.model.vocab_size)
    bias[llm.tokenizer.pad_token_id] = 1e4
    params = SamplingParams(max_tokens=3, embedding_bias=bias)
    assert llm.generate("The fox", params).text == ""
    assert llm.generate("The fox", params.replace(skip_special_tokens=False)).text == "<pad><pad><pad>"


def stop_across_tokens(llm: LLM, text: str, ids: list[int]) -> str:
    """Returns a string of the text that starts inside one token and ends inside a later one."""
    first = len(llm.tokenizer.decode(ids[:6]))
    stop = text[first - 1 : first + 2]
    assert text.index(stop) == first - 1, "pick another position"
    return stop


def test_stop_string_over_a_token_boundary_never_leaks(llm: LLM):
    free = llm.generate("Once upon a time", SamplingParams(max_tokens=24))
    stop = stop_across_tokens(llm, free.text, free.token_ids)
    params = SamplingParams(max_tokens=24, stop=stop)
    output = llm.generate("Once upon a time", params)
    assert output.text == free.text[: free.text.index(stop)]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    pieces, shown = "", []
    for update in llm.generate_async("Once upon a time", params, streaming=True):
        pieces += update.outputs[0].text_diff
        shown.append(update.outputs[0].text)
    assert pieces == output.text
    assert all(output.text.startswith(text) for text in shown)
    kept = llm.generate("Once upon a time", params.replace(include_stop_str_in_output=True))
    assert kept.text == free.text[: free.text.index(stop) + len(stop)]


def test_stop_strings_work_with_token_id_prompts(llm: LLM):
    free = llm.generate("Once upon a time", SamplingParams(max_tokens=24))
    stop = stop_across_tokens(llm, free.text, free.token_ids)
    output = llm.generate(free.prompt_token_ids, SamplingParams(max_tokens=24, stop=[stop]))
    assert output.outputs[0].stop_reason == stop


def test_bad_words_do_not_appear(llm: LLM):
    free = llm.generate("Once upon a time", SamplingParams(max_tokens=16))
    word = llm.tokenizer.decode(free.token_ids[3:5])
    output = llm.generate("Once upon a time", SamplingParams(max_tokens=16, bad=word))
    spelled = [tuple(output.token_ids[i : i + 2]) for i in range(15)]
    assert tuple(free.token_ids[3:5]) not in spelled


def test_n_samples_are_seeded_and_differ(llm: LLM):
    params = SamplingParams(max_tokens=12, n=3, temperature=1.0, seed=5)
    output = llm.generate("The fox", params)
    texts = [o.text for o in output.outputs]
    assert len(texts) == 3 and len(set(texts)) == 3
    assert [o.text for o in llm.generate("The fox", params).outputs] == texts
    for completion in output.outputs:
        assert completion.text == llm.tokenizer.decode(completion.token_ids)


def test_beams(llm: LLM):
    output = llm.generate("The fox", SamplingParams(max_tokens=8, n=2, best_of=4, use_beam_search=True))
    assert len(output.outputs) == 2
    for completion in output.outputs:
        assert completion.text == llm.tokenizer.decode(completion.token_ids)


def test_logprobs(llm: LLM):
    output = llm.generate("The fox", SamplingParams(max_tokens=5, logprobs=2, prompt_logprobs=1))
    completion = output.outputs[0]
    assert len(completion.logprobs) == 5
    for token, entry in zip(completion.token_ids, completion.logprobs):
        assert entry[token].rank == 1 and entry[token].logprob <= 0
        assert len(entry) == 2
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.prompt_logprobs[0] is None and output.prompt_token_ids[1] in output.prompt_logprobs[1]


def test_streaming_sums_up(llm: LLM):
    params = SamplingParams(max_tokens=12)
    whole = llm.generate("The fox", params)
    stream = llm.generate_async("The fox", params, streaming=True)
    text, ids = "", []
    for update in stream:
        assert update is stream
        text += update.outputs[0].text_diff
        ids += update.outputs[0].token_ids_diff
    assert (text, ids) == (whole.text, whole.token_ids)
    assert stream.metrics.ttft_s > 0


def test_async_from_two_event_loops(llm: LLM):
    params = SamplingParams(max_tokens=10)
    expected = llm.generate("The fox", params).text
    results: dict[str, str] = {}

    async def consume(name: str) -> None:
        stream = llm.generate_async("The fox", params, streaming=True)
        results[name] = "".join([update.outputs[0].text_diff async for update in stream])
        results[name + " awaited"] = (await llm.generate_async("The fox", params)).text
        results[name + " aresult"] = (await llm.generate_async("The fox", params).aresult()).text

    threads = [threading.Thread(target=asyncio.run, args=(consume(name),)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {f"{name}{kind}": expected for name in ("one", "two") for kind in ("", " awaited", " aresult")}


def test_result_timeout_and_abort(llm: LLM):
    output = llm.generate_async("The fox", SamplingParams(max_tokens=200, ignore_eos=True))
    with pytest.raises(TimeoutError):
        output.result(timeout=0.0)
    output.abort()
    output.result(timeout=30)
    assert output.aborted and output.finished


def test_stats(llm: LLM):
    llm.generate("The fox", SamplingParams(max_tokens=3))
    stats = llm.get_stats()
    assert stats and live_blocks(llm) == 0

    async def next_stats() -> int:
        stream = llm.get_stats_async()
        pending = asyncio.ensure_future(stream.__anext__())
        await asyncio.sleep(0)
        await llm.generate_async("The fox", SamplingParams(max_tokens=3))
        return (await asyncio.wait_for(pending, 30)).iteration

    assert asyncio.run(next_stats()) > stats[-1].iteration


class FailingProcessor:
    def __call__(self, req_id, logits, token_ids, stream_ptr, client_id):
        raise ZeroDivisionError("broken processor")


def test_one_failure_in_a_batch_leaves_the_others(llm: LLM):
    good, bad = SamplingParams(max_tokens=4), SamplingParams(max_tokens=4, logits_processor=FailingProcessor())
    expected = llm.generate(PROMPTS[:3], good)
    with pytest.raises(BatchError, match="1 of 3 requests failed, first prompt 1.*broken processor") as caught:
        llm.generate(PROMPTS[:3], [good, bad, good])
    outputs = caught.value.outputs
    assert [o.text for o in outputs][::2] == [o.text for o in expected][::2]
    assert [o.error is None for o in outputs] == [True, False, True]
    with pytest.raises(RequestError, match="broken processor"):
        llm.generate(PROMPTS[0], bad)
    assert llm.generate(PROMPTS[0], good).text == expected[0].text


def test_an_invalid_prompt_keeps_the_batch_from_running(llm: LLM):
    llm.generate("The fox", SamplingParams(max_tokens=1))
    time.sleep(0.1)  # its last iteration is recorded
    before = llm.get_stats()[-1].iteration
    for bad, match in (("", "prompt is empty"), ("fox " * 300, "at most 255"), ([10**6], "token ids must be in")):
        with pytest.raises(RequestError, match=f"prompt 2: .*{match}"):
            llm.generate(["The fox", "It's late", bad])
    assert llm.get_stats()[-1].iteration == before


def test_save_and_reload_are_equal(llm: LLM, tmp_path: Path):
    params = SamplingParams(max_tokens=12)
    expected = [o.text for o in llm.generate(PROMPTS, params)]
    llm.save(tmp_path / "engine")
    llm.save(tmp_path / "engine")  # again over the same
    with LLM(tmp_path / "engine") as reloaded:
        assert [o.text for o in reloaded.generate(PROMPTS, params)] == expected
        assert reloaded.tokenizer.apply_chat_template([{"role": "user", "content": "a"}]) == "<s><|user|>a<|assistant|>"


def test_two_at_once_and_an_engine_object(llm: LLM, model_dir: Path):
    params = SamplingParams(max_tokens=12)
    expected = llm.generate("The fox", params).text
    with LLM(model_dir) as second, LLM(llm.engine) as shared:
        futures = [x.generate_async("The fox", params) for x in (llm, second, shared) for _ in range(3)]
        assert {f.result(30).text for f in futures} == {expected}


class Reversed:
    """A custom tokenizer without extras."""

    def encode(self, text):
        return [ord(c) % 400 for c in text]

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


def test_custom_tokenizer(model_dir: Path, tmp_path: Path, caplog):
    with LLM(model_dir, tokenizer=Reversed()) as llm:
        output = llm.generate("The fox", SamplingParams(max_tokens=5))
        assert output.text == Reversed().decode(output.token_ids)
        llm.save(tmp_path / "engine")
    assert "cannot be saved" in caplog.text
    with pytest.raises(ConfigError, match="tokenizer"):
        LLM(tmp_path / "engine")


def test_a_broken_tokenizer_fails_its_request_only(model_dir: Path):
    class Broken(Reversed):
        def decode(self, ids):
            raise KeyError("no such token")

    with LLM(model_dir, tokenizer=Broken()) as llm:
        with pytest.raises(RequestError, match="no such token"):
            llm.generate("The fox", SamplingParams(max_tokens=5))
        assert len(llm.generate([1, 2], SamplingParams(max_tokens=5, ignore_eos=True)).token_ids) == 5


def test_skip_tokenizer_init(model_dir: Path):
    with LLM(model_dir, skip_tokenizer_init=True, kv_cache_config=KvCacheConfig(max_tokens=512)) as llm:
        assert llm.tokenizer is None
        assert llm.generate([1, 2, 3], SamplingParams(max_tokens=3)).text == ""
        for kind, params in (("text", None), ("stop", SamplingParams(stop="a")), ("bad", SamplingParams(bad="a"))):
            with pytest.raises(RequestError, match="no tokenizer"):
                llm.generate("The fox" if kind == "text" else [1, 2], params)


def test_build_progress_is_shown_on_request(model_dir: Path, capsys):
    LLM(model_dir, enable_tqdm=True, skip_tokenizer_init=True).shutdown()
    assert "lay out weights" in capsys.readouterr().err
    LLM(model_dir, skip_tokenizer_init=True).shutdown()
    assert "lay out weights" not in capsys.readouterr().err


def test_shutdown_is_idempotent_and_final(model_dir: Path):
    llm = LLM(model_dir)
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        llm.generate("The fox")


def test_it_cannot_be_pickled(llm: LLM):
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(llm)
