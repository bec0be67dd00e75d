"""How others spell the names of Wan's tensors: diffusers, transformers, ComfyUI.

A checkpoint whose tensors are named by one of these families is read under Wan's own names, which the models here have.
Known by one telling name each; what no rule changes keeps its name. Sources: the classes WanTransformer3DModel and
AutoencoderKLWan of diffusers 0.42, UMT5EncoderModel of transformers 5.23, and ComfyUI's repackaged files.
"""
import re

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
SCALES = ("scale_weight", "weight_scale"), ("scale_input", "input_scale")    # of fp8: of a weight, of its input
MARKS = ("scaled_fp8", "spiece_model")                                       # of ComfyUI's files: no tensors of a model

BLOCK_LAYERS = {"attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v",
                "attn1.to_out.0": "self_attn.o", "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k",
                "attn2.to_v": "cross_attn.v", "attn2.to_out.0": "cross_attn.o",
                "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}            # diffusers' words, Wan's
TRANSFORMER = [(r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
               (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
               (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
               (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
               (r"^condition_embedder\.time_proj", "time_projection.1"),
               (r"^scale_shift_table$", "head.modulation"), (r"^proj_out", "head.head"),
               (r"\.scale_shift_table$", ".modulation"), (r"\.norm2\.", ".norm3."),
               *((re.escape(f".{theirs}."), f".{ours}.") for theirs, ours in BLOCK_LAYERS.items()),
               (r"\.attn1\.", ".self_attn."), (r"\.attn2\.", ".cross_attn.")]      # what is left: their norms

TEXT = [(r"^shared\.", "token_embedding."), (r"^encoder\.final_layer_norm", "norm"), (r"^encoder\.block\.", "blocks."),
        (r"\.layer\.0\.SelfAttention\.relative_attention_bias", ".pos_embedding.embedding"),
        (r"\.layer\.0\.SelfAttention\.", ".attn."), (r"\.layer\.0\.layer_norm", ".norm1"),
        (r"\.layer\.1\.layer_norm", ".norm2"), (r"\.layer\.1\.DenseReluDense\.wi_0", ".ffn.gate.0"),
        (r"\.layer\.1\.DenseReluDense\.wi_1", ".ffn.fc1"), (r"\.layer\.1\.DenseReluDense\.wo", ".ffn.fc2")]

AUTOENCODER = [(r"^quant_conv", "conv1"), (r"^post_quant_conv", "conv2"), (r"coder\.conv_in", "coder.conv1"),
               (r"coder\.norm_out", "coder.head.0"), (r"coder\.conv_out", "coder.head.2"),
               (r"\.mid_block\.resnets\.0\.", ".middle.0."), (r"\.mid_block\.attentions\.0\.", ".middle.1."),
               (r"\.mid_block\.resnets\.1\.", ".middle.2."), (r"\.down_blocks\.", ".downsamples."),
               (r"\.norm1\.", ".residual.0."), (r"(samples\.\d+|middle\.\d)\.conv1\.", r"\1.residual.2."),
               (r"\.norm2\.", ".residual.3."), (r"(samples\.\d+|middle\.\d)\.conv2\.", r"\1.residual.6."),
               (r"\.conv_shortcut\.", ".shortcut.")]

FAMILIES = {"condition_embedder.time_proj.weight": TRANSFORMER, "encoder.final_layer_norm.weight": TEXT,
            "post_quant_conv.weight": AUTOENCODER}


def wan_names(names) -> dict[str, str]:
    """Every name of a checkpoint -> Wan's name for it, often itself. Marks of ComfyUI's files are left out."""
    stripped = {name: next((name.removeprefix(p) for p in PREFIXES if name.startswith(p)), name) for name in names}
    if not any(name.startswith("blocks.") and name.endswith("self_attn.q.weight") for name in stripped.values()):
        stripped = {name: name for name in names}                            # an adapter keeps its prefixes
    rules = next((rules for telling, rules in FAMILIES.items() if telling in stripped.values()), [])
    if rules is AUTOENCODER:
        stripped = {name: flat_level(short, stripped.values()) for name, short in stripped.items()}
    twin = {"encoder.embed_tokens.weight"} if "shared.weight" in names else set()      # of shared.weight, in some files
    return {name: rename(short, rules) for name, short in stripped.items() if short not in {*MARKS, *twin}}


def rename(name: str, rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def flat_level(name: str, names) -> str:
    """A decoder level's blocks in one row, as Wan counts them: up_blocks.1.resnets.0 is upsamples.4 where a level has
    three blocks and an upsampler."""
    found = re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)(.*)", name)
    if not found:
        return name
    blocks = 1 + max(int(i) for other in names for i in re.findall(r"^decoder\.up_blocks\.0\.resnets\.(\d+)", other))
    level, kind, i, rest = int(found[1]), found[2], int(found[3]), found[4]
    return f"decoder.upsamples.{level * (blocks + 1) + (i if kind == 'resnets' else blocks)}{rest}"
