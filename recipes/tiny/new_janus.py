"""Write an untrained tiny Janus.

    python -m recipes.tiny.new_janus --out runs/tiny_start

The text tokenizer is a sentencepiece word model trained on the captions of the shards.
The language model has random weights, from which `recipes/tiny/base.yaml` trains it.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

import sentencepiece
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.janus.configuration_janus import JanusConfig

from mmtensorar.backbones import janus
from mmtensorar.cli import Parser, command
from mmtensorar.data.shards import Manifest, iterate_shard

# Names as in the released text tokenizer, where the role marks are also whole tokens.
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
SPECIAL = (
    BOS,
    EOS,
    PAD,
    "<begin_of_image>",
    "<end_of_image>",
    "<image_placeholder>",
    "<|User|>",
    "<|Assistant|>",
)


def train_sentencepiece(lines: list[str], model_type: str) -> list[tuple[str, float]]:
    """Train a sentencepiece model.

    Args:
        lines: the text to train on.
        model_type: word or char.

    Returns its pieces with their log probabilities, the unknown piece first.
    """
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=buffer,
        vocab_size=1000,  # far above what a caption grammar needs, so all words are kept
        hard_vocab_limit=False,
        model_type=model_type,
        character_coverage=1.0,
        normalization_rule_name="identity",
        user_defined_symbols=["\n"],  # sentencepiece would drop it at the end of a line
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        unk_id=0,
        num_threads=1,
        minloglevel=2,
    )
    trained = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
    return [(trained.id_to_piece(i), trained.get_score(i)) for i in range(trained.get_piece_size())]


def train_text_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """Train sentencepiece on captions and return it as a fast tokenizer with Janus's
    special tokens first.

    Pieces are the words of the captions; other words are split into characters.
    Sentencepiece's unigram model does not suit such captions: it looks for pieces in
    the list of distinct words, where "red" occurs once, so it split most colours into
    letters.
    """
    words = dict(train_sentencepiece(captions, "word"))
    # The characters of the prompt template must be pieces too.
    letters = [piece for piece, _ in train_sentencepiece(captions + [":"] * 10, "char") if piece not in words]
    unknown, *rest = words.items()
    pieces = [unknown, *((name, 0.0) for name in SPECIAL), *rest, *((letter, -40.0) for letter in letters)]
    fast = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    fast.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=pieces[0][0],
        extra_special_tokens=list(SPECIAL[3:]),
    )


def read_captions(folder: Path, num_shards: int = 4) -> list[str]:
    """The captions of the first shards of a folder.

    Raises ValueError for damaged shards.
    """
    shards = Manifest.read(folder).shards[:num_shards]
    return [sample.members["txt"].decode() for shard in shards for sample in iterate_shard(folder, shard)]


def config_for(
    text_tokenizer: PreTrainedTokenizerFast, image_tokenizer: Path, *, width: int, layers: int
) -> JanusConfig:
    """The configuration of a tiny Janus.

    Args:
        text_tokenizer: gives the number of text tokens and the special ids.
        image_tokenizer: folder of a VQ model, which gives the number of image tokens
            and codes.
        width: D of the language model; one attention head per 32.
        layers: layers of the language model.
    """
    vq = JanusConfig().vq_config.__class__.from_pretrained(image_tokenizer).to_dict()
    vq |= {"projection_dim": width, "image_token_embed_dim": width}
    grid = vq["num_patches"]
    return JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(text_tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 32,
            "num_key_value_heads": width // 32,
            "max_position_embeddings": 256,
            "bos_token_id": text_tokenizer.bos_token_id,
            "eos_token_id": text_tokenizer.eos_token_id,
            "pad_token_id": text_tokenizer.pad_token_id,
        },
        # Never built; its numbers only have to agree with the grid.
        vision_config={
            "image_size": grid,
            "patch_size": 1,
            "num_image_tokens": grid * grid,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "projection_dim": width,
        },
        vq_config=vq,
        image_token_id=text_tokenizer.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=False,
    )


@command
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m recipes.tiny.new_janus",
        description="Write an untrained tiny Janus.",
        example="--out runs/tiny_start",
    )
    parser.add_argument(
        "--shards", type=Path, default=Path("data/shapes_base"), help="shard set whose captions are read"
    )
    parser.add_argument(
        "--image-tokenizer",
        type=Path,
        default=Path("recipes/tiny/weights/base/image_tokenizer"),
        help="folder of a Janus VQ model",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--width", type=int, default=192, help="of the language model (default 192)")
    parser.add_argument("--layers", type=int, default=6, help="of the language model (default 6)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    options = parser.parse_args(arguments)
    text_tokenizer = train_text_tokenizer(read_captions(options.shards))
    config = config_for(text_tokenizer, options.image_tokenizer, width=options.width, layers=options.layers)
    torch.manual_seed(options.seed)
    backbone = janus.build(config)
    with tempfile.TemporaryDirectory() as folder:
        text_tokenizer.save_pretrained(folder)
        backbone.save_pretrained(options.out, text_tokenizer=folder)
    num_parameters = sum(p.numel() for p in backbone.parameters())
    num_image_tokens = config.vision_config.num_image_tokens
    print(
        f"{options.out}: {num_parameters / 1e6:.2f} M parameters, {len(text_tokenizer)} text tokens, "
        f"{num_image_tokens} image tokens"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
