"""`LLM.encode`: scores of texts, pairs and steps; errors that touch one input only."""

import pytest
import torch
from tests.support.tiny_scoring import oracle_scores, scoring_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from lamella import LLM, EncodingOutput
from lamella_core.errors import ConfigError, EngineDeadError, RequestError, StepError
from lamella_executor.assemble import engine_limits
from lamella_executor.scoring.executor import ScoringExecutor
from lamella_executor.scoring.loop import ScoringLoop

BERT = ("BertForSequenceClassification", "three_labels")
STEPS = ("Qwen2ForProcessRewardModel", "grouped")
TEXTS = [[5, 17, 99, 4, 130, 8, 33], [12], [101, 7, 7, 64]]


def write_tokenizer(directory, *, is_pair):
    words = {"[CLS]": 1, "[SEP]": 2, "<extra_0>": 3, "[UNK]": 0}
    words |= {f"w{i}": i for i in range(4, 131)}
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    if is_pair:
        special = [("[CLS]", 1), ("[SEP]", 2)]
        backend.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


@pytest.fixture(scope="module")
def bert():
    directory, oracle = scoring_model(*BERT)
    write_tokenizer(directory, is_pair=True)
    with LLM(directory) as llm:
        yield llm, oracle


def test_texts_get_the_scores_of_the_oracle(bert):
    llm, oracle = bert
    outputs = llm.encode(TEXTS)
    for ids, output in zip(TEXTS, outputs, strict=True):
        expected = oracle_scores(BERT[0], oracle, ids)
        assert isinstance(output, EncodingOutput) and output.prompt_token_ids == ids
        assert torch.allclose(output.logits, expected, atol=3e-5)
        assert torch.allclose(output.scores, expected.softmax(-1), atol=3e-5)
        assert output.labels == ("bad", "fair", "good") and output.label == output.labels[int(expected.argmax())]


def test_text_and_pairs_are_tokenized(bert):
    llm, oracle = bert
    single = llm.encode("w5 w6")
    assert (single.prompt, single.prompt_token_ids) == ("w5 w6", [1, 5, 6, 2])
    pair, same = llm.encode([("w5 w6", "w7"), {"prompt": "w5 w6", "text_pair": "w7"}])
    assert pair.prompt_token_ids == [1, 5, 6, 2, 7, 2] and torch.equal(pair.logits, same.logits)
    expected = oracle_scores(BERT[0], oracle, pair.prompt_token_ids, [0, 0, 0, 0, 1, 1])
    assert torch.allclose(pair.logits, expected, atol=3e-5)


