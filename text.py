"""Text to the context that the diffusion transformer reads: prompt -> clean prompt -> token ids -> umT5 encoder.

ids (b l) become (b l d). The encoder of T5 (arXiv 1910.10683) as umT5 (arXiv 2304.09151) varies it: every layer has its
own relative position bias, the feed-forward network is a gated GELU, norms are RMS norms without bias, attention is not
scaled. Wan2.1 uses umT5-xxl as it is. Names of parameters are those of models_t5_umt5-xxl-enc-bf16.pth.

Letters: b batch, l tokens (q as queries, k as keys), d width, a heads.
dtype: all runs in the dtype of the weights, but the mean square of a norm, attention logits and softmax are float32.
Differences from the official code: logits and bias are added in float32 (test_official_numbers); instead of ftfy,
`clean_prompt` straightens quotes and full-width forms and leaves the other repairs out (test_clean_prompt).
"""
import html
import math
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from kit.files import Checkpoint, check_fit, find_text, find_tokenizer, read_json, shards, show_help


@dataclass
class T5Config:
    """The numbers of umT5-xxl."""

    vocab: int = 256384
    dim: int = 4096             # d, width of a token
    dim_attn: int = 4096        # width of all heads together
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32       # classes of signed distance between two tokens


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype) * self.weight


