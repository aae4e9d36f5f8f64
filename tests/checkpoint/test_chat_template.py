"""Chat templates of others, followed exactly or refused."""

from pathlib import Path

import pytest

from fastvlm_convert.checkpoint.chat_template import MAX_TEMPLATE_LENGTH, ChatTemplate, prompt_format_of
from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.prompt import QWEN_2, chat_template
from tests.checkpoints import GOLDEN, HF

CASES = Path(__file__).parent.parent / "data" / "cases"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_HF = (  # llava-hf's: pictures first, no system turn
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{{ m.role | upper + ': ' }}"
    "{% for c in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }}{% endfor %}{{ ' ' }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


def test_the_goldens_template_is_the_built_in_format():
    source = (GOLDEN / HF / "checkpoint" / "chat_template.jinja").read_text()
    assert prompt_format_of(ChatTemplate(source, {}), HF) == QWEN_2


def test_a_template_without_a_system_turn_by_default():
    source = (CASES / "hf-own-chat-template" / "chat_template.jinja").read_text()
    form = prompt_format_of(ChatTemplate(source, {}), "x")
    assert form.opening == ""
    assert form.default_system is None
    assert form.system_before == "<|im_start|>system\n"
    assert form.single_turn == "<|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n"


def test_content_as_text():
    form = prompt_format_of(ChatTemplate(CHATML, {}), "x")
    assert (form.opening, form.image) == ("", "<image>\n")


def test_pictures_first_and_no_system_turn():
    form = prompt_format_of(ChatTemplate(LLAVA_HF, {"eos_token": "</s>"}), "x")
    assert (form.images_first, form.system_before, form.assistant_after) == (True, None, " </s>")


@pytest.mark.parametrize("source", [CHATML, LLAVA_HF], ids=["chatml", "llava"])
def test_our_template_of_a_format_gives_the_format_again(source):
    form = prompt_format_of(ChatTemplate(source, {"eos_token": "</s>"}), "x")
    assert prompt_format_of(ChatTemplate(chat_template(form), {}), "x") == form


REFUSED = {
    "trimmed": (CHATML.replace("m.content", "m.content | trim"), "it writes"),
    "only the last": (
        CHATML.replace("in messages", "in messages[-1:]"),
        "depends on the messages that follow",
    ),
    "the date": ("{{ strftime_now('%Y') }}" + CHATML, "writes the current date"),
    "numbered turns": (CHATML.replace("{{ m.role }}", "{{ loop.index }}"), "it writes"),
    "nothing": ("", "leaves a message out"),
    "twice": (CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"), "writes it twice"),
    "refuses": ("{{ raise_exception('never') }}", "never"),
    "not Jinja": ("{% for", "unexpected"),
    "unknown filter": ("{{ messages | nope }}", "nope"),
    "Python errors": ("{{ messages + 1 }}", "can only concatenate|unsupported"),
    "escape": ("{{ messages.__class__.__mro__ }}", "leaves a message out|unsafe"),
    "long text": ("{{ 'a' * 999999999 }}", "multiplies texts"),
    "long loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "too far",
    ),
    "long template": (" " * (MAX_TEMPLATE_LENGTH + 1), "characters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused(case):
    source, why = REFUSED[case]
    with pytest.raises(CheckpointError, match=f"cannot be followed exactly: .*({why})") as caught:
        prompt_format_of(ChatTemplate(source, {}), "chat_template.jinja")
    assert "(chat_template.jinja)" in str(caught.value)
    assert caught.value.hint
