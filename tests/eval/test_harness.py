"""lm-eval's tasks in a tiny model: the same figures as lm-eval alone, kept, gone on with, and refused."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

pytest.importorskip("lm_eval")

from chats import tokenizer
from moesmith.errors import UserError
from moesmith.eval import harness, harness_models
from moesmith.eval.harness import ask, read_tasks
from moesmith.eval.harness_models import Kept, check_scores_prompts, in_memory, on_server, server_url
from tasks import write_tasks

WHOLE = ["sums", "choices", "texts"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tok():
    """Every id of the tiny vocabulary is some text."""
    return tokenizer(special=[f"<{i}>" for i in range(27)])


def memory(model, tok, chat=True, batch_size=4):
    return in_memory(model, tok, batch_size=batch_size, room=512, chat=chat)


def asked(lm, tasks, path, chat=True, progress=lambda *_: None):
    kept = Kept(lm, path, progress)
    try:
        return ask(kept, tasks, chat=chat), kept
    finally:
        kept.close()


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize("chat", [True, False])
def test_scores_are_those_of_lm_eval_alone(model, tok, folder, tmp_path, chat):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found, _ = asked(
        memory(model, tok, chat), read_tasks(WHOLE, folder, few_shot=2), tmp_path / "r.jsonl", chat
    )
    alone = simple_evaluate(
        model=memory(model, tok, chat), tasks=WHOLE, num_fewshot=2, apply_chat_template=chat,
        fewshot_as_multiturn=chat, bootstrap_iters=0, fewshot_random_seed=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )  # fmt: skip
    for score in found.scores:
        assert score.value == alone["results"][score.task][f"{score.metric},none"], score
        assert score.n == 12
    for name in WHOLE:
        mine = [item for item in found.items if item.task == name]
        for item, sample in zip(mine, alone["samples"][name], strict=True):
            assert item.id == sample["doc_id"]
            for metric in sample["metrics"]:
                assert json.dumps(item.metrics[metric]) == json.dumps(harness.plain(sample[metric]))


def test_an_item_says_what_was_asked_wanted_and_answered(model, tok, folder, tmp_path):
    found, _ = asked(memory(model, tok), read_tasks(["sums", "choices"], folder), tmp_path / "r.jsonl")
    first, choice = found.items[0], found.items[12]
    assert first.target == "25" and "12+13?" in first.prompt and first.prompt.endswith("assistant\n")
    assert first.metrics == {"exact_match": float(first.answer == "25")}
    assert choice.task == "choices" and len(choice.choices) == len(choice.logprobs) == 4
    assert (
        choice.target == "25" and choice.answer == choice.choices[choice.logprobs.index(max(choice.logprobs))]
    )
    assert choice.metrics["acc"] == float(choice.answer == choice.target)


def test_log_probabilities_are_the_models_own(model, tok, folder, tmp_path):
    """Through the template, no token before it, in plain PyTorch.

    lm-eval counts white space at the end of a prompt, here the line break after `assistant`, to the choice.
    """
    found, _ = asked(memory(model, tok, batch_size=3), read_tasks(["choices"], folder), tmp_path / "r.jsonl")
    item = found.items[5]
    for choice, value in zip(item.choices, item.logprobs, strict=True):
        prompt = tok.encode(item.prompt.rstrip("\n"), add_special_tokens=False)
        answer = tok.encode("\n" + choice, add_special_tokens=False)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        own = sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
        assert value == pytest.approx(own, abs=1e-4)


def test_the_template_says_what_a_prompt_begins_with(model):
    from tokenizers.processors import TemplateProcessing

    tok = tokenizer()
    tok.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tok.encode("ab")[0] == 1
    assert memory(model, tok, chat=True).tok_encode("ab") == tok.encode("ab", add_special_tokens=False)
    assert memory(model, tok, chat=False).tok_encode("ab") == tok.encode("ab")


def test_a_score_has_an_interval_and_one_metric_stands_for_its_task(model, tok, folder, tmp_path):
    found, _ = asked(memory(model, tok), read_tasks(["both", "texts"], folder), tmp_path / "r.jsonl")
    by = {(score.task, score.metric): score for score in found.scores}
    assert [key for key, score in by.items() if score.main] == [
        ("choices", "acc"), ("shuffled", "acc"), ("texts", "word_perplexity")]  # fmt: skip
    acc, words = by["choices", "acc"], by["texts", "word_perplexity"]
    assert acc.right == round(12 * acc.value) and acc.interval[0] <= acc.value <= acc.interval[1]
    assert words.right is None and words.form == "weighted_perplexity"
    assert words.interval[0] < words.value < words.interval[1] and not words.higher_is_better
    (group,) = found.groups
    pooled = [item.metrics["acc"] for item in found.items if item.task in ("choices", "shuffled")]
    assert (group.task, group.n, group.main) == ("both", 24, True)
    assert (
        group.value == pytest.approx(sum(pooled) / 24) and group.interval[0] < group.value < group.interval[1]
    )


# ---------------------------------------------------------------- tasks


def test_choices_are_shuffled_by_the_seed_alone(folder):
    """Neither other tasks nor what `datasets` keeps from an earlier run changes the order."""

    def orders(names, seed):
        task = read_tasks(names, folder, seed=seed).loaded["tasks"]["shuffled"]
        return [row["choices"] for row in task.eval_docs]

    alone = orders(["shuffled"], 0)
    assert orders(["choices", "sums", "shuffled"], 0) == alone == orders(["shuffled", "choices"], 0)
    assert orders(["both"], 0) == alone, "nor the group it is asked with"
    other = orders(["shuffled"], 1)
    assert other != alone and sorted(map(sorted, other)) == sorted(map(sorted, alone))


def test_the_callers_generator_is_left_as_it_was(folder):
    import random

    random.seed(3)
    expected = random.random()
    random.seed(3)
    read_tasks(["shuffled"], folder, seed=9)
    assert random.random() == expected


def test_a_limit_is_spread_over_the_data_and_longer_than_it_is_all(folder):
    tasks = read_tasks(["sums", "choices"], folder, limit=4)
    assert tasks.samples == {"sums": [0, 3, 6, 9], "choices": [0, 3, 6, 9]}
    assert tasks.counts() == {"sums": 4, "choices": 4}
    assert read_tasks(["sums"], folder, limit=99).counts() == {"sums": 12}


def test_the_items_of_a_limit_are_those_of_the_whole(model, tok, folder, tmp_path):
    every, _ = asked(memory(model, tok), read_tasks(["choices"], folder), tmp_path / "a.jsonl")
    some, _ = asked(memory(model, tok), read_tasks(["choices"], folder, limit=4), tmp_path / "b.jsonl")
    whole = {item.id: item for item in every.items}
    assert [item.id for item in some.items] == [0, 3, 6, 9]
    for item in some.items:
        assert (item.key, item.asked, item.answer) == (
            whole[item.id].key, whole[item.id].asked, whole[item.id].answer)  # fmt: skip


def test_every_look_at_a_task_sees_the_same_rows(folder):
    """lm-eval looks several times, and its shuffle draws anew each time."""
    task = read_tasks(["shuffled"], folder).loaded["tasks"]["shuffled"]
    assert list(task.eval_docs) == list(task.eval_docs) == list(task.test_docs())
    assert [row["choices"][row["label"]] for row in task.eval_docs] == [
        row["answer"] for row in task.eval_docs
    ]


def test_examples_and_longest_answers_are_set_or_said(folder, tmp_path):
    tasks = read_tasks(["sums", "choices"], folder, few_shot=3, max_new_tokens=2).loaded["tasks"]
    assert [task.get_config("num_fewshot") for task in tasks.values()] == [3, 3]
    assert harness.longest_answer(tasks["sums"]) == 2
    fixed = tmp_path / "fixed"
    fixed.mkdir()
    (fixed / "fixed.yaml").write_text(
        (folder / "sums.yaml").read_text().replace("task: sums", "task: fixed\nnum_fewshot: 0")
    )
    found = read_tasks(["fixed"], fixed, few_shot=3)
    assert found.notes == ["fixed is asked without examples: the task fixes 0"]
    assert found.loaded["tasks"]["fixed"].get_config("num_fewshot") == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("unsafe_code: true\n", "runs the code"),
        ('doc_to_image: ["question"]\n', "pictures"),
    ],
)
def test_tasks_that_cannot_be_run_are_refused(folder, tmp_path, change, said):
    (tmp_path / "odd.yaml").write_text(change + (folder / "sums.yaml").read_text().replace("sums", "odd"))
    with pytest.raises(UserError, match=said):
        read_tasks(["odd"], tmp_path)


def test_data_that_is_not_here_is_one_line(folder, tmp_path, monkeypatch):
    (tmp_path / "away.yaml").write_text(
        (folder / "sums.yaml").read_text().replace("sums", "away").replace(f"{folder}/test", "/nowhere/test")
    )
    with pytest.raises(UserError, match="away: its data is not on this machine") as caught:
        read_tasks(["away"], tmp_path)
    assert "\n" not in caught.value.message

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'some/set' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(UserError, match=r"not on this machine: Couldn't reach 'some/set'") as caught:
        read_tasks(["sums"], folder)
    assert "connect once" in caught.value.hint


def test_a_task_twice_is_refused(folder):
    with pytest.raises(UserError, match="names choices twice"):
        read_tasks(["choices", "both"], folder)


@pytest.mark.slow  # reads the names of all of lm-eval's own tasks
def test_a_name_that_nobody_has(folder):
    with pytest.raises(UserError, match="no task arc_esay") as caught:
        read_tasks(["arc_esay"], folder)
    assert "arc_easy" in caught.value.hint


def test_without_lm_eval_there_is_a_line_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        harness.check_installed()
    assert caught.value.hint == 'pip install "moesmith[eval]"'


# ---------------------------------------------------------------- kept


def forwards(model, counts):
    return model.register_forward_hook(lambda *_: counts.append(1))


def test_what_was_answered_is_not_asked_again(model, tok, folder, tmp_path):
    whole, _ = asked(memory(model, tok), read_tasks(WHOLE, folder), tmp_path / "whole.jsonl")
    path, seen, on_disk = tmp_path / "r.jsonl", [], []

    def stop(done, total):
        seen.append((done, total))
        if len(seen) == 15:
            on_disk.extend(path.read_text().splitlines())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asked(memory(model, tok), read_tasks(WHOLE, folder), path, progress=stop)
    lines = path.read_text().splitlines()
    assert len(lines) == 15 and seen[-1][0] <= seen[-1][1]
    assert on_disk == lines, "a kill that nobody hears of loses nothing"
    path.write_text("\n".join(lines) + '\n{"key": "torn')

    counts = []
    hook = forwards(model, counts)
    found, kept = asked(memory(model, tok), read_tasks(WHOLE, folder), path)
    again = len(counts)
    asked(memory(model, tok), read_tasks(WHOLE, folder), tmp_path / "third.jsonl")
    fresh = len(counts) - again
    counts.clear()
    last, _ = asked(memory(model, tok), read_tasks(WHOLE, folder), path)
    hook.remove()
    assert kept.found == 15 and 0 < again < fresh and not counts
    for one, other in zip(found.items, whole.items, strict=True):  # other batches, other rounding
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert (one.id, one.answer, one.key) == (other.id, other.answer, other.key)
    assert last.items == found.items


def test_a_prompt_asked_twice_is_answered_once_but_drawn_answers_each_time(tmp_path):
    class Request:
        def __init__(self, *args):
            self.args = args

    class Model:
        asked: list = []

        def set_cache_hook(self, hook):
            self.hook = hook

        def generate_until(self, requests, disable_tqdm):
            self.asked += requests
            answers = [f"{i}" for i in range(len(requests))]
            for one, answer in zip(requests, answers, strict=True):
                self.hook.add_partial("generate_until", one.args, answer)
            return answers

    greedy, drawn = {"do_sample": False}, {"do_sample": True}
    lm = Model()
    kept = Kept(lm, tmp_path / "r.jsonl", lambda *_: None)
    requests = [Request("a", greedy), Request("b", drawn), Request("a", greedy), Request("b", drawn)]
    assert kept.generate_until(requests) == ["0", "1", "0", "2"]
    assert len(lm.asked) == 3 and len((tmp_path / "r.jsonl").read_text().splitlines()) == 1


def test_logits_that_are_no_numbers_are_an_error(model, tok, folder, tmp_path):
    def spoil(module, args, out):
        out.logits = out.logits * float("nan")
        return out

    hook = model.register_forward_hook(spoil)
    try:
        with pytest.raises(UserError, match="not a number"):
            asked(memory(model, tok), read_tasks(["choices"], folder), tmp_path / "r.jsonl")
    finally:
        hook.remove()


def test_prompts_that_do_not_fit_are_counted(model, tok, folder, tmp_path):
    lm = in_memory(model, tok, batch_size=4, room=60, chat=True)
    _, kept = asked(lm, read_tasks(["choices"], folder, few_shot=2), tmp_path / "r.jsonl")
    assert kept.cut > 0
    _, kept = asked(memory(model, tok), read_tasks(["choices"], folder, few_shot=2), tmp_path / "s.jsonl")
    assert kept.cut == 0


def test_nothing_but_progress_is_on_stderr(model, tok, folder, tmp_path, capfd):
    import sys

    asked(
        memory(model, tok), read_tasks(["choices", "texts"], folder), tmp_path / "r.jsonl",
        progress=lambda done, total: print(f"{done}/{total}", file=sys.stderr),
    )  # fmt: skip
    out, err = capfd.readouterr()
    assert out == "" and set(err.split()) == {f"{i}/48" for i in range(1, 49)} | {
        f"{i}/12" for i in range(1, 13)
    }


# ---------------------------------------------------------------- servers


class Served:
    """A server of the tiny model with OpenAI's two routes, as far as lm-eval asks them."""

    def __init__(self, model, tok, echo=True, fails=0, broken=False):
        self.model, self.tok, self.echo, self.fails, self.asked = model, tok, echo, fails, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self.answer({"data": [{"id": "tiny"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, body))
                if outer.fails:
                    outer.fails -= 1
                    self.send_response(500)
                    self.end_headers()
                    return
                self.answer(None if broken else outer.reply(self.path, body))

            def answer(self, facts):
                data = b"{no" if broken else json.dumps(facts).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reply(self, path, body):
        from moesmith.eval.exact_match import generate

        if path.endswith("chat/completions"):
            ids = self.tok.apply_chat_template(body["messages"], add_generation_prompt=True)["input_ids"]
            ((text, _),) = generate(self.model, self.tok, [list(ids)], body["max_tokens"])
            for stop in body["stop"]:
                text = text.split(stop)[0]
            return {"choices": [{"index": 0, "message": {"content": text}}]}
        (ids,) = body["prompt"]
        with torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        new = int(logits[-1].argmax())
        given = [None, *(logits[i, t].item() for i, t in enumerate([*ids[1:], new]))]
        top = [None, *({str(int(row.argmax())): row.max().item()} for row in logits)]
        if not self.echo:
            given, top = given[-1:], top[-1:]
        return {"choices": [{"index": 0, "logprobs": {"token_logprobs": given, "top_logprobs": top}}]}


@pytest.fixture
def served(model, tok):
    made = []

    def serve(**options):
        made.append(Served(model, tok, **options))
        return made[-1]

    yield serve
    for one in made:
        one.server.shutdown()
        one.server.server_close()


@pytest.fixture(scope="module")
def words(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    tok.save_pretrained(folder)
    return folder


def test_a_server_scores_choices_as_the_model_in_memory(model, tok, words, folder, served, tmp_path):
    server = served()
    assert harness_models.server_models(server.url) == ["tiny"]
    check_scores_prompts(server.url, "tiny", [10, 11, 12])
    lm = on_server(server.url, "tiny", tokenizer=words, room=512, concurrency=3, chat=False, seed=0)
    there, _ = asked(lm, read_tasks(["choices"], folder), tmp_path / "s.jsonl")
    here, _ = asked(memory(model, tok), read_tasks(["choices"], folder), tmp_path / "m.jsonl")
    for mine, theirs in zip(here.items, there.items, strict=True):
        assert theirs.logprobs == pytest.approx(mine.logprobs, abs=1e-4)
        assert (theirs.answer, theirs.metrics, theirs.prompt) == (mine.answer, mine.metrics, mine.prompt)


def test_a_chat_server_answers_as_the_model_in_memory_and_errors_are_tried_again(
    model, tok, folder, served, tmp_path
):
    server = served(fails=2)
    lm = on_server(server.url, "tiny", tokenizer=None, room=None, concurrency=2, chat=True, seed=7)
    there, _ = asked(lm, read_tasks(["sums"], folder, limit=4), tmp_path / "s.jsonl")
    here, _ = asked(memory(model, tok), read_tasks(["sums"], folder, limit=4), tmp_path / "m.jsonl")
    assert [item.metrics for item in there.items] == [item.metrics for item in here.items]
    assert [a.answer.strip() for a in there.items] == [a.answer.strip() for a in here.items]
    path, body = server.asked[0]
    assert path == "/v1/chat/completions" and body["model"] == "tiny" and body["temperature"] == 0
    assert body["messages"] == [{"role": "user", "content": body["messages"][0]["content"]}]
    assert (body["seed"], body["max_tokens"], body["stop"]) == (7, 5, ["\n", "#"])


def test_a_server_that_keeps_failing_is_one_line(folder, served, tmp_path):
    server = served(fails=99)
    lm = on_server(server.url, "tiny", tokenizer=None, room=None, concurrency=2, chat=True, seed=0)
    with pytest.raises(UserError, match="the server failed: .*500") as caught:
        asked(lm, read_tasks(["sums"], folder, limit=1), tmp_path / "s.jsonl")
    assert "goes on" in caught.value.hint


@pytest.mark.parametrize("found", [{}, {"choices": [{"index": 0, "message": {"content": None}}]}])
def test_a_server_that_answers_without_content_has_answered_nothing(folder, served, tmp_path, found):
    server = served()
    server.reply = lambda path, body: found
    lm = on_server(server.url, "tiny", tokenizer=None, room=None, concurrency=2, chat=True, seed=0)
    got, _ = asked(lm, read_tasks(["sums"], folder, limit=2), tmp_path / "s.jsonl")
    assert [item.answer for item in got.items] == ["", ""]
    assert [score.right for score in got.scores] == [0]


def test_a_server_that_answers_no_json_is_one_line(folder, served, tmp_path):
    server = served(broken=True)
    lm = on_server(server.url, "tiny", tokenizer=None, room=None, concurrency=2, chat=True, seed=0)
    with pytest.raises(UserError, match="the server failed"):
        asked(lm, read_tasks(["sums"], folder, limit=1), tmp_path / "s.jsonl")


def test_a_server_without_log_probabilities_of_prompts_is_found_out(served):
    """llama-server answers such a request with those of the new token, and no error."""
    with pytest.raises(UserError, match="no log-probabilities of a prompt: 1 for 3 tokens"):
        check_scores_prompts(served(echo=False).url, "tiny", [10, 11, 12])
    with pytest.raises(UserError, match="answers 500"):
        check_scores_prompts(served(fails=1).url, "tiny", [10, 11, 12])
    with pytest.raises(UserError, match="does not answer"):
        harness_models.server_models("http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    "given",
    [
        "127.0.0.1:80",
        "http://127.0.0.1:80/",
        "http://127.0.0.1:80/v1",
        "http://127.0.0.1:80/v1/chat/completions",
    ],
)
def test_a_servers_address_in_any_form(given):
    assert server_url(given) == "http://127.0.0.1:80/v1"


@pytest.mark.slow  # a whole server, with its engine
def test_our_own_server_answers_as_the_same_adapter_in_memory(folder, tmp_path):
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name)
    import served as ours

    tok, memory_model = ours.tokenizer(), ours.model()
    memory_model.set_adapter("first")
    tok.save_pretrained(tmp_path / "words")
    with ours.running(context=256) as server:
        url = server_url(server.url)
        check_scores_prompts(url, "first", [10, 11, 12])
        for name, chat in (("choices", False), ("sums", True)):
            words = None if chat else tmp_path / "words"
            lm = on_server(url, "first", tokenizer=words, room=256, concurrency=3, chat=chat, seed=0)
            tasks = read_tasks([name], folder, limit=4)
            there, _ = asked(lm, tasks, tmp_path / f"{name}.jsonl")
            here = asked(
                memory(memory_model, tok), read_tasks([name], folder, limit=4), tmp_path / f"m{name}"
            )[0]
            for mine, theirs in zip(here.items, there.items, strict=True):
                assert theirs.logprobs == pytest.approx(mine.logprobs, abs=1e-3)
                assert (theirs.answer.strip(), theirs.metrics) == (mine.answer.strip(), mine.metrics)
