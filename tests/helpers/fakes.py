"""Tiny random models, for tests that need no released model."""

from pathlib import Path

import torch
from torch import Tensor, nn

from mmtensorar.model import attention
from mmtensorar.model.conditions import Condition, Prefix
from mmtensorar.model.kv_cache import KVCache

PAD = 0


class FakePrefix(nn.Module):
    """Prompt ids -> embeddings.

    An uncond row keeps its length, but all its words become the same.
    """

    def __init__(self, dim: int, num_words: int):
        super().__init__()
        self.words = nn.Embedding(num_words, dim)

    def forward(self, condition: Condition, uncond: Tensor) -> Prefix:
        values = torch.where(uncond[:, None], torch.full_like(condition.values, PAD), condition.values)
        return Prefix(self.words(values), condition.mask)


class FakeEmbed(nn.Module):
    """codes [..., F] -> sum of the factors' embeddings [..., D]."""

    def __init__(self, dim: int, factor_sizes: tuple[int, ...]):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, dim) for size in factor_sizes)

    def forward(self, codes: Tensor) -> Tensor:
        return sum(table(codes[..., f]) for f, table in enumerate(self.tables))


class FakeHead(nn.Module):
    """The input of factor f is the hidden state and the factors before f."""

    def __init__(self, dim: int, factor_sizes: tuple[int, ...]):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(dim, size) for size in factor_sizes)
        self.given = nn.ModuleList(nn.Embedding(size, dim) for size in factor_sizes[:-1])

    @property
    def output_maps(self) -> nn.ModuleList:
        return self.maps

    def states(self, hidden: Tensor, prev: Tensor) -> Tensor:
        for f in range(prev.shape[-1]):
            hidden = hidden + self.given[f](prev[..., f])
        return hidden.tanh()

    def forward(self, hidden: Tensor, prev: Tensor) -> Tensor:
        return self.maps[prev.shape[-1]](self.states(hidden, prev))


