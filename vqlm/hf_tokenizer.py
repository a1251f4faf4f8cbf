"""A run folder's vocabulary as a tokenizer of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from vqlm.checkpoint import Medium, load_medium, save_medium
from vqlm.vocabulary import END, N_SPECIAL, PAD, UNKNOWN, ByteVocabulary

_SPECIAL = {PAD: "<pad>", END: "</s>", UNKNOWN: "<unk>"}


class VqlmTokenizer(PreTrainedTokenizer):
    """Bytes or word pieces, as ``checkpoint.load_medium`` finds them in a folder.

    A text becomes the start symbol (END, ``</s>``) and its tokens, as vqlm's own commands read a
    prompt; ``add_special_tokens=False`` leaves the start out.  Special symbols written out in a
    text are text.  Padding is on the left, as generation wants it.

    Args:
        medium_file, vocab_file: ``data.json`` and ``vocabulary.model``; None: bytes.
        kwargs: what every tokenizer of transformers takes.

    Raises:
        ValueError: damaged files, or a model of pictures.
    """

    vocab_files_names = {
        "medium_file": "data.json", "vocab_file": "vocabulary.model",
    }  # fmt: skip
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self, medium_file: str | None = None, vocab_file: str | None = None, **kwargs: Any
    ) -> None:
        known = medium_file or vocab_file
        medium = load_medium(Path(known).parent) if known else Medium()
        if medium.kind != "text":
            raise ValueError(
                f"{known} is of a model of pictures, which has no tokenizer; sample it with "
                "vqlm sample"
            )
        self.vocabulary = medium.vocabulary
        names = dict(_SPECIAL)
        for i in range(N_SPECIAL, self.vocabulary.size):
            names[i] = self._name(i)
        self._names = [names[i] for i in range(self.vocabulary.size)]
        self._ids = {name: i for i, name in names.items()}
        symbols = {"pad_token": _SPECIAL[PAD], "unk_token": _SPECIAL[UNKNOWN]}
        symbols |= {"bos_token": _SPECIAL[END], "eos_token": _SPECIAL[END]}
        fixed = {"clean_up_tokenization_spaces": False, "split_special_tokens": True}
        super().__init__(**{"padding_side": "left", **symbols, **fixed, **kwargs})

    def _name(self, i: int) -> str:
        """A name for id ``i``, one for each: the bytes it stands for, as Latin-1, or its number."""
        if isinstance(self.vocabulary, ByteVocabulary):
            return self.vocabulary.decode([i]).decode("latin-1")
        # A byte and a piece of one character stand for the same text.
        return f"{i}:{self.vocabulary.decode([i]).decode('latin-1')}"

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.vocabulary.size

    def get_vocab(self) -> dict[str, int]:
        """Every token's id."""
        return dict(self._ids)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._names[i] for i in self.vocabulary.encode(text.encode()).tolist()]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, UNKNOWN)

    def _convert_id_to_token(self, index: int) -> str:
        # A padded model has more ids.
        return self._names[index] if index < len(self._names) else _SPECIAL[UNKNOWN]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        pieces = [
            token.encode() if token in _SPECIAL.values()
            else self.vocabulary.decode([self._ids[token]])
            for token in tokens
        ]  # fmt: skip
        return b"".join(pieces).decode("utf-8", "replace")

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """The start symbol before each sequence."""
        second = [] if token_ids_1 is None else [END, *token_ids_1]
        return [END, *token_ids_0, *second]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for each special id of ``build_inputs_with_special_tokens``, 0 for each of a text."""
        if already_has_special_tokens:
            mask: list[int] = super().get_special_tokens_mask(token_ids_0, token_ids_1, True)
            return mask
        second = [] if token_ids_1 is None else [1, *[0] * len(token_ids_1)]
        return [1, *[0] * len(token_ids_0), *second]

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Writes ``data.json`` and, if there is one, ``vocabulary.model``."""
        folder = Path(save_directory)
        save_medium(Medium(vocabulary=self.vocabulary), folder)
        written = [folder / name for name in self.vocab_files_names.values()]
        return tuple(str(path) for path in written if path.exists())
