"""Small tokenizers of the kinds that there are, trained on the spot, and texts that are hard to cut."""

import json
import random
from functools import cache
from itertools import product

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<unk>", "<pad>", "<s>", "</s>")
SUBJECTS = ("sum", "answer", "naïve mean", "東京 tower")
OBJECTS = ("numbers", "a list", "thirteen foxes", "été", "😀 faces")
CORPUS = [
    f"The {one} of {other} is {i * 37 % 2030}.\n\tdef f_{i}(x):\n        return {one}({other}) + {i}.{i % 10}\r\n"
    for i, (one, other) in enumerate(product(SUBJECTS, OBJECTS))
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def trained(kind, size, digits=False):
    """Vocabulary and merges of a model that is trained on the corpus; once, since Unigram breaks ties by chance."""
    makers = {
        "byte-level": (models.BPE, trainers.BpeTrainer, {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}),
        "SentencePiece BPE": (models.BPE, trainers.BpeTrainer, {}),
        "Unigram": (models.Unigram, trainers.UnigramTrainer, {"unk_token": "<unk>"}),
        "WordPiece": (lambda: models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer, {}),
    }
    model, trainer, options = makers[kind]
    tokenizer = Tokenizer(model())
    tokenizer.pre_tokenizer = pre_tokenization(kind, digits=digits)
    tokenizer.train_from_iterator(CORPUS, trainer(vocab_size=size, show_progress=False, **options))
    return json.loads(tokenizer.to_str())["model"]


def pre_tokenization(kind, digits=False, prefix_space=False, scheme="first"):
    """How a text is cut before the model; what SentencePiece puts before a text, by ``scheme``."""
    if kind == "WordPiece":
        return pre_tokenizers.BertPreTokenizer()
    if kind != "byte-level":
        return pre_tokenizers.Metaspace(prepend_scheme=scheme)
    cut = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    return pre_tokenizers.Sequence([*cut, pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)])


def fast(tokenizer, specials=SPECIALS, template=None):
    """As transformers has it; the specials are those of the vocabulary: unknown, padding, begin and end."""
    names = dict(zip(("unk_token", "pad_token", "bos_token", "eos_token"), specials, strict=True))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.chat_template = template
    return made


def ordered(tokens, specials, seed):
    """Ids of the specials, then of the tokens; all of them shuffled by a seed."""
    names = [*specials, *tokens]
    if seed is not None:
        random.Random(seed).shuffle(names)
    return {name: index for index, name in enumerate(names)}


def byte_level(size=400, digits=False, seed=None, specials=SPECIALS, template=None, prefix_space=False):
    """Byte-level BPE as GPT-2's; with ``digits`` they are cut one by one."""
    model = trained("byte-level", size, digits)
    made = Tokenizer(models.BPE(ordered(model["vocab"], specials, seed), [tuple(merge) for merge in model["merges"]]))
    made.pre_tokenizer, made.decoder = pre_tokenization("byte-level", digits, prefix_space), decoders.ByteLevel()
    return fast(made, specials, template)


def sentencepiece_bpe(size=300, seed=None, specials=SPECIALS, template=None, scheme="first"):
    """BPE over ``▁`` with a token for each byte, as Llama-2's."""
    model = trained("SentencePiece BPE", size)
    vocabulary = ordered([*BYTES, *model["vocab"]], specials, seed)
    merges = [tuple(merge) for merge in model["merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token=specials[0], byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenization("SentencePiece BPE", scheme=scheme)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast(made, specials, template)


def unigram(size=300, seed=None, specials=SPECIALS, template=None, scheme="first"):
    """Unigram over ``▁`` with a token for each byte."""
    scores = {piece: score for piece, score in trained("Unigram", size)["vocab"] if piece != "<unk>"}
    scores |= {byte: -30.0 for byte in BYTES}
    vocabulary = ordered(scores, specials, seed)
    pieces = [(piece, scores.get(piece, 0.0)) for piece in vocabulary]
    made = Tokenizer(models.Unigram(pieces, unk_id=vocabulary[specials[0]], byte_fallback=True))
    made.pre_tokenizer = pre_tokenization("Unigram", scheme=scheme)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return fast(made, specials, template)


def wordpiece():
    """WordPiece as BERT's, which loses white space."""
    made = Tokenizer(models.WordPiece(ordered(trained("WordPiece", 200)["vocab"], SPECIALS, None), unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenization("WordPiece"), decoders.WordPiece()
    return fast(made)


KINDS = {
    "byte-level": byte_level,
    "byte-level, digits cut": lambda **options: byte_level(digits=True, **options),
    "byte-level, small": lambda **options: byte_level(size=290, **options),
    "SentencePiece BPE": sentencepiece_bpe,
    "Unigram": unigram,
}
PIECES = (
    "The", " answer", " is", "\r\n", "\n\n", "  ", "\t", " 2015", "7", "0.5", "é", "ï", "東京", "😀", "👩\u200d👧", "x**2",
    "'s", "\u0301", "\u00a0", "\ufb01", "?", " naïve",
)  # fmt: skip
PLANES = (range(0x20, 0x300), range(0x3000, 0xD7FF), range(0x10000, 0x1FFFF))


def texts(count, seed=0, pieces=12):
    """Random texts of words, digits, line ends, emoji, and any other characters of Unicode."""
    generator = random.Random(seed)

    def piece():
        strange = generator.random() < 0.15
        return chr(generator.choice(generator.choice(PLANES))) if strange else generator.choice(PIECES)

    return ["".join(piece() for _ in range(generator.randrange(1, pieces))) for _ in range(count)]