class FakeBackbone(nn.Module):
    """One causal attention layer.

    factor_sizes: one size per factor, at least one; two give the factorised variant.
    """

    prefix_len = None

    def __init__(
        self, factor_sizes: tuple[int, ...] = (11,), num_tokens: int = 6, dim: int = 16, num_words: int = 9
    ):
        super().__init__()
        self.dim, self.num_tokens, self.factor_sizes = dim, num_tokens, factor_sizes
        self.embed = FakeEmbed(dim, factor_sizes)
        self.prefix = FakePrefix(dim, num_words)
        self.head = FakeHead(dim, factor_sizes)
        self.places = nn.Embedding(64, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = nn.LayerNorm(dim)
        self.calls: list[tuple[int, int]] = []

    def new_cache(self, max_len: int) -> KVCache:
        return KVCache(1, max_len, "eager")

    def forward(self, embeds: Tensor, mask: Tensor | None, cache: KVCache | None = None) -> Tensor:
        B, S, _ = embeds.shape
        self.calls.append((B, S))
        # Left padding must not shift the positions of real tokens.
        if cache is None:
            pattern = attention.pattern(mask, S, S, "eager")
            places = (mask.long().cumsum(1) - 1).clamp(min=0)
        else:
            pattern, places = cache.begin(B, S, embeds.device, mask).pattern, cache.positions_RS
        x = embeds + self.places(places)
        q, k, v = (part[:, None] for part in self.qkv(x).chunk(3, dim=-1))  # one head
        if cache is not None:
            k, v = cache.layers[0].append(k, v)
        return self.norm(x + attention.attend(q, k, v, pattern)[:, 0])


def fake_condition(batch: int = 3, length: int = 5) -> Condition:
    """Prompts of different lengths, left-padded; the last column is always real."""
    values = torch.arange(batch * length).reshape(batch, length) % 8 + 1
    mask = torch.arange(length)[None] >= (torch.arange(batch) % 3)[:, None]
    return Condition(values.masked_fill(~mask, PAD), mask)


def tiny_janus(num_codes: int = 11, side: int = 3):
    """A real Janus with random weights: width 16, side * side image tokens.

    It accepts fake_condition.
    """
    from mmtensorar.backbones import janus

    text = dict(
        vocab_size=12, hidden_size=16, intermediate_size=24, max_position_embeddings=64, pad_token_id=PAD
    )
    # The range is so large that rounding does not change the most likely token.
    return janus.build(_janus_config(num_codes, side, initializer_range=0.3, **text))


def write_tiny_janus(folder: Path, num_codes: int = 32, side: int = 4, width: int = 32) -> None:
    """A random Janus with a word-level text tokenizer, in the released layout; its VQ
    model in folder/vq.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import JanusForConditionalGeneration, PreTrainedTokenizerFast

    special = [
        "<unk>",
        "<｜▁pad▁｜>",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<begin_of_image>",
        "<end_of_image>",
    ]
    words = special + [
        "a",
        "red",
        "blue",
        "green",
        "circle",
        "square",
        "User",
        "Assistant",
        ":",
        "<",
        ">",
        "|",
    ]
    text_tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    text_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text_tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=text_tokenizer,
        unk_token="<unk>",
        pad_token="<｜▁pad▁｜>",
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
    ).save_pretrained(folder)
    text = dict(vocab_size=64, hidden_size=width, intermediate_size=64, max_position_embeddings=256)
    config = _janus_config(num_codes, side, pad_token_id=1, bos_token_id=2, eos_token_id=3, **text)
    torch.manual_seed(0)
    model = JanusForConditionalGeneration(config)
    model.save_pretrained(folder)
    model.model.vqmodel.save_pretrained(folder / "vq")


def _janus_config(num_codes: int, side: int, *, hidden_size: int, **text):
    """Two layers and two heads. text: the other settings of the language model."""
    from transformers import JanusConfig

    heads = dict(num_attention_heads=2, num_key_value_heads=2)
    return JanusConfig(
        text_config=dict(model_type="llama", hidden_size=hidden_size, num_hidden_layers=2, **heads, **text),
        # transformers derives the code grid from image_size // patch_size.
        vision_config=dict(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=4 * side,
            patch_size=4,
            projection_dim=hidden_size,
        ),
        vq_config=dict(
            embed_dim=8,
            num_embeddings=num_codes,
            latent_channels=8,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            image_token_embed_dim=hidden_size,
            projection_dim=hidden_size,
        ),
    )


def tiny_janus_vq():
    """Janus's VQ model as in transformers, with random weights: pictures of 6 pixels, 3
    x 3 codes of 11.
    """
    from mmtensorar.image_tokenizers import janus_vq

    text = dict(vocab_size=12, intermediate_size=24)
    return janus_vq.JanusVQ(janus_vq.JanusVQVAE(_janus_config(11, 3, hidden_size=16, **text).vq_config))


def tiny_llamagen_vq():
    """LlamaGen's image tokenizer with random weights: pictures of 8 pixels, 4 x 4 codes
    of 16.
    """
    from mmtensorar.image_tokenizers import llamagen_vq

    sizes = dict(codebook_size=16, code_dim=4, ch=32, num_res_blocks=1, z_channels=8)
    architecture = llamagen_vq.Architecture(**sizes, encoder_ch_mult=[1, 2], decoder_ch_mult=[1, 1])
    return llamagen_vq.LlamaGenVQ(llamagen_vq.VQModel(architecture), 8)


def tiny_lfq(**changes):
    """Open-MAGVIT2's image tokenizer with random weights: pictures of 6 pixels, 3 x 3
    codes of 2 + 3 bits.
    """
    from mmtensorar.image_tokenizers import open_magvit2_lfq

    sizes = dict(ch=32, ch_mult=(1, 1), num_res_blocks=1, factorized_bits=(2, 3), image_size=6) | changes
    return open_magvit2_lfq.LFQ(open_magvit2_lfq.Architecture(**sizes))


def tiny_llamagen(condition: str = "class", **changes):
    """A real LlamaGen with random weights: width 16, 9 image tokens; its captions have
    5 slots of 6 numbers.
    """
    from mmtensorar.backbones import llamagen

    sizes = dict(dim=16, num_layers=2, num_heads=2, num_kv_heads=1, ffn_dim=24, vocab_size=11, num_tokens=9)
    kind = dict(prefix_len=5, caption_dim=6) if condition == "text" else dict(num_classes=7)
    backbone = llamagen.LlamaGenBackbone(
        llamagen.Architecture(condition=condition, **(sizes | kind | changes))
    )
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                # So large that rounding does not change the most likely token; the head
                # starts at zero.
                parameter.normal_(std=0.5)
    return backbone


def write_tiny_t5(folder: Path, seed: int = 0) -> None:
    """A random T5 encoder of width 6 whose text tokenizer has one id per word and adds
    the end token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = ["<pad>", "</s>", "<unk>", "a", "red", "circle"]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    marks = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=fast, **marks).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = dict(vocab_size=6, d_model=6, d_kv=3, d_ff=8, num_layers=1, num_heads=2)
    T5EncoderModel(T5Config(**sizes, pad_token_id=0, eos_token_id=1)).save_pretrained(folder)


