"""Pairs in all of TRL's forms, by chat templates of the common kinds, against TRL's own ids."""

import hashlib
import json
import types

import pytest
from datasets import Dataset
from refusals import refused
from tiny_models import CHATML, bytewise
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from allo_lib.data import miniature
from allo_lib.data.preferences import encode_preference, read_pairs
from allo_lib.engine import models
from allo_lib.engine.encoding import encode_pairs, encode_prompt

# --- tokenizers and templates --------------------------------------------------------------------

GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}"
    "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# Thoughts stand in the turns after the last question only, there also where they are empty.
QWEN3 = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% set n = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set n.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}"
    "<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > n.last %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>\n"
    "{{ call.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
LAST = (  # a system message stands in the last turn, if that is the user's
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
CUT = INST.replace("{% else %} {{ m.content }}", "{% else %} {{ m.content.split('</think>')[-1] }}")
OPEN = (  # a template that ends no turn by a token
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)


def sentencepiece():
    """Words of letters with a sign for the blank before them, and one before every text."""
    words = ["<unk>", "<s>", "</s>", "<pad>", "\n", "▁", "▁Yes", "Yes", "▁No", "No", "▁Q", "Q", ":",
             "▁now", "w", "s", *"abcdefghijklmnopqrt"]  # fmt: skip
    scores = [(word, -1.0 - 0.1 * (len(word) < 2)) for word in words]
    core = Tokenizer(tokenizer_models.Unigram(scores, unk_id=0, byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>",
    )  # fmt: skip


IM = ("<|im_start|>", "<|im_end|>")
CHATML_PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
# A tokenizer, the text of the prompt "Hi", and what the template writes around a reply.
KINDS = {
    "chatml": (bytewise(CHATML, eos="<|im_end|>", special=IM[:1]), CHATML_PROMPT, "{}<|im_end|>"),
    "gemma": (bytewise(GEMMA, "<bos>", special=("<start_of_turn>", "<end_of_turn>")),
              "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
              "{}<end_of_turn>"),
    "phi3": (bytewise(PHI3, "<s>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|end|>")),
             "<|user|>\nHi<|end|>\n<|assistant|>\n", "{}<|end|>\n<|endoftext|>"),
    "qwen3": (bytewise(QWEN3, eos="<|im_end|>", special=IM[:1],
                       added=("<think>", "</think>", "<tool_call>", "</tool_call>")),
              CHATML_PROMPT, "<think>\n\n</think>\n\n{}<|im_end|>"),
    "turn's end not special": (bytewise(CHATML, added=IM), CHATML_PROMPT, "{}<|im_end|>"),
    "inst": (bytewise(INST, "<s>", "</s>"), "<s>[INST] Hi [/INST]", " {}</s>"),
    "no end": (bytewise(OPEN), "### user:\nHi\n\n### assistant:\n", "{}\n\n<eos>"),
    "no end, blanks among the tokens": (
        bytewise(OPEN, added=("\n\n", "\n")), "### user:\nHi\n\n### assistant:\n", "{}\n\n<eos>"),
    "a blank token behind the end": (
        bytewise(GEMMA, "<bos>", special=("<start_of_turn>", "<end_of_turn>"), added=("\n",)),
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", "{}<end_of_turn>"),
}  # fmt: skip


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content} | more


def texts(tokenizer, row):
    """Encode a pair and read it back: prompt, chosen, rejected."""
    ids = encode_preference(tokenizer, row, "pair 0").ids
    return tuple(tokenizer.decode(ids[key]) for key in ("prompt", "chosen", "rejected"))


def trl_ids(tokenizer, row) -> dict:
    """Encode a row as TRL's DPOTrainer does; it looks at nothing of itself but the tokenizer."""
    trainer = types.SimpleNamespace(_tokenizer=tokenizer)
    config = DPOConfig(output_dir="unused", max_length=None, report_to=[], use_cpu=True)
    (made,) = DPOTrainer._prepare_dataset(
        trainer, Dataset.from_list([row]), tokenizer, config, "train"
    )
    return {key: made[f"{key}_ids"] for key in ("prompt", "chosen", "rejected")}


# --- chat templates ------------------------------------------------------------------------------

PAIR = {"prompt": [user("Hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}


@pytest.mark.parametrize(("tokenizer", "prompt", "reply"), KINDS.values(), ids=KINDS)
def test_a_response_ends_as_the_template_ends_a_turn(tokenizer, prompt, reply):
    assert texts(tokenizer, PAIR) == (prompt, reply.format("yes"), reply.format("no"))


def test_an_added_token_that_a_reply_ends_with_does_not_end_it():
    row = PAIR | {"chosen": [assistant("<t>x</t>")]}
    for template, end in ((OPEN, "\n\n<eos>"), (CHATML.replace("<|im_end|>", "<eos>"), "<eos>")):
        tokenizer = bytewise(template, added=("<t>", "</t>"))
        assert texts(tokenizer, row)[1:] == (f"<t>x</t>{end}", f"no{end}")


def test_a_prompt_that_is_written_otherwise_before_a_reply_is_refused():
    """Else its last words would be trained as the reply's, and the system message lost."""
    tokenizer, system = bytewise(LAST, "<s>"), {"role": "system", "content": "Be kind."}
    assert texts(tokenizer, PAIR) == ("<s>[INST] Hi[/INST]", " yes<eos>", " no<eos>")
    with refused("pair 1: the chat template writes the prompt's messages otherwise before"):
        encode_preference(tokenizer, PAIR | {"prompt": [system, user("Hi")]}, "pair 1")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "no end" not in kind])
def test_ids_of_messages_are_trls_up_to_the_blank_behind_the_end(kind):
    tokenizer = KINDS[kind][0]
    longer = PAIR | {"prompt": [user("a"), assistant("b"), user("c")]}
    for row in (PAIR, longer):
        ours, theirs = encode_preference(tokenizer, row, "").ids, trl_ids(tokenizer, row)
        assert ours["prompt"] == theirs["prompt"]
        for side in ("chosen", "rejected"):
            kept = len(ours[side])
            assert ours[side] == theirs[side][:kept]
            assert tokenizer.decode(theirs[side][kept:]) in ("", "\n")


def test_a_generation_prompt_that_no_conversation_has_counts_to_the_reply_and_is_told():
    tokenizer = bytewise(OPEN.replace("assistant:\n{% endif", "assistant:\nthink{% endif"))
    found = encode_preference(tokenizer, PAIR, "pair 0")
    assert found.merged and tokenizer.decode(found.ids["prompt"]).endswith("assistant:\n")


def test_special_tokens_in_messages_stay_letters_in_prompt_and_reply():
    tokenizer = KINDS["chatml"][0]
    row = {"prompt": [user("a<|im_end|>")], "chosen": [assistant("<|im_end|>")],
           "rejected": [assistant("x")]}  # fmt: skip
    ids, end = encode_preference(tokenizer, row, "pair 0").ids, tokenizer.eos_token_id
    assert [ids[key].count(end) for key in ("prompt", "chosen", "rejected")] == [1, 1, 1]
    assert len(ids["chosen"]) == len("<|im_end|>") + 1


# --- where the prompt is -------------------------------------------------------------------------


def test_the_prompt_may_be_in_the_replies_or_a_string_or_both():
    tokenizer = KINDS["gemma"][0]
    expected = encode_preference(tokenizer, PAIR, "pair 0")
    both = {side: [user("Hi"), *PAIR[side]] for side in ("chosen", "rejected")}
    for row in (both, PAIR | {"prompt": "Hi"}, both | {"prompt": "Hi"}, PAIR | both,
                PAIR | {"chosen": "yes", "rejected": "no"}):  # fmt: skip
        assert encode_preference(tokenizer, row, "pair 0") == expected
    assert expected.ids["prompt"] == trl_ids(tokenizer, both)["prompt"]


def test_a_string_prompt_is_one_of_the_messages_that_stand_before_the_replies():
    tokenizer = KINDS["chatml"][0]
    before = [{"role": "system", "content": "Be kind."}, user("a"), assistant("b"), user("Hi")]
    row = {side: [*before, *PAIR[side]] for side in ("chosen", "rejected")}
    expected = encode_preference(tokenizer, PAIR | {"prompt": before}, "pair 0")
    assert encode_preference(tokenizer, row | {"prompt": "Hi"}, "pair 0") == expected
    for change, told in [
        ({"prompt": "Ho"}, "chosen has 4 messages before the reply that are not the prompt"),
        ({"chosen": PAIR["chosen"]}, "chosen and rejected do not follow the same messages"),
    ]:
        with refused(f"pair 0: {told}"):
            encode_preference(tokenizer, row | change, "pair 0")


# --- strings -------------------------------------------------------------------------------------

STRINGS = {"prompt": "Q: is it so\n", "chosen": "Yes now", "rejected": "No"}
IMPLICIT = [("Q: a\nYes", "Q: a\nNo"), ("Is it so? I can", "Is it so? I do"), ("so it", "so 1")]


def test_strings_explicit_or_implicit_get_the_ids_that_trl_gives():
    rows = [STRINGS, *({"chosen": one, "rejected": other} for one, other in IMPLICIT)]
    for tokenizer in (bytewise(), bytewise(bos="<s>"), bytewise(bos="<s>", adds_bos=True),
                      sentencepiece()):  # fmt: skip
        for row in rows:
            assert encode_preference(tokenizer, row, "").ids == trl_ids(tokenizer, row)
        ids = encode_preference(tokenizer, STRINGS, "").ids
        assert ids["prompt"] == encode_prompt(tokenizer, STRINGS["prompt"])
    # No blank gets into a reply after a newline.
    assert tokenizer.convert_ids_to_tokens(ids["chosen"]) == ["Yes", "▁now", "</s>"]
    assert tokenizer.convert_ids_to_tokens(ids["rejected"]) == ["No", "</s>"]


@pytest.mark.parametrize("change", [{"prompt": ""}, {}, {"\ufeffprompt": "Q"}])
def test_pairs_without_any_prompt_are_refused_whatever_the_tokenizer_adds(change):
    row = {"chosen": "Yes", "rejected": "No"} | change
    for tokenizer in (bytewise(), bytewise(bos="<s>", adds_bos=True)):
        with refused("pair 0: no prompt, and the replies begin with none"):
            encode_preference(tokenizer, row, "pair 0")


def test_strings_are_told_where_the_model_has_a_chat_template_and_messages_as_text_refused():
    tokenizer = KINDS["chatml"][0]
    counts = [read_pairs(tokenizer, [row], 512, None, "raise").plain for row in (STRINGS, PAIR)]
    assert counts == [1, 0]
    assert read_pairs(bytewise(), [STRINGS], 512, None, "raise").plain == 0
    cells = {key: json.dumps(value) for key, value in PAIR.items()}  # as in a .csv
    with refused("pair 0: the prompt string is a list of chat messages as JSON"):
        encode_preference(tokenizer, cells, "pair 0")


def test_a_written_bos_is_the_one_at_the_beginning():
    for tokenizer in (bytewise(bos="<s>", adds_bos=True), bytewise(bos="<s>")):
        written = encode_preference(tokenizer, STRINGS | {"prompt": "<s>Q"}, "").ids
        assert written["prompt"] == [tokenizer.bos_token_id, *tokenizer.encode("Q")[-1:]]
        with refused("the prompt string contains the special token '<s>'"):
            encode_preference(tokenizer, STRINGS | {"prompt": "Q<s>"}, "pair 0")


def test_tokens_that_merge_over_the_boundary_are_the_replys_and_told():
    tokenizer = bytewise(merges=[("o", "k")])
    found = encode_preference(tokenizer, {"prompt": "go", "chosen": "k", "rejected": "n"}, "")
    assert found.merged
    assert [tokenizer.decode(ids) for ids in found.ids.values()] == ["g", "ok<eos>", "on<eos>"]
    assert found.ids == trl_ids(tokenizer, {"prompt": "go", "chosen": "k", "rejected": "n"})


FORMS = ["strings that merge", "in both replies", "in both replies, unmarked", "messages"]


@pytest.mark.parametrize("form", FORMS)
def test_pairs_of_one_prompt_are_on_one_side_of_a_split(form):
    """However its end is read before a reply, and whatever words the replies share."""
    tokenizer = bytewise(CHATML, merges=[(":", "Ġ")], special=("<|im_start|>", "<|im_end|>"))
    pairs = []
    for number in range(20):
        for a, b in (("so it is", "so not"), (" yes", " no")):
            asked = f"\n\nHuman: {number}?\n\nAssistant:"
            pairs.append({
                "strings that merge": {"prompt": asked, "chosen": a, "rejected": b},
                "in both replies": {"chosen": asked + a, "rejected": asked + b},
                "in both replies, unmarked": {side: asked.replace("Assistant", "A") + reply
                                              for side, reply in (("chosen", a), ("rejected", b))},
                "messages": {"prompt": [user(asked)], "chosen": [assistant(a)],
                             "rejected": [assistant(b)]},
            }[form])  # fmt: skip
    read = read_pairs(tokenizer, pairs, 512, None, "raise")
    assert form == "messages" or len({tuple(row["prompt"]) for row in read.rows}) == 40
    train, held_out = read.split(0.3, 0)
    sides = [{number // 2 for number in part.numbers} for part in (train, held_out)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 20
    assert held_out.asked == [read.asked[number] for number in held_out.numbers]


def test_messages_that_say_the_same_are_one_prompt():
    """Whatever the order of their keys, keys that no template reads, and blanks at the ends."""
    forms = [user("Hi"), {"content": "Hi", "role": "user"}, user("Hi ") | {"turn_id": 3}]
    pairs = [PAIR | {"prompt": [form]} for form in forms] + [PAIR | {"prompt": [user("Ho")]}]
    read = read_pairs(KINDS["gemma"][0], pairs, 512, None, "raise")
    assert [read.asked.count(asked) for asked in read.asked] == [3, 3, 3, 1]


# --- tools, calls and thoughts -------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLED = {
    "prompt": [user("1+1?")],
    "chosen": [{"role": "assistant", "tool_calls": [CALL]}],
    "rejected": [assistant("no")],
}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_calls_and_thoughts_are_what_the_template_writes(tools):
    tokenizer = KINDS["qwen3"][0]
    row = CALLED | {"tools": tools, "rejected": [assistant("no", reasoning_content="hm")]}
    prompt, chosen, rejected = texts(tokenizer, row)
    assert prompt.startswith('<|im_start|>system\n{"type": "function"')
    assert chosen.endswith(
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    )
    assert rejected == "<think>\nhm\n</think>\n\nno<|im_end|>"
    found = encode_preference(tokenizer, row, "")
    assert '"name": "add"' in found.texts["chosen"] and "hm" in found.texts["rejected"]
    ours, theirs = found.ids, trl_ids(tokenizer, row | {"tools": json.dumps([TOOL])})
    assert ours["prompt"] == theirs["prompt"]
    assert all(theirs[side][: len(ours[side])] == ours[side] for side in ("chosen", "rejected"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tools": [TOOL], "chosen": [assistant("x")]}, "leaves out tools"),
        ({}, "leaves out tool_calls"),
        ({"chosen": [assistant("x", reasoning_content="hm")]}, "leaves out reasoning_content"),
        ({"chosen": [{"role": "assistant"}]}, "expected a dict with role and content"),
        ({"tools": "add", "chosen": [assistant("x")]}, "pair 3, tools: "),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [TOOL]}, "tools need chat"),
        (PAIR | {"prompt": [*PAIR["prompt"], {"role": "tool", "content": "2"}]}, "of role 'tool'"),
    ],
)
def test_what_the_template_leaves_out_is_refused_by_name(change, told):
    with refused("pair 3", told):
        encode_preference(KINDS["phi3"][0], CALLED | change, "pair 3")


def test_thoughts_that_a_template_cuts_off_a_reply_are_refused():
    row = PAIR | {"rejected": [assistant("<think>hm</think>no")]}
    with refused("pair 3", "leaves out thoughts in a reply"):
        encode_preference(bytewise(CUT, "<s>"), row, "pair 3")
    assert texts(bytewise(INST, "<s>"), row)[2] == " <think>hm</think>no<eos>"


def test_what_arrow_fills_in_is_not_there():
    """Its columns give each row the keys of all rows, at any depth."""

    def filled(one: dict) -> dict:
        return one | {"unit": None, "function": one["function"] | {"strict": None}}

    call = filled(CALL)
    call["function"]["arguments"] = {"a": 1, "b": None}
    arrow = CALLED | {"tools": [filled(TOOL)],
                      "chosen": [{"role": "assistant", "tool_calls": [call]}]}  # fmt: skip
    plain = CALLED | {"tools": [TOOL]}
    assert texts(KINDS["qwen3"][0], arrow) == texts(KINDS["qwen3"][0], plain)


def test_arguments_for_the_template_and_empty_columns_are_taken_as_trl_does():
    template = QWEN3.replace("assistant\n{% endif %}", "assistant\n{{ hint }}{% endif %}", 1)
    tokenizer = bytewise(template.replace("n.last %}", "n.last and not hint %}", 1), special=IM)
    row = PAIR | {"chat_template_kwargs": {"hint": ""}, "tools": None}
    empty = [assistant("yes", tool_calls=None, reasoning_content=None)]
    assert encode_preference(tokenizer, row | {"chosen": empty}, "") == encode_preference(
        tokenizer, PAIR, ""
    )
    hinted = PAIR | {"chat_template_kwargs": {"hint": "!"}}
    assert encode_preference(tokenizer, hinted, "").merged  # only the generation prompt has it


# --- the study's own encodings -------------------------------------------------------------------


MINIATURE = [
    {"prompt": one.prompt, "chosen": "therefore 1", "rejected": f"so {2 + i % 5}"}
    for family in miniature.FAMILIES
    for i, one in enumerate(miniature.problems(family, "pairs", 4, 0))
]
REAL = [
    {"prompt": [user("What is 12 x 3?\n\nAnswer in one word.")],
     "chosen": [assistant("12 x 3 = 36.\nThe answer is: 36")], "rejected": [assistant("35")]},
    {"prompt": [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello!"),
                user("Löffel?")],
     "chosen": [assistant(" A spoon.\n\nAnything else?\n")], "rejected": [assistant("")]},
    {"prompt": "Question: why?\nAnswer:", "chosen": " Because.", "rejected": "\n\nNo."},
]  # fmt: skip


def digest(tokenizer, pairs) -> str:
    """Hash the ids that the study gives to pairs, which have to be those of `align`."""
    rows = encode_pairs(tokenizer, pairs, 512)
    assert rows == [encode_preference(tokenizer, row, "").ids for row in pairs]
    ids = [[r["prompt"], r["chosen"], r["rejected"]] for r in rows]
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:16]


def test_ids_of_the_miniature_are_those_of_the_committed_results():
    assert digest(miniature.tokenizer(), MINIATURE) == "b208dfad77e2f445"


@pytest.mark.slow
def test_ids_of_smollm2_are_those_of_the_committed_results():
    tokenizer = AutoTokenizer.from_pretrained(models.smollm2_folder())
    assert digest(tokenizer, REAL) == "ba83883b02a8654f"
