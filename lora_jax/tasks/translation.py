"""A text in one language to the same in another."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from ..config.doors import TASKS
from .generated import METRICS, Generated, GeneratedConfig, Names

# ISO 639-1 codes of languages that translation sets have; any other is taken as it is written.
LANGUAGES = {
    "af": "Afrikaans", "am": "Amharic", "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech", "cy": "Welsh",
    "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian",
    "fi": "Finnish", "fr": "French", "ga": "Irish", "gl": "Galician", "gu": "Gujarati", "ha": "Hausa", "he": "Hebrew", "hi": "Hindi",
    "hr": "Croatian", "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese",
    "ka": "Georgian", "kk": "Kazakh", "km": "Khmer", "kn": "Kannada", "ko": "Korean", "lt": "Lithuanian", "lv": "Latvian",
    "mk": "Macedonian", "ml": "Malayalam", "mr": "Marathi", "ms": "Malay", "my": "Burmese", "ne": "Nepali", "nl": "Dutch",
    "no": "Norwegian", "pa": "Punjabi", "pl": "Polish", "ps": "Pashto", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian",
    "si": "Sinhala", "sk": "Slovak", "sl": "Slovenian", "so": "Somali", "sq": "Albanian", "sr": "Serbian", "sv": "Swedish",
    "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tl": "Tagalog", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu",
    "uz": "Uzbek", "vi": "Vietnamese", "xh": "Xhosa", "yo": "Yoruba", "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip
_CODE = "code such as de (of de_DE the first part is taken), which the template's {} has as its English name; or the name itself."


class TranslationConfig(GeneratedConfig):
    kind: Literal["translation"] = Field(default="translation", description="A text in another language.")
    text: str = Field(description="Column of the texts.")
    target: Names = Field(description="Column of the translations (a text each, or a list of references), or several columns.")
    source_language: str = Field(description="Language of the texts: a " + _CODE.format("{source_language}"))
    target_language: str = Field(description="Language of the translations: a " + _CODE.format("{target_language}"))
    metrics: list[str] = Field(default=["bleu", "chrf"], description=METRICS)


class Translation(Generated):
    """A text in one language to the same in another."""

    name, section = "translation", TranslationConfig

    def named(self, section: TranslationConfig) -> tuple[str, Names]:
        """`text` and `target`."""
        return section.text, section.target

    def template(self, section: TranslationConfig) -> str:
        """The language and the text, a line; the other language, whose text is wanted."""
        return "{source_language}: {text}\n{target_language}:"

    def filled(self, section: TranslationConfig, template: str) -> str:
        """With the names of the languages."""
        names = {"source_language": section.source_language, "target_language": section.target_language}
        for key, code in names.items():
            template = template.replace("{" + key + "}", language(code))
        return template


def language(code: str) -> str:
    """The English name of a language.

    >>> language("de"), language("de_DE"), language("Swiss German")
    ('German', 'German', 'Swiss German')
    """
    return LANGUAGES.get(re.split("[-_]", code)[0].lower(), code)


TASKS.register("translation", Translation())
