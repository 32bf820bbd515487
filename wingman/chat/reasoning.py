"""Which texts enclose a model's thoughts, and what becomes of them. Pure tables."""

from __future__ import annotations

from enum import Enum
from typing import Final

from msgspec import Struct


class ReasoningMode(Enum):
    """Values of `reasoning_format`, as llama-server spells them."""

    NONE = "none"
    """Thoughts stay in the content, as the model wrote them."""
    AUTO = "auto"
    DEEPSEEK = "deepseek"
    """Thoughts go to `reasoning_content` alone; `auto` is the same."""
    DEEPSEEK_LEGACY = "deepseek-legacy"
    """Thoughts go to both."""

    @property
    def in_content(self) -> bool:
        """Whether the content keeps them."""
        return self in (ReasoningMode.NONE, ReasoningMode.DEEPSEEK_LEGACY)

    @property
    def apart(self) -> bool:
        """Whether they are reported as reasoning."""
        return self is not ReasoningMode.NONE


class ReasoningTags(Struct, frozen=True):
    """The texts around thoughts. They are told from content at the start of an answer, or `anywhere`."""

    open: str
    close: str
    anywhere: bool = False

    def opened_by(self, prompt: str) -> bool:
        """Whether `prompt` ends within thoughts, so that the answer begins there."""
        return prompt.rstrip().endswith(self.open)

    @property
    def texts(self) -> tuple[str, ...]:
        """Both: often special tokens, which must not be left out of the output."""
        return (self.open, self.close)


THINK: Final = ReasoningTags("<think>", "</think>")
HARMONY: Final = ReasoningTags("<|channel|>analysis<|message|>", "<|end|>", anywhere=True)
_TEMPLATES: Final = (
    ("<|START_THINKING|>", ReasoningTags("<|START_THINKING|>", "<|END_THINKING|>")),
    ("[THINK]", ReasoningTags("[THINK]", "[/THINK]")),
    ("<seed:think>", ReasoningTags("<seed:think>", "</seed:think>")),
    ("<|inner_prefix|>", ReasoningTags("<|inner_prefix|>", "<|inner_suffix|>")),
    ("<|channel|>", HARMONY),
    ("</think>", THINK),
)
"""A text that tells a template, and its tags."""


def detect_reasoning(template_source: str) -> ReasoningTags | None:
    """The tags that models with this template use; None when it knows no thoughts."""
    return next((tags for text, tags in _TEMPLATES if text in template_source), None)
