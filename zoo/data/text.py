"""Text: word pieces from a vocabulary file, and the prompts of zero-shot classification.

Vocabularies are named or given as files of one piece a line: ``bert`` is BERT's published uncased one, fetched at first
use, ``shapes`` that of the embedded world and ``cifar10`` that of CIFAR-10's short prompts, which come with the package
and spell any other word letter by letter.
"""

from __future__ import annotations

import os
import string
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from zoo.errors import ZooError, unknown
from zoo.paths import cache_dir, share
from zoo.weights import download

# The file of google-bert/bert-base-uncased, which facebookresearch/flip holds a copy of.
PUBLISHED = {
    "bert": (
        (
            "https://huggingface.co/google-bert/bert-base-uncased/resolve/main/vocab.txt",
            "https://raw.githubusercontent.com/facebookresearch/flip/main/vocab/vocab_bert_base.txt",
        ),
        download.Published(sha256="07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3", size=231508),
    )
}


def vocabulary_path(vocabulary: str) -> Path:
    """The file of a vocabulary given by name or path; a published one is fetched at first use.

    Raises:
        ZooError: no such name or file, or a download that fails.
    """
    if vocabulary in PUBLISHED:
        urls, facts = PUBLISHED[vocabulary]
        return download.fetch(urls, cache_dir() / "vocabularies" / f"{vocabulary}.txt", facts).path
    own = share("data") / "vocabularies" / f"{vocabulary}.txt"
    path = own if own.is_file() else Path(vocabulary).expanduser()
    if not path.is_file():
        if os.sep in vocabulary or path.suffix:
            raise ZooError(f"no vocabulary file {vocabulary!r}")
        shipped = [file.stem for file in (share("data") / "vocabularies").glob("*.txt")]
        raise unknown("vocabulary", vocabulary, [*PUBLISHED, *shipped])
    return path


class WordPiece:
    """BERT's tokenizer (Devlin et al. 2019): lower case, accents off, words cut into the longest known pieces.

    No [CLS] or [SEP] is added. The vocabulary is opened at first use.

    Args:
        vocabulary: a name or a file, see :func:`vocabulary_path`.
        length: L, to which every text is cut or filled up with piece 0, [PAD].
    """

    def __init__(self, vocabulary: str = "bert", length: int = 32) -> None:
        if length < 1:
            raise ZooError(f"texts must have at least one token, not {length}")
        self.vocabulary, self.length = vocabulary, length

    @cached_property
    def _pieces(self) -> Any:
        from tokenizers import Tokenizer
        from tokenizers.models import WordPiece as Model
        from tokenizers.normalizers import BertNormalizer
        from tokenizers.pre_tokenizers import BertPreTokenizer

        path = vocabulary_path(self.vocabulary)
        pieces = path.read_text(encoding="utf-8").splitlines()
        numbers = {piece: number for number, piece in enumerate(pieces)}
        if pieces[:1] != ["[PAD]"] or "[UNK]" not in numbers or len(numbers) != len(pieces):
            raise ZooError(f"{path} is no word-piece vocabulary: [PAD] first, [UNK] among them, every piece once")
        tokenizer = Tokenizer(Model(numbers, unk_token="[UNK]", max_input_chars_per_word=100))
        tokenizer.normalizer = BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = BertPreTokenizer()
        return tokenizer

    @property
    def size(self) -> int:
        """The number of pieces."""
        return self._pieces.get_vocab_size()

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text, all of them."""
        return self._pieces.encode(text, add_special_tokens=False).tokens

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts to piece numbers (N, L) int64."""
        out = torch.zeros(len(texts), self.length, dtype=torch.int64)
        for row, text in zip(out, texts, strict=True):
            numbers = self._pieces.encode(text, add_special_tokens=False).ids[: self.length]
            row[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        return out

    def table(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        """T prompts for each of K classes to piece numbers (K, T, L) int64."""
        return self([text for of_class in prompts for text in of_class]).reshape(len(prompts), -1, self.length)


def write_vocabulary(texts: Iterable[str], path: str | os.PathLike[str]) -> Path:
    """Writes the vocabulary of a corpus: its words, and letters and digits to spell others with; returns the path."""
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    normalise, cut = BertNormalizer(lowercase=True).normalize_str, BertPreTokenizer().pre_tokenize_str
    words = sorted({word for text in texts for word, _ in cut(normalise(text))})
    spelling = [sign + letter for sign in ("", "##") for letter in string.ascii_lowercase + string.digits]
    path = Path(path)
    path.write_text("\n".join(dict.fromkeys(["[PAD]", "[UNK]", *words, *spelling])) + "\n", encoding="utf-8")
    return path


# -------------------------------------------------------------------------------------------------- zero-shot prompts


def zero_shot(dataset: str) -> dict[str, Any]:
    """The file of curated class names and templates of a data set: {"source", "templates" {name: [...]}, "class_names"
    where the set's own do not serve}; ImageNet's templates for a set that has no file."""
    path = share("data") / "zero_shot" / f"{dataset}.yaml"
    if path.is_file():
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    general = yaml.safe_load((share("data") / "zero_shot" / "imagenet1k.yaml").read_text(encoding="utf-8"))
    return {key: value for key, value in general.items() if key != "class_names"}


def prompts(
    dataset: str, class_names: Sequence[str] | None = None, templates: str | Sequence[str] = "short"
) -> tuple[list[str], list[list[str]]]:
    """The names of K classes, and the prompts of each.

    Args:
        dataset: whose curated names and templates are taken, see :func:`zero_shot`.
        class_names: the classes in order, instead of the curated ones.
        templates: ``short`` or ``long``, or templates in each of which ``{}`` stands for the name.

    Raises:
        ZooError: no names, unknown templates, or one without ``{}``.
    """
    known = zero_shot(dataset)
    names = [name.replace("_", " ") for name in class_names or known.get("class_names") or ()]
    if not names:
        raise ZooError(f"{dataset} has no class names to make zero-shot prompts of")
    if isinstance(templates, str):
        if templates not in known["templates"]:
            raise unknown("templates", templates, known["templates"])
        templates = known["templates"][templates]
    if not templates or any("{}" not in template for template in templates):
        raise ZooError("every template of zero-shot prompts must hold {}, where the name stands")
    return names, [[template.replace("{}", name) for template in templates] for name in names]
