import pytest
import torch

from chats import sums, tokenizer
from moesmith.errors import UserError
from moesmith.eval.exact_match import Answered, ExactMatch, chat_prompt, evaluate_exact_match, generate


def same(row, answer):
    return float(answer == row["messages"][-1]["content"])


class Parrot:
    """Answers each prompt with a fixed text, ended by the model's own stop token."""

    training = False
    device = torch.device("cpu")

    def __init__(self, tok, answers):
        self.tok, self.answers = tok, answers
        self.generation_config = type("G", (), {"eos_token_id": tok.convert_tokens_to_ids("<|im_end|>")})()

    def eval(self):
        return self

    def train(self, mode):
        return self

    def generate(self, input_ids, attention_mask, max_new_tokens, **kwargs):
        said = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self.tok.decode(ids[mask.bool()])
            answer = next(text for key, text in self.answers.items() if key in prompt)
            tokens = self.tok(answer + "<|im_end|>").input_ids[:max_new_tokens]
            said.append(torch.tensor(tokens + [kwargs["pad_token_id"]] * (max_new_tokens - len(tokens))))
        return torch.cat([input_ids, torch.stack(said)], dim=1)


def test_counts_and_records(tok):
    rows = sums(4)  # 0+1? 1+2? 2+3? 3+4? -> 1. 3. 5. 7.
    answers = {"0+1?": "1.", "1+2?": " 3.\n", "2+3?": "It is 5.", "3+4?": "twenty-seven thousand"}
    result = evaluate_exact_match(Parrot(tok, answers), tok, rows, same, batch_size=3, max_new_tokens=10)
    assert [record.question for record in result.records] == [
        "0+1?",
        "1+2?",
        "2+3?",
        "3+4?",
    ]  # in the order given
    assert [record.exact for record in result.records] == [True, True, False, False]
    assert [record.mentions for record in result.records] == [True, True, True, False]
    assert [record.cut for record in result.records] == [False, False, False, True]
    assert (result.n, result.correct, result.mentioned, result.rate) == (4, 2, 3, 0.5)
    low, high = result.interval
    assert low == pytest.approx(0.15, abs=0.001) and high == pytest.approx(0.85, abs=0.001)
    facts = result.facts()
    assert facts["records"][2]["answer"] == "It is 5."
    assert ExactMatch.from_facts(facts).facts() == facts


@pytest.mark.parametrize(
    ("gold", "answer", "mentions"),
    [
        ("12", "It is 12.", True), ("12", "It is 112.", False), ("12", "It is 12.5", False),
        ("12", "It is -12", False), ("-12", "It is -12", True), ("12", "12", True), ("12", "12th", False),
    ],
)  # fmt: skip
def test_what_counts_as_mentioned(tok, gold, answer, mentions):
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": gold}]}
    result = evaluate_exact_match(Parrot(tok, {"x": answer}), tok, [row], same)
    assert result.records[0].mentions is mentions


def test_an_answer_does_not_depend_on_its_neighbours(model, tok):
    """Left padding is masked and does not shift positions: batched == alone, short and long prompts
    together.
    """
    prompts = [
        chat_prompt(tok, [{"role": "user", "content": text}]) for text in ("a", "bc" * 30, "hello?", "x" * 9)
    ]
    alone = [generate(model, tok, [prompt], 12)[0] for prompt in prompts]
    assert generate(model, tok, prompts, 12) == alone
    assert len({text for text, _ in alone}) > 1  # a model that always says the same would prove nothing


def test_greedy_is_the_argmax_of_every_step(model, tok):
    prompt = chat_prompt(tok, [{"role": "user", "content": "abc"}])
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    wanted = tok.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
    assert generate(model, tok, [prompt], 6)[0][0] == wanted


def test_mode_of_the_model_is_kept(model, tok):
    model.train()
    evaluate_exact_match(model, tok, sums(1), same, max_new_tokens=1)
    assert model.training
    model.eval()


def test_progress_reaches_the_number_of_rows(model, tok):
    done = []
    evaluate_exact_match(model, tok, sums(5), same, batch_size=2, max_new_tokens=1, on_batch=done.append)
    assert done == [2, 4, 5]


def test_rows_that_cannot_be_asked(model, tok):
    with pytest.raises(UserError, match="no rows"):
        evaluate_exact_match(model, tok, [], same)
    with pytest.raises(UserError, match="row 0.*assistant turn"):
        evaluate_exact_match(model, tok, [{"messages": [{"role": "user", "content": "a"}]}], same)
    with pytest.raises(UserError, match="no chat template"):
        evaluate_exact_match(model, tokenizer(template=None), sums(1), same)


def test_right_by_the_verifier_counts_as_mentioned():
    record = Answered("q", "1/2", "0.5", score=1.0, mentions=False, cut=False)
    assert ExactMatch([record], 0.0).mentioned == 1
