"""Conversations as text; tokens are tested beside the tokenizer, chat templates beside the checkpoint."""

from dataclasses import replace

import numpy as np
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image

from fastvlm_convert.errors import PromptError
from fastvlm_convert.preprocess import ImageSettings, pixel_values
from fastvlm_convert.prompt import (
    QWEN_2,
    Message,
    Picture,
    PromptFormat,
    build_prompt,
    chat_template,
    chatml,
    marked_message,
    user_message,
    with_system_prompt,
)

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
BEFORE = f"{SYSTEM}<|im_start|>user\n"
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
SETTINGS = ImageSettings(64, "pad")
LLAVA_STYLE = PromptFormat(
    opening="<s>",
    system_before=None,
    system_after=None,
    user_before="USER: ",
    user_after=" ",
    assistant_before="ASSISTANT: ",
    assistant_after="</s>",
    generation="ASSISTANT:",
    images_first=True,
)


class Letters:
    """A tokenizer with one token a character; notes what it was asked."""

    def __init__(self):
        self.texts = []

    def encode_texts(self, texts):
        self.texts.append(tuple(texts))
        return [ord(char) for text in texts for char in text.content]


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def pictures(count):
    return [picture(64, 64, seed) for seed in range(count)]


def build(messages, form=QWEN_2):
    """The texts between the pictures."""
    letters = Letters()
    prompt = build_prompt(messages, form, letters, SETTINGS)
    assert all(s.dtype == np.int64 for s in prompt.segments)
    texts = ["".join(map(chr, segment)) for segment in prompt.segments]
    del letters.texts[len(texts) :]  # those that look for the beginnings of answers
    assert texts == ["".join(text.content for text in asked) for asked in letters.texts]
    return prompt, texts, letters


def test_one_picture_stands_before_the_question_on_its_own_line():
    images = pictures(1)
    prompt, texts, _ = build([user_message("Who?", images)])
    assert texts == [BEFORE, f"\nWho?{AFTER}"]
    assert prompt.length(16) == len(BEFORE) + len(AFTER) + 5 + 16
    np.testing.assert_array_equal(prompt.images[0], pixel_values(images[0], SETTINGS))


def test_text_alone():
    prompt, texts, _ = build([user_message("Who?", [])])
    assert texts == [f"{BEFORE}Who?{AFTER}"]
    assert prompt.length(16) == len(texts[0])


def test_several_pictures_come_first_one_a_line():
    images = pictures(3)
    prompt, texts, _ = build([user_message("Same?", images)])
    assert texts == [BEFORE, "\n", "\n", f"\nSame?{AFTER}"]
    assert prompt.length(9) == sum(map(len, texts)) + 27
    for image, values in zip(images, prompt.images, strict=True):
        np.testing.assert_array_equal(values, pixel_values(image, SETTINGS))


def test_pictures_go_where_a_question_marks_them():
    _, texts, _ = build([marked_message("Is <image> like <image>?", pictures(2))])
    assert texts == [f"{BEFORE}Is ", " like ", f"?{AFTER}"]
    _, texts, _ = build([marked_message("<image><image>", pictures(2))])
    assert texts == [BEFORE, "", AFTER]


@pytest.mark.parametrize(
    ("question", "num_images"), [("<image>?", 0), ("<image>?", 2), ("<image> <image>", 1)]
)
def test_another_number_of_marks_is_text(question, num_images):
    assert marked_message(question, pictures(num_images)) == user_message(question, pictures(num_images))


def test_marks_are_text_unless_asked_for():
    _, texts, letters = build([user_message("What does <image> mean?", pictures(1))])
    assert texts[1] == f"\nWhat does <image> mean?{AFTER}"
    typed = [text.content for asked in letters.texts for text in asked if not text.is_format]
    assert typed == ["What does <image> mean?"]


def test_several_turns():
    messages = [
        Message("system", ("Be brief.",)),
        Message("user", (Picture(picture(64, 64)), "Who?")),
        Message("assistant", ("Ann.",)),
        Message("user", ("Where?",)),
    ]
    _, texts, _ = build(messages)
    assert texts == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        "\nWho?<|im_end|>\n<|im_start|>assistant\nAnn.<|im_end|>\n<|im_start|>user\nWhere?" + AFTER,
    ]
    _, texts, _ = build(messages[1:], LLAVA_STYLE)
    assert texts == ["<s>USER: ", "\nWho? ASSISTANT: Ann.</s>USER: Where? ASSISTANT:"]