def llamagen_condition(backbone, batch: int = 3) -> Condition:
    """Class ids, or captions of different lengths, left-padded with zeros."""
    config = backbone.config
    if config.condition == "class":
        return Condition(
            torch.arange(batch)[:, None] % config.num_classes, torch.ones(batch, 1, dtype=torch.bool)
        )
    mask = torch.arange(config.prefix_len) >= (2 * torch.arange(batch) % config.prefix_len)[:, None]
    features = torch.randn(
        batch, config.prefix_len, config.caption_dim, generator=torch.Generator().manual_seed(1)
    )
    return Condition(features * mask[..., None], mask)


def tiny_open_magvit2(side: int = 3):
    """A real Open-MAGVIT2 with random weights: width 32, side * side tokens of 2 + 3
    bits, 5 classes.
    """
    from mmtensorar.backbones import open_magvit2

    config = open_magvit2.Architecture(
        dim=32,
        num_heads=2,
        spatial_layers=2,
        factorized_layers=2,
        factorized_bits=(2, 3),
        num_classes=5,
        grid=side,
        ffn_width=48,
    )
    backbone = open_magvit2.OpenMagvit2Backbone(config)
    with torch.no_grad():
        for parameter in backbone.parameters():
            # So large that rounding does not change the most likely token; norms stay
            # about 1.
            parameter.copy_(torch.randn(parameter.shape) * 0.3 + (parameter.ndim == 1))
    return backbone


def class_condition(*classes: int) -> Condition:
    values = torch.tensor(classes)[:, None]
    return Condition(values, torch.ones_like(values, dtype=torch.bool))


def write_tiny_vlm(folder: Path) -> None:
    """A random LLaVA in Hugging Face's layout, which answers questions about 8 x 8
    pictures with one of five words.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    special = ["<unk>", "<pad>", "<s>", "</s>", "<image>"]
    words = [
        *special,
        *"yes no Yes No maybe is there the a circle red blue ? Answer with one word , or .".split(),
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    names = dict(unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> "
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names),
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    small = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2)
    text = LlamaConfig(
        vocab_size=len(words),
        num_hidden_layers=1,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        initializer_range=0.8,
        **small,
    )
    vision = CLIPVisionConfig(
        num_hidden_layers=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
        initializer_range=0.8,
        initializer_factor=8.0,
        **small,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=4,
            vision_feature_select_strategy="default",
            vision_feature_layer=-2,
        )
    )
    with torch.no_grad():  # only the first words can be generated
        model.lm_head.weight[[0, 1, 2, 4, *range(10, len(words))]] = 0
        model.lm_head.weight[5:10] *= 10
    model.save_pretrained(folder)
