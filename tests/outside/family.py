"""A family: BERT's layers without a pooler, with config keys and tensor names of its own."""

from lora_jax import register_family
from lora_jax.models.encoder import EncoderConfig
from lora_jax.models.families.base import Family, embeddings, norms, post_norm_block, projections, size

LAYER = "blocks.{i}."
LINEARS = {f"layers.attn.{p}_proj": f"{LAYER}attention.{p}" for p in "qkvo"} | {
    "layers.mlp.up_proj": LAYER + "wide",
    "layers.mlp.down_proj": LAYER + "narrow",
}
NORMS = {"embed_norm": "norm", "layers.attn_norm": LAYER + "norm_1", "layers.mlp_norm": LAYER + "norm_2"}
EMBEDDINGS = {"embed": "words", "position_embed": "places", "type_embed": "types"}


def config(hf, dtype):
    width, heads = size(hf, "dim"), size(hf, "heads")
    block = post_norm_block(width, heads, size(hf, "wide"), "gelu", 1e-12, dtype)
    sizes = {"depth": size(hf, "blocks"), "vocab": size(hf, "words"), "positions": size(hf, "places"), "token_types": size(hf, "types")}
    return EncoderConfig(block, **sizes, pooler=False)


def weights(config):
    return projections(LINEARS, bias=True) | norms(NORMS) | embeddings(EMBEDDINGS)


register_family("outside-bert", Family("encoder", config, weights, architecture="OutsideBert"))
