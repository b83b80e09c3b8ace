"""Chat templates that render `audio` and `prefix` items: LLaVA's v1 conversation, and any captioner's own."""

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

# Behind this sentence LLaVA 1.5, the published prefix and the published projector were tuned (see docs/deviations.md).
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


# A message's content as one string; a text that follows media stands on a line of its own.
CONTENT = (
    "{% macro content(message) %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'text' %}"
    "{% if not loop.first and loop.previtem['type'] != 'text' %}{{ '\n' }}{% endif %}{{ item['text'] }}"
    "{% elif item['type'] == 'image' %}IMAGE_TOKEN"
    "{% elif item['type'] in ('audio', 'prefix') %}<{{ item['type'] }}>{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endmacro %}"
)

LLAVA_V1 = (
    "{% if messages[0]['role'] != 'system' %}" + SYSTEM + " {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'] | upper }}: {% endif %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ content(message) }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ content(message) }} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

# For templates that know pictures but not sound: what is heard becomes the beginning of the text that follows it.
SOUND_AS_TEXT = (
    "{% set all = namespace(messages=[]) %}"
    "{% for message in messages %}"
    "{% if message['content'] is string or not message['content'] %}{% set all.messages = all.messages + [message] %}"
    "{% else %}"
    "{% set part = namespace(items=[], heard='') %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] in ('audio', 'prefix') %}{% set part.heard = part.heard + '<' + item['type'] + '>' %}"
    "{% elif item['type'] == 'text' and part.heard %}"
    "{% set part.items = part.items + [dict(item, text=part.heard + '\n' + item['text'])] %}{% set part.heard = '' %}"
    "{% else %}"
    "{% if part.heard %}{% set part.items = part.items + [{'type': 'text', 'text': part.heard}] %}{% endif %}"
    "{% set part.items = part.items + [item] %}{% set part.heard = '' %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if part.heard %}{% set part.items = part.items + [{'type': 'text', 'text': part.heard}] %}{% endif %}"
    "{% set all.messages = all.messages + [dict(message, content=part.items)] %}"
    "{% endif %}"
    "{% endfor %}"
    "{% set messages = all.messages %}"
)

# For templates of plain language models, which take strings only.
MEDIA_AS_TEXT = (
    "{% set all = namespace(messages=[]) %}"
    "{% for message in messages %}"
    "{% set all.messages = all.messages + [dict(message, content=content(message))] %}"
    "{% endfor %}"
    "{% set messages = all.messages %}"
)


def llava_v1_template(image_token: str = "<image>") -> str:
    """LLaVA's v1 conversation, with its system sentence where a conversation brings no system message of its own."""
    return CONTENT.replace("IMAGE_TOKEN", image_token) + LLAVA_V1


def hearing_template(template: str, image_token: str, special_tokens: dict[str, str]) -> str:
    """
    A captioner's own chat template, with `audio` and `prefix` items where it does not render them itself.

    Args:
        template (`str`): The captioner's template.
        image_token (`str`): What stands for a picture in its prompts.
        special_tokens (`dict[str, str]`): Special tokens of its tokenizer, by name; templates may use them.

    Returns:
        `str`: A template that renders pictures, sounds, prefix and text, each once.

    Raises:
        ValueError: if the template renders no pictures, or nothing at all.
    """
    problem = ""
    for preamble in ("", SOUND_AS_TEXT, CONTENT.replace("IMAGE_TOKEN", image_token) + MEDIA_AS_TEXT):
        try:
            problem = missing_items(preamble + template, image_token, special_tokens)
        except (TemplateError, TypeError) as error:
            problem = str(error)
        if not problem:
            return preamble + template
    raise ValueError(
        f"The captioner's chat template cannot be used: {problem}. Pass another as `chat_template`, or take it away "
        "from the captioner's processor to get LLaVA's v1 conversation."
    )


def missing_items(template: str, image_token: str, special_tokens: dict[str, str]) -> str:
    """Says what a template does not render exactly once, of a picture, a sound, a prefix and a text; else empty."""
    items = [{"type": "image"}, {"type": "audio"}, {"type": "prefix"}, {"type": "text", "text": "What is heard?"}]
    (prompt,), _ = render_jinja_template(
        conversations=[[{"role": "user", "content": items}]],
        chat_template=template,
        add_generation_prompt=True,
        **special_tokens,
    )
    wrong = [text for text in (image_token, "<audio>", "<prefix>", "What is heard?") if prompt.count(text) != 1]
    return f"it does not render {' and '.join(wrong)} exactly once" if wrong else ""