def test_a_bad_input_names_itself_and_nothing_runs(bert):
    llm, _ = bert
    for given, message in (
        ([[5], [131]], r"token_ids\[0\] is 131"),
        ([[5], []], "0 tokens; this engine takes 1 to 40"),
        ([list(range(5, 50))], "45 tokens"),
        ({"prompt_token_ids": [5, 6], "token_type_ids": [0]}, "1 entries for 2 tokens"),
        ({"prompt_token_ids": [5], "token_type_ids": [2]}, "allowed are 0 .. 1"),
        ({"text": "w5"}, "known: prompt"),
        ("", "empty"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.encode(given)
    with pytest.raises(RequestError, match="whole texts"):
        llm.encode("w5", step_token="w6")
    with pytest.raises(RequestError, match="LLM.encode"):
        llm.generate("w5")
    assert llm.encode([5]).label in ("bad", "fair", "good")


def test_an_engine_directory_scores_the_same(bert, tmp_path):
    llm, _ = bert
    llm.save(tmp_path / "engine")
    with LLM(tmp_path / "engine") as again:
        assert torch.equal(again.encode(TEXTS[0]).logits, llm.encode(TEXTS[0]).logits)


def test_steps_of_a_solution_are_scored():
    directory, oracle = scoring_model(*STEPS)
    write_tokenizer(directory, is_pair=False)
    with LLM(directory) as llm:
        output = llm.encode("w5 w6 <extra_0> w7 w8 <extra_0>")
        expected = oracle_scores(STEPS[0], oracle, output.prompt_token_ids)[[2, 5]]
        assert output.labels == ("wrong", "right") and output.scores.shape == (2, 2)
        assert torch.allclose(output.scores, expected.softmax(-1), atol=3e-5)
        assert llm.encode([5, 6, 3, 7, 8, 9], step_token=9).scores.shape == (1, 2)
        with pytest.raises(RequestError, match="no token 3"):
            llm.encode("w5 w6")
        with pytest.raises(RequestError, match="scores steps"):
            _ = output.label


def test_a_reward_is_a_number():
    directory, oracle = scoring_model("Qwen2ForRewardModel", "grouped")
    with LLM(directory, skip_tokenizer_init=True) as llm:
        output = llm.encode(TEXTS[0])
        assert output.labels == ("reward",) and torch.equal(output.scores, output.logits)
        assert torch.allclose(output.scores, oracle_scores("Qwen2ForRewardModel", oracle, TEXTS[0]), atol=3e-5)
        with pytest.raises(RequestError, match="no tokenizer"):
            llm.encode("w5")


def test_the_last_token_is_the_last_that_is_no_padding():
    case = ("Qwen2ForSequenceClassification", "window")
    directory, oracle = scoring_model(*case)
    texts = [[5, 17, 99, 4], [5, 17, 99, 4, 0, 0], [0, 5, 0, 4, 0], [0, 0]]
    with LLM(directory, skip_tokenizer_init=True) as llm:
        outputs = llm.encode(texts)
        assert torch.equal(outputs[0].logits, outputs[1].logits)
        for ids, output in zip(texts, outputs, strict=True):
            assert torch.allclose(output.logits, oracle_scores(case[0], oracle, ids), atol=3e-5)


def test_a_failing_step_fails_its_texts_alone(bert, monkeypatch):
    engine = bert[0].engine
    model = engine.model()
    embed = model.embed

    def fragile(ids, positions, ctx):
        if 99 in ids:
            raise RuntimeError("out of luck")
        return embed(ids, positions, ctx)

    monkeypatch.setattr(model, "embed", fragile)
    loop = ScoringLoop(model, max_batch_size=1, max_num_tokens=100)
    with ScoringExecutor(loop, engine_limits(engine, None, None), 2, scores_tokens=False) as executor:
        futures = [executor.score(text) for text in TEXTS]
        with pytest.raises(StepError, match="RuntimeError: out of luck"):
            futures[0].result(30)
        assert [future.result(30).shape for future in futures[1:]] == [(3,), (3,)]
    with pytest.raises(EngineDeadError):
        executor.score(TEXTS[0])


def test_a_generating_model_has_no_scores(tmp_path):
    from tests.support.tiny_models import hf_dir

    with LLM(hf_dir("LlamaForCausalLM", "grouped"), skip_tokenizer_init=True) as llm:
        with pytest.raises(RequestError, match="has no scores"):
            llm.encode([5, 6])
        with pytest.raises(ConfigError, match="generates text"):
            ScoringExecutor.create(llm.engine)


def test_check_compares_scores(bert, capsys):
    from lamella.cli.check import run_check

    directory = scoring_model(*BERT)[0]
    options = {"max_tokens": 4, "dtype": "float32", "device": "cpu"}
    assert run_check(directory, text="w5 w6 w7", tolerance=1e-4, **options)
    assert "labels equal" in capsys.readouterr().out
    assert not run_check(directory, text="w5 w6 w7", tolerance=0.0, **options)


@pytest.mark.parametrize("case", [STEPS, ("Qwen2ForRewardModel", "grouped")], ids=lambda case: case[0])
def test_check_compares_rewards_with_the_own_computation(case, capsys):
    from lamella.cli.check import run_check

    directory = scoring_model(*case)[0]
    write_tokenizer(directory, is_pair=False)
    options = {"text": "w5 w6 w7 w6", "max_tokens": 4, "device": "cpu", "tolerance": 1e-4}
    assert run_check(directory, dtype="float32", **options)
    out = capsys.readouterr().out
    assert f"labels equal {2 if case is STEPS else 1} of" in " ".join(out.replace("│", " ").split())
    assert "Lamella's own float32 computation" in out and case[0] in out
    assert not run_check(directory, dtype="bfloat16", **options)