def test_what_stands_before_an_answer_was_a_prompt_of_its_own():
    messages = [user_message("Who?", pictures(1)), Message("assistant", ("Ann.",)), user_message("Who?", ())]
    longer = [*messages, Message("assistant", ("",)), user_message("Where?", pictures(1))]
    for conversation, earlier in ((messages, [messages[:1]]), (longer, [messages[:1], messages])):
        prompt, _, _ = build(conversation)
        assert len(prompt.answers_at) == len(earlier)
        for (number, place), before in zip(prompt.answers_at, earlier, strict=True):
            segments = [*prompt.segments[:number], prompt.segments[number][:place]]
            for ours, theirs in zip(segments, build(before)[0].segments, strict=True):
                np.testing.assert_array_equal(ours, theirs)
    # Nothing is reused where a format begins an answer in another way than it asks for one.
    assert build(messages, LLAVA_STYLE)[0].answers_at == ()


def test_an_answer_that_joins_what_is_before_is_no_place_to_begin():
    class Lines(Letters):
        """Two line breaks are one token."""

        def encode_texts(self, texts):
            self.texts.append(tuple(texts))
            return [ord(c) for c in "".join(text.content for text in texts).replace("\n\n", "\v")]

    for answer, found in (("Ann.", 1), ("\nAnn.", 0)):
        messages = [user_message("Who?", ()), Message("assistant", (answer,)), user_message("Who?", ())]
        assert len(build_prompt(messages, QWEN_2, Lines(), SETTINGS).answers_at) == found


def test_a_format_may_move_pictures_first():
    content = ("Is ", Picture(picture(64, 64)), " here?")
    _, texts, _ = build([Message("user", content)])
    assert texts == [f"{BEFORE}Is ", f"\n here?{AFTER}"]
    _, texts, _ = build([Message("user", content)], LLAVA_STYLE)
    assert texts == ["<s>USER: ", "\nIs  here? ASSISTANT:"]


def test_another_system_prompt():
    form = with_system_prompt(QWEN_2, "You are a pirate.")
    assert form.default_system == "You are a pirate."
    _, texts, _ = build([user_message("Who?", [])], form)
    assert texts[0].startswith("<|im_start|>system\nYou are a pirate.<|im_end|>\n<|im_start|>user\nWho?")
    assert QWEN_2.default_system == "You are a helpful assistant."
    assert LLAVA_STYLE.default_system is None
    for ask in (
        lambda: with_system_prompt(LLAVA_STYLE, "x"),
        lambda: build([Message("system", ("x",)), user_message("?", [])], LLAVA_STYLE),
    ):
        with pytest.raises(PromptError, match="no system turn") as caught:
            ask()
        assert caught.value.hint


@pytest.mark.parametrize(
    "roles", [(), ("system",), ("assistant",), ("user", "user"), ("user", "assistant"), ("user", "system")]
)
def test_roles_out_of_order_are_refused(roles):
    with pytest.raises(PromptError, match="the roles of the messages are") as caught:
        build([Message(role, ("x",)) for role in roles])
    assert "end with user" in caught.value.hint


FORMATS = {
    "qwen_2": QWEN_2,
    "chatml without a default": replace(QWEN_2, opening=""),
    "llava": LLAVA_STYLE,
    "quotes": replace(chatml("<'\\", "'>\n\t"), image="<image>", images_first=True),
    "placeholder words": with_system_prompt(QWEN_2, "IMAGE PARTS {{ x }} {% y %}"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_chat_template_writes_the_same(name):
    form = FORMATS[name]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(chat_template(form))
    picture_ = Picture(picture(64, 64))
    conversations = [
        [Message("user", (picture_, "Who? {{ x }}\n"))],
        [
            Message("user", ("Is ", picture_, " here?")),
            Message("assistant", (" 'Yes'.\\n",)),
            Message("user", ("?",)),
        ],
    ]
    if form.system_before is not None:
        conversations += [[Message("system", ("Be brief.",)), *c] for c in conversations]
    for messages in conversations:
        _, texts, _ = build(messages, form)
        parts = [
            {
                "role": m.role,
                "content": [
                    {"type": "text", "text": p} if isinstance(p, str) else {"type": "image"}
                    for p in m.content
                ],
            }
            for m in messages
        ]
        assert template.render(messages=parts, add_generation_prompt=True) == "<image>".join(texts)
    _, texts, _ = build([user_message("Who?", [])], form)
    plain = [{"role": "user", "content": "Who?"}]
    assert template.render(messages=plain, add_generation_prompt=True) == texts[0]


def test_a_single_turn_as_apps_read_it():
    assert QWEN_2.single_turn == f"{BEFORE}<image>\n{{question}}{AFTER}"
