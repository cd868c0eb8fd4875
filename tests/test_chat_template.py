"""Chat templates: tokens as Hugging Face gives them, and what is asked stays text."""

import json
from types import SimpleNamespace

import pytest
from bigram_model import BigramModel, PieceTokenizer

from whp_fast.errors import UserError
from whp_fast.evaluate import evaluate
from whp_fast.evaluation.chat_template import ChatTemplate, load_chat_template
from whp_fast.evaluation.judge_question import judge_question
from whp_fast.evaluation.model_judge import ModelJudge
from whp_fast.extraction.prompting import PROMPT, asked_ids
from whp_fast.prompts import EvaluationSet, FamiliarityPrompt

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content.strip() }} [/INST]"
    "{% else %}{{ raise_exception('only users') }}{% endif %}{% endfor %}"
)
SPECIAL = {"<|im_start|>": 900, "<|im_end|>": 901, "<s>": 1, "</s>": 2}


class Letters:
    """A token a character, its code; a text that begins here gets a space in front, as in sentencepiece."""

    bos_id, eos_id = 1, 2

    def encode(self, text):
        return [ord(c) for c in " " + text]

    def encode_inside(self, text):
        return [ord(c) for c in text]


def template(text, special=SPECIAL):
    return ChatTemplate(text, special, {"bos_token": "<s>", "eos_token": "</s>"})


def codes(text):
    return [ord(c) for c in text]


def test_special_tokens_of_the_template_and_of_no_one_else():
    ids = template(CHATML).ids(Letters(), " say <|im_end|> ", "3")
    end = [901, *codes("\n"), 900, *codes("assistant\n3")]
    assert ids == [900, *codes(" user\nsay <|im_end|>"), *end]
    ids = template(LLAMA_2).ids(Letters(), "who?")
    assert ids == [1, *codes(" [INST] who? [/INST]")]


def test_the_answer_stands_where_the_template_puts_it():
    assert template(CHATML).answer_space == "" and template(LLAMA_2).answer_space == " "
    assert template("{{ messages[0].content }}<|im_end|>").answer_space == ""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{% for", "the chat template cannot be rendered (.*); mend it"),
        ("{{ raise_exception('no') }}", r"cannot be rendered \(no\)"),
        ("{{ messages.__class__.__mro__ }}", "cannot be rendered"),
        ("nothing of it", "shows a user's message 0 times"),
        ("{{ messages[0].content * 2 }}", "shows a user's message 2 times"),
    ],
)
def test_templates_that_are_no_use(text, told):
    with pytest.raises(UserError, match=told):
        template(text)


def test_where_a_folder_keeps_its_template(tmp_path):
    tokenizer = SimpleNamespace(bos_id=1, eos_id=None)
    assert load_chat_template(tmp_path, tokenizer) is None
    config = {"bos_token": {"content": "<s>"}, "eos_token": None, "chat_template": LLAMA_2}
    config["added_tokens_decoder"] = {"900": {"content": "<|im_start|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_chat_template(tmp_path, tokenizer).ids(Letters(), "x") == [1, *codes(" [INST] x [/INST]")]
    several = [{"name": "tool_use", "template": "?"}, {"name": "default", "template": CHATML}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": several}))
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"added_tokens": [{"id": 901, "content": "<|im_end|>"}]})
    )
    found = load_chat_template(tmp_path, tokenizer).ids(Letters(), "x")
    assert found == template(CHATML).ids(Letters(), "x")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert load_chat_template(tmp_path, tokenizer).ids(Letters(), "x") == codes(" x!")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json: not JSON"):
        load_chat_template(tmp_path, tokenizer)


@pytest.mark.parametrize("text", [CHATML, LLAMA_2])
def test_as_transformers_renders_it(text):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": "user", "content": "He met  Orrin\n"}]
    render = utils._compile_jinja_template(text).render
    whole = render(messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
    pieces = {number: piece for piece, number in SPECIAL.items()}
    ids = template(text).ids(Letters(), "He met  Orrin\n")
    assert "".join(pieces.get(i) or chr(i) for i in ids).replace(" ", "") == whole.replace(" ", "")


class Spelling(PieceTokenizer):
    """A piece a character; an answer is a digit."""

    def __init__(self):
        super().__init__([*map(chr, range(10, 127))])


def test_a_chat_model_judges_in_its_template():
    item, tokenizer = FamiliarityPrompt("He met", ("Orrin",)), Spelling()
    chat = ChatTemplate("{{ messages[0].content }} ## ", {}, {"bos_token": "", "eos_token": ""})
    model = BigramModel(tokenizer, {" ": {"2": 0.6, "3": 0.3, "x": 0.1}})
    judge = ModelJudge(model, tokenizer, "chatty", chat=chat)
    assert judge("He met", " Orrin", item) == 2
    question = judge_question("He met", " Orrin", item)
    assert judge._encoded(question, "2") == tokenizer.encode(f"{question} ## 2")


def test_a_dictionary_is_asked_for_in_the_template():
    prompt = PROMPT.format(passage="Orrin came.")
    plain, chatty = (asked_ids([prompt], Letters(), chat)[0] for chat in (None, template(LLAMA_2)))
    assert plain == [1, *codes(f" {prompt}")]
    question = prompt.removesuffix("translations = {").strip()
    assert chatty == [1, *codes(f" [INST] {question} [/INST] translations = {{")]


def test_familiarity_prompts_in_a_template(monkeypatch):
    seen = []
    from whp_fast import evaluate as module

    monkeypatch.setattr(
        module, "generated_texts", lambda m, t, rows, *_: seen.extend(rows) or ["x"] * len(rows)
    )
    chat, files = template(CHATML), EvaluationSet(familiarity=[FamiliarityPrompt("Who?", ("Orrin",))])
    model = SimpleNamespace(training=False)
    evaluate(model, Letters(), files, chat=chat)
    evaluate(model, Letters(), files)
    assert seen == [chat.ids(Letters(), "Who?"), [1, *codes(" Who?")]]
