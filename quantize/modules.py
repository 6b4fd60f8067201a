"""Names and shapes of a decoder layer's tensors, as Hugging Face checkpoints write them."""

from morphserve.quantize.architecture import Architecture

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT = ("self_attn.o_proj",)
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = ("mlp.down_proj",)

INPUT_NORM = "input_layernorm.weight"
POST_ATTENTION_NORM = "post_attention_layernorm.weight"
Q_NORM = "self_attn.q_norm.weight"
K_NORM = "self_attn.k_norm.weight"

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def linear_shapes(arch: Architecture) -> dict[str, tuple[int, int]]:
    """[out features, in features] of each linear of one layer."""
    hidden, inner = arch.hidden_size, arch.intermediate_size
    return {
        "self_attn.q_proj": (arch.q_size, hidden),
        "self_attn.k_proj": (arch.kv_size, hidden),
        "self_attn.v_proj": (arch.kv_size, hidden),
        "self_attn.o_proj": (hidden, arch.q_size),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def has_bias(arch: Architecture, linear: str) -> bool:
    if linear in QKV:
        return arch.qkv_bias
    return arch.output_bias if linear in OUTPUT else arch.mlp_bias


def vector_shapes(arch: Architecture) -> dict[str, tuple[int]]:
    """Norms and biases of one layer."""
    shapes = {INPUT_NORM: (arch.hidden_size,), POST_ATTENTION_NORM: (arch.hidden_size,)}
    if arch.qk_norm:
        shapes |= {Q_NORM: (arch.head_dim,), K_NORM: (arch.head_dim,)}
    for linear, (outputs, _) in linear_shapes(arch).items():
        if has_bias(arch, linear):
            shapes[f"{linear}.bias"] = (outputs,)
    return shapes


def checkpoint_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor the forward pass needs, by its full name."""
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (arch.vocab_size, arch.hidden_size),
        FINAL_NORM: (arch.hidden_size,),
    }
    if not arch.tied_head:
        shapes[HEAD] = (arch.vocab_size, arch.hidden_size)
    linears = {f"{name}.weight": shape for name, shape in linear_shapes(arch).items()}
    for layer in range(arch.num_layers):
        prefix = layer_prefix(layer)
        for name, shape in (linears | vector_shapes(arch)).items():
            shapes[prefix + name] = shape
    return shapes