def distance_buckets(length: int, num_buckets: int, max_distance: int = 128, device=None) -> Tensor:
    """(q, k) int64: the bucket of each distance k - q. One half of the buckets is for k <= q, the other for k > q.

    In each half, distances below num_buckets/4 have their own bucket, longer ones share logarithmic ones, and all from
    max_distance on share the last. Source: T5, section 2.1.
    """
    position = torch.arange(length, device=device)
    distance = position[None, :] - position[:, None]
    half, exact = num_buckets // 2, num_buckets // 4
    far = torch.log(distance.abs().clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    bucket = torch.where(distance.abs() < exact, distance.abs(), (exact + far.long()).clamp(max=half - 1))
    return bucket + half * (distance > 0)


def empty_embedding(rows: int, dim: int) -> nn.Embedding:
    """nn.Embedding without a random start of its own: on the meta device it would import the compiler, a second."""
    return nn.Embedding.from_pretrained(torch.empty(rows, dim), freeze=False)


class RelativePosition(nn.Module):
    def __init__(self, num_buckets: int, num_heads: int):
        super().__init__()
        self.embedding = empty_embedding(num_buckets, num_heads)

    def forward(self, length: int) -> Tensor:
        """The bias (a, l, l) that each head adds to its attention logits."""
        weight = self.embedding.weight
        return rearrange(weight[distance_buckets(length, len(weight), device=weight.device)], "q k a -> a q k")


class Attention(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v = (nn.Linear(config.dim, config.dim_attn, bias=False) for _ in range(3))
        self.o = nn.Linear(config.dim_attn, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (b l d), bias (b a l l) float32 -> (b l d)."""
        q, k, v = (rearrange(p(x), "b l (a d) -> b a l d", a=self.num_heads) for p in (self.q, self.k, self.v))
        logits = (q @ k.mT).float() + bias      # no division by sqrt(d): T5 has it in the start of q
        return self.o(rearrange(logits.softmax(-1).to(v.dtype) @ v, "b a l d -> b l (a d)"))


class FeedForward(nn.Module):
    def __init__(self, dim: int, dim_ffn: int):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, dim_ffn, bias=False), nn.GELU("tanh"))
        self.fc1 = nn.Linear(dim, dim_ffn, bias=False)
        self.fc2 = nn.Linear(dim_ffn, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x) * self.gate(x))


class Block(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(config.dim), RMSNorm(config.dim)
        self.attn = Attention(config)
        self.ffn = FeedForward(config.dim, config.dim_ffn)
        self.pos_embedding = RelativePosition(config.num_buckets, config.num_heads)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        bias = self.pos_embedding(x.shape[1]).float().masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
        x = x + self.attn(self.norm1(x), bias)
        return x + self.ffn(self.norm2(x))


class UMT5(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.token_embedding = empty_embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim)
        if not self.norm.weight.is_meta:
            self.init_weights()

    def init_weights(self, position_std: float = 2.0) -> None:
        """The start of training from scratch: T5's, but for the position bias. Where that starts near zero, a small
        encoder long takes "from left to right" and "from right to left" for one bag of words; at 2 it hears order."""
        head_dim = self.config.dim_attn // self.config.num_heads
        for name, p in self.named_parameters():
            if p.ndim == 1:
                nn.init.ones_(p)
            elif name == "token_embedding.weight":
                nn.init.normal_(p, std=1.0)
            elif "pos_embedding" in name:
                nn.init.normal_(p, std=position_std)
            elif name.endswith("attn.q.weight"):
                nn.init.normal_(p, std=(self.config.dim * head_dim) ** -0.5)
            else:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (b, l) int64, mask (b, l), true or 1 where a token is and not padding -> (b, l, d)."""
        x, mask = self.token_embedding(ids), mask.bool()
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


CURLY = dict.fromkeys(range(0x2018, 0x201C), "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
FULL_WIDTH = {full: full - 0xFEE0 for full in range(0xFF01, 0xFF5F)} | {0x3000: " "}


def clean_prompt(text: str) -> str:
    """Resolves HTML entities (twice: "&amp;quot;"), straightens curly quotes and full-width forms, joins white space.
    Characters that UTF-8 cannot hold, which a shell makes of broken input, become "?".

    The official code runs ftfy, which would also mend wrongly decoded text; NFKC would change more than ftfy does.
    """
    text = text.encode("utf-8", "replace").decode()
    text = html.unescape(html.unescape(text)).translate(CURLY | FULL_WIDTH)
    return " ".join(text.split())


def make_tokenizer(captions: list[str]) -> Tokenizer:
    """A tokenizer for training from scratch: <pad> 0, </s> 1, <unk> 2 as in umT5, then the captions' lower-case words
    and punctuation, frequent ones first. Its .save(path) writes the tokenizer.json that `load_text_encoder` reads."""
    tokenizer = Tokenizer(models.WordLevel({}, "<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    clean = (tokenizer.normalizer.normalize_str(clean_prompt(caption)) for caption in captions)
    counts = Counter(word for text in clean for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    words = ["<pad>", "</s>", "<unk>", *sorted(counts, key=lambda word: (-counts[word], word))]
    tokenizer.model = models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
    return tokenizer


@dataclass
class TextEncoder:
    """Turns prompts into contexts when called. `model` is the module to train, move or free."""

    tokenizer: Tokenizer
    model: UMT5
    text_len: int = 512         # tokens of a prompt at most, </s> among them

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """ids (b, l) int64 and mask (b, l) bool, l the longest prompt, on the model's device. </s> ends each, even "".

        A prompt of more than text_len tokens is cut, with a warning that says by how many.
        """
        pad, end = (self.tokenizer.token_to_id(token) for token in ("<pad>", "</s>"))
        rows = []
        for prompt in prompts:
            row = self.tokenizer.encode(clean_prompt(prompt), add_special_tokens=False).ids + [end]
            over = len(row) - self.text_len
            if over > 0:
                warnings.warn(f"the prompt has {len(row)} tokens: the last {over} were cut (limit {self.text_len})")
                row[self.text_len - 1:] = [end]
            rows.append(torch.tensor(row))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
        device = self.model.token_embedding.weight.device
        return ids.to(device), mask.to(device)

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that the tokenizer has no token for: to the model they are all the same."""
        prompt, unk = clean_prompt(prompt), self.tokenizer.token_to_id("<unk>")
        encoding = self.tokenizer.encode(prompt, add_special_tokens=False)
        return [prompt[start:end] for i, (start, end) in zip(encoding.ids, encoding.offsets) if i == unk]

    def __call__(self, prompts: list[str]) -> list[Tensor]:
        """One context (l, d) a prompt, without its padding. Gradients flow unless torch.no_grad() says otherwise."""
        ids, mask = self.tokenize(prompts)
        return [context[valid] for context, valid in zip(self.model(ids, mask), mask)]


def t5_config(meta: dict[str, Tensor]) -> T5Config:
    """The sizes of an encoder from its tensors'. KeyError or ValueError if it is none."""
    (vocab, dim), (dim_attn, _) = meta["token_embedding.weight"].shape, meta["blocks.0.attn.q.weight"].shape
    buckets, heads = meta["blocks.0.pos_embedding.embedding.weight"].shape
    dim_ffn, _ = meta["blocks.0.ffn.fc1.weight"].shape
    layers = len({name.split(".")[1] for name in meta if name.startswith("blocks.")})
    return T5Config(vocab, dim, dim_attn, dim_ffn, heads, layers, buckets)


def read_umt5(path: Path, dtype: torch.dtype, device) -> UMT5:
    """The encoder in that file, its sizes read from its tensors. ValueError lists up to ten keys that do not fit.

    Read block by block, so that no more than one is held twice; for meta nothing is read.
    """
    file = Checkpoint(*(shards(path) if path.suffix == ".json" else [path]))
    try:
        with torch.device("meta"):
            model = UMT5(t5_config(file.meta))
    except (KeyError, ValueError):
        raise ValueError(f"{path} is not a umT5 encoder: its tensors are others") from None
    expected = model.state_dict()
    check_fit(path, expected, file.meta, "a umT5 encoder")
    if str(device) == "meta":
        return model
    blocks, state = {}, {}
    for name in expected:
        blocks.setdefault(name.split(".")[1], []).append(name)      # by their number; the rest has none: "weight"
    for names in blocks.values():
        state |= {name: tensor.to(device, dtype) for name, tensor in file.read(names).items()}
    model.load_state_dict(state, assign=True)
    return model


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in that tokenizer.json, without any truncation or padding that the file asks for."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer {path}: it comes with every Wan checkpoint")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:       # nothing narrower is raised by the package
        raise ValueError(f"{path} is not a tokenizer.json: download it again") from None
    if None in (tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("</s>")):
        raise ValueError(f"{path} is not the tokenizer of a T5: it has no <pad> or no </s>")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_text_len(folder: str | Path) -> int:
    """text_len in a folder's config.json, tokens of a prompt at most; Wan's 512 where there is none."""
    file = Path(folder) / "config.json"
    length = read_json(file).get("text_len", 512) if file.is_file() else 512
    if type(length) is not int or length < 1:
        raise ValueError(f"{file}: text_len must be a whole number above 0, not {length!r}")
    return length


def load_text_encoder(path: str | Path, dtype: torch.dtype = torch.float32, device="cpu", folder=None) -> TextEncoder:
    """Encoder and tokenizer of a checkpoint folder, or of the encoder's own file in such a folder, or anywhere if
    `folder` is that of the tokenizer.

    Reads models_t5_umt5-xxl-enc-bf16 (.safetensors or .pth), google/umt5-xxl/tokenizer.json, config.json for text_len.
    FileNotFoundError or ValueError, in one sentence, if one of them is missing, broken or something else.
    """
    path = Path(path)
    folder = Path(folder or (path if path.is_dir() else path.parent))
    folder = folder.parent if folder.name == "text_encoder" else folder
    path = find_text(path) if path.is_dir() else path
    tokenizer = read_tokenizer(find_tokenizer(folder))
    model = read_umt5(path, dtype, device)
    if tokenizer.get_vocab_size() > model.config.vocab:
        raise ValueError(f"{folder}: the tokenizer has more tokens than the encoder, they do not belong together")
    return TextEncoder(tokenizer, model, read_text_len(folder))


if __name__ == "__main__":
    show_help("text.py: two prompts through a tokenizer and a small random encoder: tokens, ids, shapes")
    prompts = ["A red ball moving from left to right.", "A red ball moving from right to left."]
    encoder = TextEncoder(make_tokenizer(prompts), UMT5(T5Config(32, 48, 48, 96, 4, 2, 32)))
    ids, mask = encoder.tokenize(prompts)
    there, back = encoder(prompts)
    print(encoder.tokenizer.encode(prompts[0]).tokens, "->", ids[0].tolist())
    print(f"ids {tuple(ids.shape)} -> contexts {tuple(there.shape)} and {tuple(back.shape)}; the same words in another "
          f"order: their means differ by {(there.mean(0) - back.mean(0)).abs().max():.2f}")
